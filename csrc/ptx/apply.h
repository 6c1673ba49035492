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

// Of an instruction that treats the two halves of 32 bits apart: in which lanes each half of the result is defined. To
// be asked before the result is stored, and kept after.
struct Halves {
  uint32_t lanes[2] = {kAllLanes, kAllLanes};
  Halves(Warp& w, const Instruction& i) {
    for (int source = 1; source < i.parts; ++source)
      for (int half = 0; half < 2; ++half) lanes[half] &= w.defined_part(i, i.slot[source], half);
  }
  void keep(Warp& w, const Instruction& i) const {
    if ((w.active & ~(lanes[0] & lanes[1])) == 0) return;
    for (int half = 0; half < 2; ++half) w.know_part(i.slot[0], half, lanes[half]);
  }
};

// Operands in the order in which most families write them.
inline std::vector<Want> wants(Type d, std::initializer_list<Type> sources) {
  std::vector<Want> all{{Want::kWrite, d}};
  for (Type type : sources) all.push_back({Want::kRead, type});
  return all;
}

// Calls f with a value of the C++ type of an integer type of PTX; bits count as unsigned. Returns null for others.
template <class F>
Run for_integer(Type type, F f) {
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
      return nullptr;
  }
}

}  // namespace ptx
