// Accesses to memory: their addresses, what they touch, and the bytes of those that are known.

#include "memory.h"

#include <algorithm>
#include <cstring>

#include <emulator/banks.h>

namespace sass {

// ---- global memory ----

void Memory::add(uint64_t address, uint64_t bytes, std::string name, bool given, std::string content) {
  Range r;
  r.address = address;
  r.bytes = bytes;
  r.name = std::move(name);
  r.given = given;
  r.content.assign(content.begin(), content.end());
  ranges_.push_back(std::move(r));
}

Range* Memory::find(uint64_t address, uint64_t bytes) {
  const auto inside = [&](const Range& r) { return address >= r.address && address + bytes <= r.address + r.bytes; };
  if (last_ < ranges_.size() && inside(ranges_[last_])) return &ranges_[last_];
  for (size_t n = 0; n < ranges_.size(); ++n)
    if (inside(ranges_[n])) {
      last_ = n;
      return &ranges_[n];
    }
  return nullptr;
}

std::string Memory::outside(uint64_t address) const {
  std::string text = "outside of every tensor of the launch";
  constexpr int64_t kNear = 1 << 16;
  for (const Range& r : ranges_) {
    const auto offset = static_cast<int64_t>(address - r.address);
    if (offset > -kNear && offset < static_cast<int64_t>(r.bytes) + kNear)
      text += ", at byte " + std::to_string(offset) + " of " + r.name + ", which has " + std::to_string(r.bytes);
  }
  return text;
}

// ---- addresses ----

Addresses addresses_of(Warp& w, const Instruction& i, const Operand& o, uint32_t lanes, bool global) {
  Addresses out;
  const bool short_base = o.has("U32");
  int scale = o.has("X4") ? 4 : o.has("X8") ? 8 : o.has("X16") ? 16 : 1;
  uint32_t known = kAll;
  const Vec* base = o.base < 0 ? nullptr : &w.r[o.base];
  const bool pair = global && o.wide && !short_base && o.base != kRZ;
  if (base != nullptr) known &= base->known & (pair ? w.r[o.base + 1].known : kAll);
  uint64_t plus = static_cast<uint64_t>(o.offset);
  if (o.uniform >= 0 && o.uniform != kURZ) {
    known &= w.ur[o.uniform].known;
    plus += w.ur[o.uniform].v[0];
    if (global) {
      known &= w.ur[o.uniform + 1].known;
      plus += uint64_t{w.ur[o.uniform + 1].v[0]} << 32;
    }
  }
  if (lanes & ~known) w.fail(i, "has an address that is not known");
  for (int lane = 0; lane < kWarp; ++lane) {
    uint64_t at = base == nullptr ? 0 : base->v[lane];
    if (pair) at |= uint64_t{w.r[o.base + 1].v[lane]} << 32;
    at = at * scale + plus;
    out.at[lane] = global ? at : at & 0xffffff;  // the bits above are the block's number in its cluster
  }
  return out;
}

void note_global(Warp& w, Event& e, const uint64_t* at, uint32_t lanes, int bytes, bool reads, bool writes) {
  const emulator::Sectors all = emulator::sectors(at, lanes);
  if (!w.launch->record) {
    auto& record = w.block->record;
    if (reads) record.reads.insert(record.reads.end(), all.sector.begin(), all.sector.begin() + all.count);
    if (writes) record.writes.insert(record.writes.end(), all.sector.begin(), all.sector.begin() + all.count);
    return;
  }
  auto& sectors = w.launch->sectors;
  sectors.insert(sectors.end(), all.sector.begin(), all.sector.begin() + all.count);
  e.sectors = static_cast<uint32_t>(all.count);
  e.bytes = static_cast<uint32_t>(bytes * __builtin_popcount(lanes));
  if (lanes != 0) e.address = at[__builtin_ctz(lanes)];
}

void note_banks(Warp& w, Event& e, const uint64_t* at, uint32_t lanes, int bytes) {
  if (!w.launch->record || lanes == 0) return;
  const emulator::Wavefronts rounds = emulator::wavefronts(at, lanes, bytes);
  e.wavefronts = static_cast<uint32_t>(rounds.units);
  e.least = static_cast<uint32_t>(rounds.least);
}

void check_shared(Warp& w, const Instruction& i, uint64_t at, int bytes) {
  if (at + bytes > w.block->shared.size())
    w.fail(i, "touches byte " + std::to_string(at) + " of shared memory, of which the block has " +
                  std::to_string(w.block->shared.size()));
}

// ---- bytes ----

namespace {

// Of a size that the compiler knows, which is several times as fast.
void copy_bytes(void* to, const void* from, int bytes) {
  switch (bytes) {
    case 16:
      std::memcpy(to, from, 16);
      break;
    case 8:
      std::memcpy(to, from, 8);
      break;
    case 4:
      std::memcpy(to, from, 4);
      break;
    case 2:
      std::memcpy(to, from, 2);
      break;
    default:
      std::memcpy(to, from, 1);
  }
}

constexpr uint32_t kFourKnown = 0x01010101;

Range& range_of(Warp& w, const Instruction& i, uint64_t at, int bytes) {
  Range* r = w.launch->memory.find(at, static_cast<uint64_t>(bytes));
  if (r == nullptr) w.fail(i, "touches global memory " + w.launch->memory.outside(at));
  return *r;
}

}  // namespace

bool load_global(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, Bytes& out) {
  bool given = false;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Range& r = range_of(w, i, at[lane], bytes);
    const uint64_t from = at[lane] - r.address;
    if (!r.given) {
      std::memset(out.known[lane], 0, sizeof(out.known[lane]));
      continue;
    }
    given = true;
    copy_bytes(out.data[lane], r.content.data() + from, bytes);
    for (int n = 0; n < bytes; ++n) out.known[lane][n] = r.unknown.empty() || !r.unknown[from + n];
  }
  return given;
}

