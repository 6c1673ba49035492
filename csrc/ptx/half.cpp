// Floating-point arithmetic of f16, bf16 and pairs of them. Each result is the exact value, rounded once.

#include <emulator/product.h>

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

// The most frequent instructions of bf16 and f16 code: sums, products and fma, to nearest, without a modifier. All of
// them are an fma, a * 1 + b or a * b - 0.

// By lane a * b + c, rounded to odd in fp32: by way of the sum in double, whose error says where the exact value is.
// Loops of few steps and without branches, which become vector instructions.
void fma_odd_32(const float* a, const float* b, const float* c, uint32_t* out) {
  alignas(64) double sum[kWarp], error[kWarp];
  alignas(64) float narrow[kWarp];
  alignas(64) int64_t step[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const double first = static_cast<double>(a[lane]) * static_cast<double>(b[lane]), second = c[lane];
    const double both = first + second, part = both - first;
    sum[lane] = both;
    error[lane] = (first - (both - part)) + (second - part);
    narrow[lane] = static_cast<float>(both);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const double rest = (sum[lane] - static_cast<double>(narrow[lane])) + error[lane];
    const uint64_t apart = (bit_cast<uint64_t>(rest) ^ bit_cast<uint64_t>(sum[lane])) >> 63;
    step[lane] = rest == 0 ? 0 : 1 - 2 * static_cast<int64_t>(apart);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto bits = bit_cast<uint32_t>(narrow[lane]);
    const bool even = (bits & 0x7f800000) != 0x7f800000 && !(bits & 1);
    out[lane] = bits + (even ? static_cast<uint32_t>(step[lane]) : 0);
  }
}

// An operation on its sources, by lane.
template <bool kBrain, FloatOp kOp>
void fuse_16(const uint16_t* x, const uint16_t* y, const uint16_t* z, uint16_t* out) {
  constexpr uint16_t kOne = kBrain ? 0x3f80 : 0x3c00, kMinusZero = 0x8000;
  alignas(64) float a[kWarp], b[kWarp], c[kWarp];
  alignas(64) uint32_t odd[kWarp];
  const auto widen = [](uint16_t raw) { return kBrain ? float_of_bf16(raw) : emulator::float_of_half(raw); };
  for (int lane = 0; lane < kWarp; ++lane) {
    constexpr bool kSums = kOp == FloatOp::kAdd || kOp == FloatOp::kSub;
    const uint16_t term = kOp == FloatOp::kSub ? y[lane] ^ 0x8000 : kOp == FloatOp::kAdd ? y[lane] : z[lane];
    a[lane] = widen(x[lane]);
    b[lane] = widen(kSums ? kOne : y[lane]);
    c[lane] = widen(kOp == FloatOp::kMul ? kMinusZero : term);
  }
  fma_odd_32(a, b, c, odd);
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto value = bit_cast<float>(odd[lane]);
    out[lane] = kBrain ? bf16_of(value) : f16_of_float(value);
  }
}
template <bool kBrain, FloatOp kOp>
void run_fused_16(Warp& w, const Instruction& i) {
  alignas(64) uint16_t out[kWarp];
  const uint16_t* in[3];
  const uint32_t defined = sources_of(w, i, in);
  fuse_16<kBrain, kOp>(in[0], in[1], in[2], out);
  w.put(i, i.slot[0], out, defined);
}
template <bool kBrain, FloatOp kOp>
void run_fused_pair(Warp& w, const Instruction& i) {
  const Halves halves(w, i);
  const uint32_t* in[3];
  const uint32_t defined = sources_of(w, i, in);
  alignas(64) uint16_t part[3][kWarp], result[2][kWarp];
  alignas(64) uint32_t out[kWarp];
  for (int half = 0; half < 2; ++half) {
    for (int source = 0; source < 3; ++source)
      for (int lane = 0; lane < kWarp; ++lane)
        part[source][lane] = static_cast<uint16_t>(in[source][lane] >> 16 * half);
    fuse_16<kBrain, kOp>(part[0], part[1], part[2], result[half]);
  }
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = uint32_t{result[0][lane]} | uint32_t{result[1][lane]} << 16;
  w.put(i, i.slot[0], out, defined);
  halves.keep(w, i.slot[0]);
}
template <bool kBrain>
Run fast_fused(FloatOp op, bool pair) {
  switch (op) {
    case FloatOp::kAdd:
      return pair ? run_fused_pair<kBrain, FloatOp::kAdd> : run_fused_16<kBrain, FloatOp::kAdd>;
    case FloatOp::kSub:
      return pair ? run_fused_pair<kBrain, FloatOp::kSub> : run_fused_16<kBrain, FloatOp::kSub>;
    case FloatOp::kMul:
      return pair ? run_fused_pair<kBrain, FloatOp::kMul> : run_fused_16<kBrain, FloatOp::kMul>;
    case FloatOp::kFma:
      return pair ? run_fused_pair<kBrain, FloatOp::kFma> : run_fused_16<kBrain, FloatOp::kFma>;
    default:
      return nullptr;
  }
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
  const bool brain = type == Type::kBF16 || type == Type::kBF16x2;
  if (flags == 0)
    if (const Run run = brain ? fast_fused<true>(op, pair) : fast_fused<false>(op, pair)) return run;
  if (const Run run = brain ? fast_extreme<true>(op, flags, pair) : fast_extreme<false>(op, flags, pair)) return run;
  if (brain) return pair ? run_pair_16<true> : run_16<true>;
  return pair ? run_pair_16<false> : run_16<false>;
}

}  // namespace ptx
