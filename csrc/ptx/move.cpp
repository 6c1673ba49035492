// mov, cvta, isspacep: values from register to register, packed and unpacked.

#include <cstring>

#include "access.h"
#include "apply.h"
#include "asynchronous.h"
#include "families.h"

namespace ptx {
namespace {

template <class T>
void run_move(Warp& w, const Instruction& i) {
  const Slot &to = i.slot[0], &from = i.slot[1];
  if (sizeof(T) == 4 && w.pending_registers > 0 && (w.pending[from.reg] & w.active) && move_accumulator(w, i)) return;
  const uint32_t defined = w.defined(i, from);
  if ((w.active & ~defined) == 0) return w.put(i, to, w.in<T>(from), defined);
  T bits[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) bits[lane] = w.undefined_in<T>(from, lane);
  w.put(i, to, w.in<T>(from), defined);
  w.note_bits(to, bits);
}

void run_move_predicate(Warp& w, const Instruction& i) {
  w.put_mask(i, i.slot[0], w.mask(i.slot[1]), w.defined(i, i.slot[1]));
}

// mov.b64 {a, b}, c and mov.b64 c, {a, b}: the first element has the lowest bits.
void run_repack(Warp& w, const Instruction& i) {
  uint64_t bits[kWarp] = {}, undefined[kWarp] = {};
  uint32_t defined = kAllLanes;
  for (int e = 0; e < i.part[1].count; ++e) {
    const Slot& slot = i.at(1, e);
    const int width = static_cast<int>(i.number) / i.part[1].count;
    const uint64_t mask = bit_field(0, width);
    for (int lane = 0; lane < kWarp; ++lane) bits[lane] |= (w.value(slot, lane) & mask) << width * e % 64;
    const uint32_t has = w.defined(i, slot);
    defined &= has;
    for (int lane = 0; lane < kWarp && (w.active & ~has) != 0; ++lane)
      undefined[lane] |= (w.undefined_value(slot, lane) & mask) << width * e % 64;
  }
  const bool partly = (w.active & ~defined) != 0;
  for (int e = 0; e < i.part[0].count; ++e) {
    const Slot& slot = i.at(0, e);
    if (slot.absent) continue;
    const int width = static_cast<int>(i.number) / i.part[0].count;
    const auto store = [&](auto narrow) {
      using T = decltype(narrow);
      T out[kWarp], unknown[kWarp];
      const auto element = [&](uint64_t all) { return static_cast<T>(all >> width * e % 64 & bit_field(0, width)); };
      for (int lane = 0; lane < kWarp; ++lane) {
        out[lane] = element(bits[lane]);
        unknown[lane] = element(undefined[lane]);
      }
      w.put(i, slot, out, defined);
      if (partly) w.note_bits(slot, unknown);
    };
    if (width <= 16) {
      store(uint16_t{});
    } else if (width == 32) {
      store(uint32_t{});
    } else {
      store(uint64_t{});
    }
  }
}

// Adds or takes away a window. Registers may have 32 bits where the state space needs no more.
void run_convert_address(Warp& w, const Instruction& i) {
  const auto window = static_cast<uint64_t>(i.number);
  const auto to = [&](auto narrow) {
    using T = decltype(narrow);
    apply<T, T>(w, i, [window](T a) { return static_cast<T>(a + window); });
  };
  if (bytes_of(i.type) == 8) return to(uint64_t{});
  to(uint32_t{});
}

void run_is_space(Warp& w, const Instruction& i) {
  uint32_t inside = 0;
  const uint64_t* a = w.in<uint64_t>(i.slot[1]);
  for (int lane = 0; lane < kWarp; ++lane)
    inside |= static_cast<uint32_t>(a[lane] / kWindow == static_cast<uint64_t>(i.number)) << lane;
  w.put_mask(i, i.slot[0], inside, w.defined(i, i.slot[1]));
}

uint64_t window_of(Space space) {
  switch (space) {
    case Space::kShared:
      return kSharedWindow;
    case Space::kLocal:
      return kLocalWindow;
    case Space::kParameter:
      return kParameterWindow;
    default:
      return 0;  // addresses of global memory are generic ones
  }
}

}  // namespace

Form decode_move(Modifiers& m) {
  Form f;
  const std::string& name = m.name();
  if (name == "cvta") {
    const bool back = m.take("to");
    const uint64_t window = window_of(take_space(m));
    f.type = m.take_type();
    f.number = static_cast<int64_t>(back ? -window : window);
    if (f.type == Type::kU64 || (f.type == Type::kU32 && window == 0)) f.run = run_convert_address;
    f.wants = wants(f.type, {f.type});
    return f;
  }
  if (name == "isspacep") {
    const Space space = take_space(m);
    f.number = static_cast<int64_t>(space == Space::kParameter ? 3 : window_of(space) / kWindow);
    f.run = run_is_space;
    f.wants = wants(Type::kPred, {Type::kB64});
    return f;
  }
  const Type type = m.take_type();
  f.type = type;
  f.number = 8 * bytes_of(type);
  if (type == Type::kPred) {
    f.run = run_move_predicate;
    f.wants = wants(type, {type});
    return f;
  }
  const int bytes = bytes_of(type);
  f.plain = bytes == 2   ? run_move<uint16_t>
            : bytes == 4 ? run_move<uint32_t>
            : bytes == 8 ? run_move<uint64_t>
                         : nullptr;
  if (f.plain != nullptr) f.run = run_repack;
  f.wants = {{Want::kWriteMany, type, false, false, true}, {Want::kReadMany, type, false, false, true}};
  return f;
}

}  // namespace ptx
