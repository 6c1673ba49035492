// The copy engine's boxes, and the mbarriers that count their bytes.
//
// Nothing here takes time: a copy's bytes arrive as it is issued. A warp that waits for a phase which others have not
// completed yet is held until they have.

#include <algorithm>
#include <cstring>

#include <emulator/banks.h>
#include <emulator/box.h>

#include "memory.h"

namespace sass {
namespace {

Mbarrier& mbarrier_at(Warp& w, const Instruction& i, uint64_t at) {
  Mbarrier& m = w.block->mbarriers[at];
  if (!m.valid) w.fail(i, "uses an mbarrier that nobody has initialised, at byte " + std::to_string(at));
  return m;
}

void settle(Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.phase = !m.phase;
  m.pending = m.count;
}

// ---- SYNCS ----

void run_initialise(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const uint64_t at = addresses_of(w, i, i.operands[1], 1u << w.leader(), false).at[w.leader()];
  Vec scratch;
  const Vec& low = w.plain(i, i.operands[2], scratch);
  if (!(low.known >> w.leader() & 1)) w.fail(i, "initialises an mbarrier with a count that is not known");
  check_shared(w, i, at, 8);
  Mbarrier m;
  m.count = m.pending = 0x100000 - static_cast<int64_t>(low.v[w.leader()] >> 1);  // as the hardware's word counts up
  m.valid = true;
  w.block->mbarriers[at] = m;
  Event& e = w.event(i);
  e.address = at;
  e.value = m.count;
}

void run_arrive(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const Addresses a = addresses_of(w, i, i.operands[i.results], w.exec, false);
  Vec scratch;
  const Vec& given = w.plain(i, i.operands[i.results + 1], scratch);
  Event& e = w.event(i);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.exec >> lane & 1)) continue;
    int64_t bytes = 0;
    if (i.flag) {
      if (!(given.known >> lane & 1)) w.fail(i, "expects a number of bytes that is not known");
      bytes = given.v[lane];
    }
    Mbarrier& m = mbarrier_at(w, i, a.at[lane]);
    m.pending -= i.size;
    m.bytes += bytes;
    e.address = a.at[lane];
    e.value += bytes;
    settle(m);
  }
}

void run_wait(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const Addresses a = addresses_of(w, i, i.operands[1], w.exec, false);
  Vec scratch;
  const Vec& given = w.plain(i, i.operands[2], scratch);
  const uint32_t first = w.leader();
  if (!(given.known >> first & 1)) w.fail(i, "waits for a phase that is not known");
  const bool parity = given.v[first] >> 31;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.exec >> lane & 1)) continue;
    if (a.at[lane] != a.at[first] || given.v[lane] >> 31 != given.v[first] >> 31 || !(given.known >> lane & 1))
      w.fail(i, "waits for different phases in the lanes of a warp");
  }
  if (mbarrier_at(w, i, a.at[first]).phase == parity) {
    w.repeat = true;
    w.state = Warp::kWaiting;
    return;
  }
  Event& e = w.event(i);
  e.address = a.at[first];
  e.value = parity;
  w.put(i.operands[0], Mask{kAll, kAll});
}

void run_nothing(Warp&, const Instruction&) {
}

bool decode_syncs(Instruction& i) {
  i.strict = true;
  if (i.take("EXCH") && i.take("64")) {
    i.run = run_initialise;
    return i.operands.size() == 3;
  }
  if (i.take("CCTL")) {
    i.modifiers.clear();
    i.run = run_nothing;
    return true;
  }
  if (i.take("ARRIVE")) {
    i.take("TRANS64");
    i.take("RED");
    const bool plain = i.take("A1T0"), bytes_only = i.take("A0T1") || i.take("A0TR") || i.take("A0TX");
    i.take("A1TR");
    i.flag = !plain;
    i.size = bytes_only ? 0 : 1;
    i.run = run_arrive;
    return static_cast<int>(i.operands.size()) > i.results + 1;
  }
  if (i.take("PHASECHK")) {
    i.take("TRANS64");
    i.take("TRYWAIT");
    i.run = run_wait;
    return i.operands.size() == 3;
  }
  return false;
}

