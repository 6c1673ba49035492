// ld, st and prefetch, and the checks that all accesses share.

#include "access.h"

#include <algorithm>
#include <cstring>

#include "apply.h"
#include "families.h"

namespace ptx {
namespace {

constexpr int kWindowBits = 56;

Space space_of(uint64_t address) {
  switch (address >> kWindowBits) {
    case 0:
      return Space::kGlobal;
    case kSharedWindow >> kWindowBits:
      return Space::kShared;
    case kLocalWindow >> kWindowBits:
      return Space::kLocal;
    default:
      return Space::kParameter;
  }
}

uint8_t* reach_global(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes, Use use, bool& defined) {
  GlobalMemory& memory = *w.launch->memory;
  Allocation* a = memory.find(address, bytes);
  const bool write = use != Use::kRead;
  const bool inside = a != nullptr && address % bytes == 0 && (!write || a->writable);
  if (!inside) w.fail(i, lane, memory.refused(address, bytes, write));
  if (use != Use::kWrite && !a->written.empty() && !GlobalMemory::is_written(*a, address, bytes)) {
    w.finding(i, lane, memory.refused(address, bytes, write, true));
    defined = false;
  }
  if (write) GlobalMemory::mark_written(*a, address, bytes);
  return reinterpret_cast<uint8_t*>(a->host + (address - a->address));
}

uint8_t* reach_local(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes, Use use, bool write_defined,
                     bool& defined) {
  const auto size = static_cast<uint64_t>(w.launch->program->local_bytes);
  if (address + bytes > size || address % bytes != 0)
    w.fail(i, lane,
           "accesses " + std::to_string(bytes) + " bytes at byte " + std::to_string(address) +
               " of local memory, of which a lane has " + std::to_string(size));
  const size_t at = lane * size + address;
  if (use != Use::kWrite)
    for (int b = 0; b < bytes; ++b) defined &= w.local_written[at + b] != 0;
  if (use != Use::kRead) std::memset(w.local_written.data() + at, write_defined, bytes);
  return w.local.data() + at;
}

uint8_t* reach_parameter(Warp& w, const Instruction& i, int lane, uint64_t at, int bytes, Use use) {
  std::vector<uint8_t>& parameters = w.launch->parameters;
  if (use != Use::kRead) w.fail(i, lane, "writes to a parameter of the kernel");
  if (at > parameters.size() || at + bytes > parameters.size() || at % bytes != 0)
    w.fail(i, lane,
           "reads " + std::to_string(bytes) + " bytes at byte " + std::to_string(at) +
               " of the parameters, which have " + std::to_string(parameters.size()));
  return parameters.data() + at;
}

// Global memory of one allocation, aligned, and with nothing to report: all lanes at once. Returns whether it was; if
// not, each lane is to be checked by itself.
bool reach_together(Warp& w, const Slot& base, int bytes, Use use, uint32_t written, Reached& out) {
  if (use != Use::kRead && (w.active & ~written) != 0) return false;
  const bool wide = lane_bytes(base.type) == 8;
  const uint64_t* addresses = w.in<uint64_t>(base);
  const int leader = first_lane(w.active);
  if (!wide || leader < 0) return false;
  uint64_t least = ~uint64_t{0}, most = 0, low_bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint64_t address = addresses[w.active >> lane & 1 ? lane : leader] + base.plus;
    out.address[lane] = address;
    least = address < least ? address : least;
    most = address > most ? address : most;
    low_bits |= address;
  }
  Allocation* a = w.launch->memory->find(least, most - least + bytes);
  if (a == nullptr || (low_bits & static_cast<uint64_t>(bytes - 1)) != 0 || (use != Use::kRead && !a->writable))
    return false;
  if (!a->written.empty()) {
    for (int lane = 0; lane < kWarp && use != Use::kWrite; ++lane)
      if (!GlobalMemory::is_written(*a, out.address[lane], bytes)) return false;
    for (int lane = 0; lane < kWarp && use != Use::kRead; ++lane)
      GlobalMemory::mark_written(*a, out.address[lane], bytes);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    out.at[lane] = reinterpret_cast<uint8_t*>(a->host + (out.address[lane] - a->address));
  out.global = w.active;
  return true;
}

// A parameter at an address that is the same in all lanes.
bool reach_named_parameter(Warp& w, const Instruction& i, const Slot& base, int bytes, Use use, Reached& out) {
  const uint64_t address = w.value(base, 0) + static_cast<uint64_t>(base.plus);
  const int leader = first_lane(w.active);
  if (base.reg != kConstantRegister || leader < 0 || space_of(address) == Space::kLocal) return false;
  const uint64_t in_space = space_of(address) == Space::kParameter ? address - kParameterWindow : address;
  uint8_t* const at = reach_parameter(w, i, leader, in_space, bytes, use);
  out.address.fill(in_space);
  out.at.fill(at);
  return true;
}

void copy_small(void* to, const void* from, int bytes) {
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
    default:
      std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

}  // namespace

void reach(Warp& w, const Instruction& i, const Slot& base, Space space, int bytes, Use use, uint32_t written,
           const uint8_t* data, Reached& out) {
  w.require(i, base, "the address");
  out.defined = w.active;
  const bool wide = lane_bytes(base.type) == 8;
  const bool done = space == Space::kGlobal      ? reach_together(w, base, bytes, use, written, out)
                    : space == Space::kParameter ? reach_named_parameter(w, i, base, bytes, use, out)
                                                 : false;
  for (int lane = 0; lane < kWarp && !done; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    uint64_t address = (wide ? w.in<uint64_t>(base)[lane] : w.in<uint32_t>(base)[lane]) + base.plus;
    Space at = space;
    if (space == Space::kGeneric) at = space_of(address);
    if (space == Space::kParameter && space_of(address) == Space::kLocal) at = Space::kLocal;  // a function's argument
    if (at != space && at == Space::kShared) address -= kSharedWindow;
    if (at != space && at == Space::kLocal) address -= kLocalWindow;
    if (at != space && at == Space::kParameter) address -= kParameterWindow;
    const uint32_t bit = 1u << lane;
    bool defined = true;
    out.address[lane] = address;
    if (at == Space::kGlobal) {
      out.global |= bit;
      if (use != Use::kRead && !(written & bit))
        w.finding(i, lane,
                  "stores a value to global memory that was never written, or comes from something that was not" +
                      w.launch->order.undefined_load());
      out.at[lane] = reach_global(w, i, lane, address, bytes, use, defined);
    } else if (at == Space::kShared) {
      out.shared |= bit;
      if (!wide) address = static_cast<uint32_t>(address);
      SharedMemory& shared = w.block->shared;
      shared.check_bounds(w, i, lane, static_cast<int64_t>(address), bytes, bytes);
      out.at[lane] = shared.data() + address;
      out.address[lane] = address;
      const auto byte = static_cast<int64_t>(address);
      if (use == Use::kUpdate) shared.check_update(w, i, lane, byte, bytes);
      if (use == Use::kRead) defined = shared.check_read(w, i, lane, byte, bytes);
      if (use == Use::kWrite) {
        const uint8_t* value = data == nullptr ? nullptr : data + lane * bytes;
        shared.check_write(w, i, lane, byte, bytes, written & bit ? kWritten : kUndefined, value);
        if (value != nullptr) copy_small(out.at[lane], value, bytes);
      }
    } else if (at == Space::kLocal) {
      out.local |= bit;
      out.at[lane] = reach_local(w, i, lane, address, bytes, use, written & bit, defined);
    } else {
      out.at[lane] = reach_parameter(w, i, lane, address, bytes, use);
    }
    if (!defined) out.defined &= ~bit;
  }
  if (out.global) {
    uint32_t undefined = 0;
    w.launch->order.access(w, i, out.address.data(), out.global, bytes, use, data, out.load ? &undefined : nullptr);
    out.defined &= ~undefined;
    LineCount& line = w.launch->line(i);
    line.instructions += 1;
    line.sectors += w.launch->memory->count(out.address.data(), out.global, bytes, use != Use::kRead);
    line.ideal_sectors += (__builtin_popcount(out.global) * bytes + kSector - 1) / kSector;
  }
  if (out.shared) {
    LineCount& line = w.launch->line(i);
    const Rounds rounds = bank_rounds(out.address.data(), out.shared, bytes);
    line.instructions += 1;
    line.wavefronts += rounds.wavefronts;
    line.ideal += rounds.ideal;
  }
}

namespace {

// One element of each lane's access, stored as wide as the register is: signed types are widened with their sign.
template <class T>
void put_element(Warp& w, const Instruction& i, const Slot& slot, const T* values, uint32_t defined) {
  if (slot.absent) return;
  const auto store = [&](auto wide) {
    using Wide = decltype(wide);
    if constexpr (sizeof(Wide) == sizeof(T)) return w.put(i, slot, reinterpret_cast<const Wide*>(values), defined);
    alignas(64) Wide out[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = static_cast<Wide>(static_cast<int64_t>(values[lane]));
    w.put(i, slot, out, defined);
  };
  switch (lane_bytes(slot.type)) {
    case 2:
      return store(uint16_t{});
    case 4:
      return store(uint32_t{});
    default:
      return store(uint64_t{});
  }
}

// The lanes whose bytes from `offset` on are defined, of an access of which some are not.
uint32_t defined_within(const Warp& w, const Reached& r, int offset, int bytes) {
  uint32_t lanes = r.defined;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t bit = 1u << lane;
    if (!(w.active & bit) || (lanes & bit)) continue;
    const auto at = static_cast<int64_t>(r.address[lane]) + offset;
    if (r.shared & bit && w.block->shared.is_defined(at, bytes)) lanes |= bit;
    if (r.local & bit) {
      const uint8_t* first = w.local_written.data() + lane * w.launch->program->local_bytes + at;
      if (std::all_of(first, first + bytes, [](uint8_t known) { return known != 0; })) lanes |= bit;
    }
  }
  return lanes;
}

template <class T>
void run_load(Warp& w, const Instruction& i) {
  constexpr int kSize = sizeof(T);
  const int elements = i.part[0].count;
  Reached r;
  r.load = true;
  reach(w, i, i.at(1), static_cast<Space>(i.flags), kSize * elements, Use::kRead, 0, nullptr, r);
  const bool whole = r.defined == w.active;
  for (int e = 0; e < elements; ++e) {
    alignas(64) T values[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane)
      if (w.active >> lane & 1) std::memcpy(&values[lane], r.at[lane] + e * kSize, kSize);
    const Slot& to = i.at(0, e);
    put_element(w, i, to, values, whole ? r.defined : defined_within(w, r, e * kSize, kSize));
    if (whole || to.absent || lane_bytes(to.type) != kSize) continue;
    for (int byte = 0; byte < kSize; ++byte) w.note_part(to, 8 * byte, 8, defined_within(w, r, e * kSize + byte, 1));
  }
}

// Of a store to shared or local memory of which a part is undefined: marks the part that is defined.
void mark_defined(Warp& w, const Reached& r, uint32_t lanes, int offset, int bytes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active & lanes & (r.shared | r.local) & 1u << lane)) continue;
    const auto at = static_cast<int64_t>(r.address[lane]) + offset;
    if (r.shared >> lane & 1) w.block->shared.set_state(at, bytes, kWritten);
    if (r.local >> lane & 1)
      std::memset(w.local_written.data() + lane * w.launch->program->local_bytes + at, 1, static_cast<size_t>(bytes));
  }
}

