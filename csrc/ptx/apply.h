// Loops over the lanes of a warp, for instructions that treat each lane alike.
#pragma once

#include <type_traits>

#include "warp.h"

namespace ptx {

// d = f(a), d = f(a, b), d = f(a, b, c) for 32 lanes. All lanes are computed, also those that do not execute the
// instruction: f must accept any value.
template <class D, class A, class F>
inline void apply(Warp& w, const Instruction& i, F f) {
  const A* a = w.in<A>(i.slot[1]);
  alignas(64) D out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = f(a[lane]);
  w.put(i, i.slot[0], out, w.defined(i, i.slot[1]));
}

template <class D, class A, class B, class F>
inline void apply(Warp& w, const Instruction& i, F f) {
  const A* a = w.in<A>(i.slot[1]);
  const B* b = w.in<B>(i.slot[2]);
  alignas(64) D out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = f(a[lane], b[lane]);
  w.put(i, i.slot[0], out, w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]));
}

template <class D, class A, class B, class C, class F>
inline void apply(Warp& w, const Instruction& i, F f) {
  const A* a = w.in<A>(i.slot[1]);
  const B* b = w.in<B>(i.slot[2]);
  const C* c = w.in<C>(i.slot[3]);
  alignas(64) D out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = f(a[lane], b[lane], c[lane]);
  w.put(i, i.slot[0], out, w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]) & w.defined(i, i.slot[3]));
}

// ---- undefined bits ----

// An operand that may have undefined bits; its value is 0 there.
template <class T>
struct Partial {
  T value, undefined;
  Partial(const Warp& w, const Slot& s, int lane) : undefined(w.undefined_in<T>(s, lane)) {
    value = static_cast<T>(w.in<T>(s)[lane] & ~undefined);
  }
};

// apply(), for a result of which some bits may be defined where others are not: `undefined` returns those that are not,
// of operands that are Partial. It is called only where an operand is not wholly defined.
template <class D, class A, class F, class G>
inline void apply_bits(Warp& w, const Instruction& i, F f, G undefined) {
  if ((w.active & ~w.written[i.slot[1].reg]) == 0) return apply<D, A>(w, i, f);
  D bits[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) bits[lane] = undefined(Partial<A>(w, i.slot[1], lane));
  apply<D, A>(w, i, f);
  w.note_bits(i.slot[0], bits);
}

template <class D, class A, class B, class F, class G>
inline void apply_bits(Warp& w, const Instruction& i, F f, G undefined) {
  if ((w.active & ~(w.written[i.slot[1].reg] & w.written[i.slot[2].reg])) == 0) return apply<D, A, B>(w, i, f);
  D bits[kWarp];
  for (int lane = 0; lane < kWarp; ++lane)
    bits[lane] = undefined(Partial<A>(w, i.slot[1], lane), Partial<B>(w, i.slot[2], lane));
  apply<D, A, B>(w, i, f);
  w.note_bits(i.slot[0], bits);
}

template <class D, class A, class B, class C, class F, class G>
inline void apply_bits(Warp& w, const Instruction& i, F f, G undefined) {
  const uint32_t defined = w.written[i.slot[1].reg] & w.written[i.slot[2].reg] & w.written[i.slot[3].reg];
  if ((w.active & ~defined) == 0) return apply<D, A, B, C>(w, i, f);
  D bits[kWarp];
  for (int lane = 0; lane < kWarp; ++lane)
    bits[lane] =
        undefined(Partial<A>(w, i.slot[1], lane), Partial<B>(w, i.slot[2], lane), Partial<C>(w, i.slot[3], lane));
  apply<D, A, B, C>(w, i, f);
  w.note_bits(i.slot[0], bits);
}

// Carries go up: of a sum or product, no bit below the lowest undefined one of its operands is undefined.
template <class D, class... P>
D carried(const P&... operands) {
  uint64_t bits = 0;
  for (const uint64_t undefined : {static_cast<uint64_t>(operands.undefined)...}) bits |= undefined;
  return static_cast<D>(bits | (0 - bits));
}

// The lanes in which `and` (or `or`, if not `conjunction`) of two predicates is defined: a false (true) operand decides
// it alone, even if the other is undefined.
inline uint32_t defined_logic(bool conjunction, uint32_t a, uint32_t has_a, uint32_t b, uint32_t has_b) {
  const uint32_t decides_a = conjunction ? ~a : a, decides_b = conjunction ? ~b : b;
  return (has_a & has_b) | (has_a & decides_a) | (has_b & decides_b);
}

// Of an instruction that treats the two halves of 32 bits apart: in which lanes each half of the result is defined. To
// be asked before the result is stored, and kept after.
struct Halves {
  uint32_t lanes[2] = {kAllLanes, kAllLanes};
  Halves() = default;
  Halves(Warp& w, const Instruction& i) {
    for (int source = 1; source < i.parts; ++source)
      for (int half = 0; half < 2; ++half) lanes[half] &= w.defined(i, i.slot[source], 16 * half, 16);
  }
  void keep(Warp& w, const Slot& to) const {
    if ((w.active & ~(lanes[0] & lanes[1])) == 0) return;
    for (int half = 0; half < 2; ++half) w.note_part(to, 16 * half, 16, lanes[half]);
  }
};

// Operands in the order in which most families write them.
inline std::vector<Want> wants(Type d, std::initializer_list<Type> sources) {
  std::vector<Want> all{{Want::kWrite, d}};
  for (Type type : sources) all.push_back({Want::kRead, type});
  return all;
}

// Calls f with a value of the C++ type of an integer type of PTX; bits count as unsigned. Returns null or 0 for others.
template <class F>
auto for_integer(Type type, F f) -> decltype(f(int32_t{})) {
  switch (type) {
    case Type::kS16:
      return f(int16_t{});
    case Type::kU16:
    case Type::kB16:
      return f(uint16_t{});
    case Type::kS32:
      return f(int32_t{});
    case Type::kU32:
    case Type::kB32:
      return f(uint32_t{});
    case Type::kS64:
      return f(int64_t{});
    case Type::kU64:
    case Type::kB64:
      return f(uint64_t{});
    default:
      return {};
  }
}

}  // namespace ptx