// ---- boxes ----

uint32_t uniform(Warp& w, const Instruction& i, int number, const char* what) {
  const Vec& x = w.ur[number];
  if (x.known != kAll) w.fail(i, std::string("has ") + what + " that is not known");
  return x.v[0];
}

emulator::TiledTensor tensor_at(Warp& w, const Instruction& i, int pair) {
  const uint64_t at =
      uint64_t{uniform(w, i, pair + 1, "a tensor map's address")} << 32 | uniform(w, i, pair, "a tensor map's address");
  const unsigned char* bytes = nullptr;
  const std::vector<uint8_t>& parameters = w.launch->parameters;
  if (at >= kParameterWindow && at - kParameterWindow + emulator::kTensorMapBytes <= parameters.size()) {
    bytes = parameters.data() + (at - kParameterWindow);
  } else if (Range* r = w.launch->memory.find(at, emulator::kTensorMapBytes); r != nullptr && r->given) {
    bytes = r->content.data() + (at - r->address);
  }
  emulator::TiledTensor t;
  if (bytes == nullptr || !emulator::decode(bytes, t)) w.fail(i, "names a tensor map that the launch was not given");
  return t;
}

void run_box(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const bool load = i.name == "UTMALDG";
  const int first = i.operands[0].uniform, rank = i.size;
  const emulator::TiledTensor t = tensor_at(w, i, i.operands[1].uniform);
  if (t.rank != rank) w.fail(i, "names a tensor map of " + std::to_string(t.rank) + " dimensions");
  const uint64_t place = uniform(w, i, first, "a place in shared memory") & 0xffffff;
  int corner[emulator::TiledTensor::kMaxRank] = {};
  for (int d = 0; d < rank; ++d)
    corner[d] = static_cast<int>(uniform(w, i, first + (load ? 2 : 1) + d, "a coordinate"));
  check_shared(w, i, place, static_cast<int>(t.box_bytes()));
  Event& e = w.event(i);
  e.bytes = t.box_bytes();
  auto& record = w.block->record;
  emulator::for_rows(t, corner, [&](const emulator::BoxRow& row) {
    const uint64_t bytes = uint64_t{row.end - row.first} * t.element;
    if (bytes == 0) return;
    auto& to = w.launch->record ? w.launch->sectors : load ? record.reads : record.writes;
    const uint64_t last = (row.address + bytes - 1) / emulator::kSector;
    uint64_t sector = row.address / emulator::kSector;
    if (!to.empty() && to.size() > e.first && to.back() == sector) ++sector;  // rows of a dense box share sectors
    for (; sector <= last; ++sector) to.push_back(sector);
  });
  if (w.launch->record) e.sectors = static_cast<uint32_t>(w.launch->sectors.size() - e.first);
  constexpr uint32_t kRound = 128;
  e.wavefronts = e.least = (e.bytes + kRound - 1) / kRound;
  if (load) {
    const uint64_t at = uniform(w, i, first + 1, "an mbarrier's address") & 0xffffff;
    Mbarrier& m = mbarrier_at(w, i, at);
    e.address = at;
    e.value = static_cast<int64_t>(place);
    m.bytes -= e.bytes;
    settle(m);
    std::memset(w.block->shared_known.data() + place, 0, e.bytes);
  } else {
    e.address = place;
  }
}

bool decode_box(Instruction& i) {
  i.strict = true;
  i.size = 0;
  for (int d = 1; d <= emulator::TiledTensor::kMaxRank; ++d)
    if (i.take((std::to_string(d) + "D").c_str())) i.size = d;
  i.run = run_box;
  return i.size > 0 && i.operands.size() >= 2 && i.operands[0].uniform >= 0 && i.operands[1].uniform >= 0;
}

}  // namespace

const std::map<std::string, Decoder>& copy_decoders() {
  static const std::map<std::string, Decoder> all = {
      {"SYNCS", decode_syncs}, {"UTMALDG", decode_box}, {"UTMASTG", decode_box}};
  return all;
}

}  // namespace sass