template <class T>
void run_store(Warp& w, const Instruction& i) {
  constexpr int kSize = sizeof(T), kMost = 32;
  const int elements = i.part[1].count, bytes = kSize * elements;
  alignas(16) uint8_t data[kWarp * kMost];
  uint32_t defined = kAllLanes;
  for (int e = 0; e < elements; ++e) {
    const Slot& slot = i.at(1, e);
    defined &= w.defined(i, slot, 0, 8 * kSize);
    const bool as_wide = lane_bytes(slot.type) == kSize;
    const T* values = w.in<T>(slot);
    for (int lane = 0; lane < kWarp; ++lane) {
      const T value = as_wide ? values[lane] : static_cast<T>(w.value(slot, lane));
      std::memcpy(data + lane * bytes + e * kSize, &value, kSize);
    }
  }
  Reached r;
  reach(w, i, i.at(0), static_cast<Space>(i.flags), bytes, Use::kWrite, defined, data, r);
  for (int lane = 0; lane < kWarp; ++lane)
    if (w.active >> lane & 1) copy_small(r.at[lane], data + lane * bytes, bytes);
  const uint32_t partly = w.active & ~defined;
  if (partly == 0) return;
  for (int e = 0; e < elements; ++e) {
    const Slot& slot = i.at(1, e);
    for (int byte = 0; byte < kSize; ++byte)
      mark_defined(w, r, partly & w.defined(i, slot, 8 * byte, 8), e * kSize + byte, 1);
  }
}

