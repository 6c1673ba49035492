// Floating-point arithmetic of f16, bf16 and pairs of them. Each result is the exact value, rounded once.

#include "floating.h"

namespace ptx {
namespace {

template <bool kBrain>
struct Half {
  static double widen(uint16_t bits, bool flush) {
    if (flush && (bits & (kBrain ? 0x7f80 : 0x7c00)) == 0) bits &= 0x8000;
    return kBrain ? float_of_bf16(bits) : float_of_f16(bits);
  }
  static uint16_t narrow(double value, uint32_t flags, Round round) {
    if (std::isnan(value)) return flags & kSat ? 0 : kNan16;
    if ((flags & kSat) && !(value > 0)) return 0;
    if ((flags & kSat) && value > 1) value = 1;
    if ((flags & kRelu) && !(value > 0)) return 0;
    auto bits = static_cast<uint16_t>(round_to(kBrain ? kFormatB16 : kFormat16, value, round));
    if ((flags & kFtz) && (bits & (kBrain ? 0x7f80 : 0x7c00)) == 0) bits &= 0x8000;
    return bits;
  }
  static uint16_t sign(FloatOp op, uint16_t a) {
    return op == FloatOp::kAbs ? a & 0x7fff : a ^ 0x8000;
  }
};

template <bool kBrain>
uint16_t half_op(FloatOp op, uint32_t flags, Round round, uint16_t a, uint16_t b, uint16_t c) {
  using H = Half<kBrain>;
  const bool flush = flags & kFtz;
  if (op == FloatOp::kAbs || op == FloatOp::kNeg) return H::sign(op, a);
  return H::narrow(evaluate(op, flags, H::widen(a, flush), H::widen(b, flush), H::widen(c, flush)), flags, round);
}

// The most frequent instructions of bf16 code, which sm_80 also uses for sums and products.
uint16_t fma_b16(uint16_t a, uint16_t b, uint16_t c) {
  return bf16_of_odd(fma_odd(float_of_bf16(a), float_of_bf16(b), float_of_bf16(c)));
}
void run_fma_b16(Warp& w, const Instruction& i) {
  apply<uint16_t, uint16_t, uint16_t, uint16_t>(w, i, fma_b16);
}
void run_fma_pair_b16(Warp& w, const Instruction& i) {
  const Halves halves(w, i);
  apply<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
    const uint16_t low = fma_b16(static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c));
    const uint16_t high =
        fma_b16(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16), static_cast<uint16_t>(c >> 16));
    return uint32_t{low} | uint32_t{high} << 16;
  });
  halves.keep(w, i.slot[0]);
}

// Of two numbers of 16 bits, by comparing the bits as integers with a sign.
template <bool kBrain, bool kMax, bool kKeepNan>
uint16_t extreme_16(uint16_t a, uint16_t b) {
  constexpr int kInfinity = kBrain ? 0x7f80 : 0x7c00;
  const int size_a = a & 0x7fff, size_b = b & 0x7fff;
  const int key_a = a & 0x8000 ? -size_a : size_a, key_b = b & 0x8000 ? -size_b : size_b;
  const bool nan_a = size_a > kInfinity, nan_b = size_b > kInfinity;
  const auto equal = static_cast<uint16_t>(kMax ? a & b : a | b);  // of two zeros
  const uint16_t chosen = key_a == key_b ? equal : (kMax ? key_a > key_b : key_a < key_b) ? a : b;
  const uint16_t with_nan = kKeepNan || (nan_a && nan_b) ? kNan16 : nan_a ? b : a;
  return nan_a || nan_b ? with_nan : chosen;
}
template <bool kBrain, bool kMax, bool kKeepNan>
void run_extreme_16(Warp& w, const Instruction& i) {
  apply<uint16_t, uint16_t, uint16_t>(w, i, extreme_16<kBrain, kMax, kKeepNan>);
}
template <bool kBrain, bool kMax, bool kKeepNan>
void run_extreme_pair(Warp& w, const Instruction& i) {
  const Halves halves(w, i);
  apply<uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b) {
    const auto pick = extreme_16<kBrain, kMax, kKeepNan>;
    return uint32_t{pick(static_cast<uint16_t>(a), static_cast<uint16_t>(b))} |
           uint32_t{pick(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16))} << 16;
  });
  halves.keep(w, i.slot[0]);
}
template <bool kBrain>
Run fast_extreme(FloatOp op, uint32_t flags, bool pair) {
  if ((op != FloatOp::kMin && op != FloatOp::kMax) || (flags & ~static_cast<uint32_t>(kNan))) return nullptr;
  if (op == FloatOp::kMax)
    return flags ? (pair ? run_extreme_pair<kBrain, true, true> : run_extreme_16<kBrain, true, true>)
                 : (pair ? run_extreme_pair<kBrain, true, false> : run_extreme_16<kBrain, true, false>);
  return flags ? (pair ? run_extreme_pair<kBrain, false, true> : run_extreme_16<kBrain, false, true>)
               : (pair ? run_extreme_pair<kBrain, false, false> : run_extreme_16<kBrain, false, false>);
}

template <bool kBrain>
void run_16(Warp& w, const Instruction& i) {
  const FloatOp op = op_of(i);
  const Round round = round_of(i);
  const uint32_t flags = i.flags;
  apply_any<uint16_t, uint16_t>(
      w, i, [=](uint16_t a, uint16_t b, uint16_t c) { return half_op<kBrain>(op, flags, round, a, b, c); });
}
template <bool kBrain>
void run_pair_16(Warp& w, const Instruction& i) {
  const Halves halves(w, i);
  const FloatOp op = op_of(i);
  const Round round = round_of(i);
  const uint32_t flags = i.flags;
  apply_any<uint32_t, uint32_t>(w, i, [=](uint32_t a, uint32_t b, uint32_t c) {
    const auto low =
        half_op<kBrain>(op, flags, round, static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c));
    const auto high = half_op<kBrain>(op, flags, round, static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16),
                                      static_cast<uint16_t>(c >> 16));
    return uint32_t{low} | uint32_t{high} << 16;
  });
  halves.keep(w, i.slot[0]);
}

}  // namespace

Run half_run(FloatOp op, Type type, uint32_t flags) {
  const bool pair = type == Type::kF16x2 || type == Type::kBF16x2;
  if (type == Type::kF16 || type == Type::kF16x2) {
    if (const Run run = fast_extreme<false>(op, flags, pair)) return run;
    return pair ? run_pair_16<false> : run_16<false>;
  }
  if (const Run run = fast_extreme<true>(op, flags, pair)) return run;
  if (op == FloatOp::kFma && flags == 0) return pair ? run_fma_pair_b16 : run_fma_b16;
  return pair ? run_pair_16<true> : run_16<true>;
}

}  // namespace ptx
