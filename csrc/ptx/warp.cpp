// A warp's reports.

#include "warp.h"

#include "machine.h"

namespace ptx {
namespace {

Finding finding_of(const Warp& w, const Instruction& i, int lane, const std::string& what) {
  const Program& p = *w.launch->program;
  Finding f;
  f.kernel = p.name;
  f.what = what;
  f.source = p.source(i);
  f.opcode = p.opcodes[i.opcode];
  f.line = i.line;
  f.block = w.block->index;
  f.warp = w.index;
  f.lane = lane;
  return f;
}

constexpr size_t kMostFindings = 1000;

}  // namespace

void Warp::finding(const Instruction& i, int lane, const std::string& what) {
  Finding f = finding_of(*this, i, lane, what);
  if (launch->strict) throw Fault(std::move(f));
  if (launch->findings.size() < kMostFindings) launch->findings.push_back(std::move(f));
}

void Warp::fail(const Instruction& i, int lane, const std::string& what) {
  launch->stopped = true;
  throw Fault(finding_of(*this, i, lane, what));
}

void Warp::used_while_pending(const Instruction& i, const Slot& s) {
  finding(i, first_lane(pending[s.reg] & active),
          "uses register " + launch->program->registers[s.reg] +
              ", which a product in flight still reads or writes: wait for it first");
}

void Warp::undefined(const Instruction& i, const Slot& s, const char* what) {
  finding(i, first_lane(active & ~written[s.reg]),
          std::string(what) + ", register " + launch->program->registers[s.reg] +
              ", holds no defined value: it was never written, or comes from something that was not" +
              launch->order.undefined_load());
}

void Warp::require_together(const Instruction& i) {
  if (active != alive)
    finding(i, first_lane(alive & ~active),
            "lanes part at an instruction that all lanes of a warp must execute together; this one does not");
}

void Warp::forget(const Slot& s, uint32_t lanes) {
  const int bytes = lane_bytes(s.type);
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes >> lane & 1) std::memset(undefined_bits + s.at + lane * bytes, 0xff, bytes);
}

uint32_t Warp::defined_partly(const Slot& s, int first, int bits) const {
  uint32_t lanes = written[s.reg];
  if (lane_bytes(s.type) == 0) return lanes;
  for (int lane = 0; lane < kWarp; ++lane)
    if (!(lanes >> lane & 1) && !(undefined_value(s, lane) & bit_field(first, bits))) lanes |= 1u << lane;
  return lanes;
}

void Warp::keep_bits(const Slot& s) {
  if (keeps_bits[s.reg]) return;
  keeps_bits[s.reg] = 1;
  std::memset(undefined_bits + s.at, 0xff, static_cast<size_t>(lane_bytes(s.type)) * kWarp);
}

void Warp::note_part(const Slot& s, int first, int count, uint32_t known) {
  if (s.absent) return;
  keep_bits(s);
  const int bytes = lane_bytes(s.type);
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t bit = 1u << lane;
    if (!(active & bit)) continue;
    uint64_t bits = undefined_value(s, lane);
    bits = known & bit ? bits & ~bit_field(first, count) : bits | bit_field(first, count);
    std::memcpy(undefined_bits + s.at + lane * bytes, &bits, bytes);
    written[s.reg] = bits == 0 ? written[s.reg] | bit : written[s.reg] & ~bit;
  }
}

uint64_t Warp::undefined_value(const Slot& s, int lane) const {
  switch (lane_bytes(s.type)) {
    case 2:
      return undefined_in<uint16_t>(s, lane);
    case 4:
      return undefined_in<uint32_t>(s, lane);
    default:
      return undefined_in<uint64_t>(s, lane);
  }
}

uint64_t Warp::value(const Slot& s, int lane) const {
  switch (lane_bytes(s.type)) {
    case 0:
      return mask(s) >> lane & 1;
    case 2:
      return in<uint16_t>(s)[lane];
    case 4:
      return in<uint32_t>(s)[lane];
    default:
      return in<uint64_t>(s)[lane];
  }
}

}  // namespace ptx