void run_prefetch(Warp&, const Instruction&) {
}

void run_policy(Warp& w, const Instruction& i) {
  const uint64_t zero[kWarp] = {};
  w.put(i, i.at(0), zero, kAllLanes);
}

template <template <class> class F>
Run by_width(Type type) {
  switch (type) {
    case Type::kB8:
    case Type::kU8:
      return F<uint8_t>::kRun;
    case Type::kS8:
      return F<int8_t>::kRun;
    case Type::kB16:
    case Type::kU16:
    case Type::kF16:
    case Type::kBF16:
      return F<uint16_t>::kRun;
    case Type::kS16:
      return F<int16_t>::kRun;
    case Type::kS32:
      return F<int32_t>::kRun;
    case Type::kPred:
    case Type::kNone:
    case Type::kB128:
      return nullptr;
    default:
      return bytes_of(type) == 4 ? F<uint32_t>::kRun : F<uint64_t>::kRun;
  }
}

template <class T>
struct Load {
  static constexpr Run kRun = run_load<T>;
};
template <class T>
struct Store {
  static constexpr Run kRun = run_store<T>;
};

}  // namespace

Space take_space(Modifiers& m) {
  if (m.take("global") || m.take("const")) return Space::kGlobal;
  if (m.take("shared") || m.take("shared::cta") || m.take("shared::cluster")) return Space::kShared;
  if (m.take("local")) return Space::kLocal;
  if (m.take("param") || m.take("param::entry") || m.take("param::func")) return Space::kParameter;
  return Space::kGeneric;
}