void store_global(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, const Bytes& in) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Range& r = range_of(w, i, at[lane], bytes);
    if (!r.given) continue;
    const uint64_t to = at[lane] - r.address;
    std::memcpy(r.content.data() + to, in.data[lane], bytes);
    const bool all = std::all_of(in.known[lane], in.known[lane] + bytes, [](bool k) { return k; });
    if (r.unknown.empty() && all) continue;
    if (r.unknown.empty()) r.unknown.assign(r.bytes, 0);
    for (int n = 0; n < bytes; ++n) r.unknown[to + n] = !in.known[lane][n];
  }
}

void load_shared(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, Bytes& out) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    check_shared(w, i, at[lane], bytes);
    copy_bytes(out.data[lane], w.block->shared.data() + at[lane], bytes);
    copy_bytes(out.known[lane], w.block->shared_known.data() + at[lane], bytes);
  }
}

void store_shared(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, const Bytes& in) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    check_shared(w, i, at[lane], bytes);
    copy_bytes(w.block->shared.data() + at[lane], in.data[lane], bytes);
    copy_bytes(w.block->shared_known.data() + at[lane], in.known[lane], bytes);
  }
}

void put_bytes(Warp& w, const Instruction& i, const Operand& to, int bytes, const Bytes& in) {
  for (int part = 0; part < std::max(1, bytes / 4); ++part) {
    Vec out;
    out.known = 0;
    const int size = std::min(bytes, 4);
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(w.exec >> lane & 1)) continue;
      uint32_t value = 0, flags = kFourKnown;
      copy_bytes(&value, in.data[lane] + 4 * part, size);
      copy_bytes(&flags, in.known[lane] + 4 * part, size);
      const bool known = flags == kFourKnown;
      if (i.is_signed && size == 2) value = static_cast<uint32_t>(static_cast<int16_t>(value));
      if (i.is_signed && size == 1) value = static_cast<uint32_t>(static_cast<int8_t>(value));
      out.v[lane] = value;
      out.known |= static_cast<uint32_t>(known) << lane;
    }
    w.put(to, out, part);
  }
}

void take_bytes(Warp& w, const Instruction& i, const Operand& from, int bytes, Bytes& out) {
  for (int part = 0; part < std::max(1, bytes / 4); ++part) {
    Vec scratch;
    const Vec& x = w.plain(i, from, scratch, part);
    for (int lane = 0; lane < kWarp; ++lane) {
      const uint32_t flags = x.known >> lane & 1 ? kFourKnown : 0;
      copy_bytes(out.data[lane] + 4 * part, &x.v[lane], 4);
      copy_bytes(out.known[lane] + 4 * part, &flags, 4);
    }
  }
}

}  // namespace sass
