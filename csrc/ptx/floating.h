// What floating.cpp and half.cpp share: the operations, and their exact values.
#pragma once

#include "apply.h"
#include "numbers.h"

namespace ptx {

enum FloatFlag : uint32_t {
  kFtz = 1,
  kSat = 2,
  kRelu = 4,
  kNan = 8,
  kXorSign = 16,
  kAbs = 32,
  kApprox = 64,
  kFull = 128
};
enum class FloatOp : uint8_t {
  kAdd,
  kSub,
  kMul,
  kFma,
  kDiv,
  kRcp,
  kSqrt,
  kRsqrt,
  kMin,
  kMax,
  kAbs,
  kNeg,
  kSin,
  kCos,
  kLg2,
  kEx2,
  kTanh,
};

// Instruction::number holds the operation and the rounding.
inline FloatOp op_of(const Instruction& i) {
  return static_cast<FloatOp>(i.number & 0xff);
}
inline Round round_of(const Instruction& i) {
  return static_cast<Round>(i.number >> 8);
}

// The exact value, or that rounded to odd, of formats of at most 24 bits.
double evaluate(FloatOp op, uint32_t flags, double a, double b, double c);

// The one to three sources of an instruction; those that it does not have repeat the first. Returns in which lanes all
// are defined.
template <class S>
uint32_t sources_of(Warp& w, const Instruction& i, const S* (&in)[3]) {
  uint32_t defined = kAllLanes;
  for (int s = 0; s < 3; ++s) {
    const Slot& slot = i.slot[s < i.parts - 1 ? s + 1 : 1];
    in[s] = w.in<S>(slot);
    defined &= w.defined(i, slot);
  }
  return defined;
}

// d = f(a, b, c) of these.
template <class D, class S, class F>
void apply_any(Warp& w, const Instruction& i, F f) {
  const S* in[3];
  const uint32_t defined = sources_of(w, i, in);
  alignas(64) D out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = f(in[0][lane], in[1][lane], in[2][lane]);
  w.put(i, i.slot[0], out, defined);
}

// half.cpp: how f16, bf16 and pairs of them execute an operation.
Run half_run(FloatOp op, Type type, uint32_t flags);

}  // namespace ptx