uint8_t take_order(Modifiers& m) {
  const std::string order = m.take_one({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"});
  const std::string scope = m.take_one({"cta", "cluster", "gpu", "sys"});
  const bool coherent = !m.take("nc");
  m.take_one({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  m.take_one({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
  m.take_one({"L2::evict_last", "L2::evict_first", "L2::evict_normal"});
  m.take_one({"L2::64B", "L2::128B", "L2::256B"});
  uint8_t promised = coherent ? 0 : kNonCoherent;
  if (!order.empty() && order != "weak") promised |= kStrong;
  if (order == "acquire" || order == "acq_rel") promised |= kAcquire;
  if (order == "release" || order == "acq_rel") promised |= kRelease;
  if (scope != "cta" && scope != "cluster")
    promised |= kAllBlocks;  // atom and red have the GPU's scope if none is named
  return promised;
}

Form decode_access(Modifiers& m) {
  Form f;
  const std::string& name = m.name();
  if (name == "prefetch" || name == "prefetchu" || name == "applypriority" || name == "discard") {
    take_space(m);
    m.take_one({"L1", "L2", "L2::evict_last", "L2::evict_normal"});
    f.run = run_prefetch;
    f.wants = {{Want::kMemory}};
    return f;
  }
  if (name == "createpolicy") {
    if (!m.take("fractional")) return f;
    m.take_one({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
    m.take_one({"L2::evict_first", "L2::evict_unchanged"});
    m.take("b64");
    f.run = run_policy;
    f.wants = {{Want::kWrite, Type::kB64}, {Want::kRead, Type::kF32, true}};
    return f;
  }
  const bool hint = m.take("L2::cache_hint");
  const Space space = take_space(m);
  f.order = take_order(m);
  const std::string vector = m.take_one({"v2", "v4", "v8"});
  const Type type = m.take_type();
  f.flags = static_cast<uint32_t>(space);
  const auto elements = static_cast<uint16_t>(vector.empty() ? 1 : vector[1] - '0');
  const int bytes = bytes_of(type) * elements;
  if (bytes > 32) return f;
  if (name == "st") {
    f.run = by_width<Store>(type);
    f.wants = {{Want::kMemory}, {Want::kReadMany, type, false, true, false, elements}};
  } else {
    f.run = by_width<Load>(type);
    f.wants = {{Want::kWriteMany, type, false, true, false, elements}, {Want::kMemory}};
  }
  if (hint) f.wants.push_back({Want::kRead, Type::kB64});
  return f;
}

}  // namespace ptx
