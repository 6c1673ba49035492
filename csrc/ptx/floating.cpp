// Floating-point arithmetic of f32, f64, f16, bf16 and pairs of these.
//
// Exact to the bit: add, sub, mul, fma, mad, min, max, abs, neg, copysign, testp in every rounding, with .ftz, .sat and
// .relu; div, rcp and sqrt with a rounding (.rn and so on). Within the error that PTX documents, because they return
// the correctly rounded value: div.full (2 ulp there), div.approx (2 ulp), rcp.approx, rsqrt.approx, sqrt.approx (1
// ulp), ex2.approx, lg2.approx, sin.approx, cos.approx, tanh.approx.

#include <cfenv>

#include "apply.h"
#include "families.h"
#include "numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PTX_WITH_FMA __attribute__((target_clones("default", "fma")))
#else
#define PTX_WITH_FMA
#endif

namespace ptx {
namespace {

enum Flag : uint32_t { kFtz = 1, kSat = 2, kRelu = 4, kNan = 8, kXorSign = 16, kAbs = 32, kApprox = 64, kFull = 128 };
enum class Op : uint8_t {
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
Op op_of(const Instruction& i) {
  return static_cast<Op>(i.number & 0xff);
}
Round round_of(const Instruction& i) {
  return static_cast<Round>(i.number >> 8);
}

// The quotient and the root, rounded to odd: the remainder says on which side the exact value is.
double div_odd(double a, double b) {
  const double q = a / b;
  if (!std::isfinite(q) || q == 0 || !std::isfinite(b)) return q;
  const double remainder = std::fma(-q, b, a);
  return odd(q, b < 0 ? -remainder : remainder);
}
double sqrt_odd(double a) {
  const double root = std::sqrt(a);
  if (!std::isfinite(root) || root == 0) return root;
  return odd(root, std::fma(-root, root, a));
}

double extreme(double a, double b, bool greatest, bool keep_nan) {
  if (std::isnan(a)) return keep_nan ? a : b;
  if (std::isnan(b)) return keep_nan ? b : a;
  if (a == b) return std::signbit(a) == greatest ? b : a;  // +0 is above -0
  return (a > b) == greatest ? a : b;
}

// The exact value, or that rounded to odd, of formats of at most 24 bits.
double evaluate(Op op, uint32_t flags, double a, double b, double c) {
  switch (op) {
    case Op::kAdd:
      return add_odd(a, b);
    case Op::kSub:
      return add_odd(a, -b);
    case Op::kMul:
      return a * b;
    case Op::kFma:
      return fma_odd(a, b, c);
    case Op::kDiv:
      // Documented of div.approx: a divisor above 2^126 gives 0, or NaN from infinity.
      if ((flags & kApprox) && std::fabs(b) > 0x1p126 && std::isfinite(b))
        return std::isinf(a) ? std::nan("") : a * 0.0;
      return div_odd(a, b);
    case Op::kRcp:
      return div_odd(1.0, a);
    case Op::kSqrt:
      return sqrt_odd(a);
    case Op::kRsqrt:
      return 1.0 / std::sqrt(a);
    case Op::kMin:
    case Op::kMax: {
      const bool negative = std::signbit(a) != std::signbit(b);
      if (flags & kAbs) {
        a = std::fabs(a);
        b = std::fabs(b);
      }
      const double chosen = extreme(a, b, op == Op::kMax, flags & kNan);
      return flags & kXorSign ? std::copysign(chosen, negative ? -1.0 : 1.0) : chosen;
    }
    case Op::kAbs:
      return std::fabs(a);
    case Op::kNeg:
      return -a;
    case Op::kSin:
      return std::sin(a);
    case Op::kCos:
      return std::cos(a);
    case Op::kLg2:
      return std::log2(a);
    case Op::kEx2:
      return std::exp2(a);
    case Op::kTanh:
      return std::tanh(a);
  }
  return 0;
}

// Rounded down, a sum that is exactly zero is -0, unless both of its parts are +0.
double sum_rounded_down(Op op, double sum, double a, double b, double c) {
  if (sum != 0 || op > Op::kFma || op == Op::kMul) return sum;
  const double first = op == Op::kFma ? a * b : a, second = op == Op::kFma ? c : op == Op::kSub ? -b : b;
  const bool both = first == 0 && second == 0 && !std::signbit(first) && !std::signbit(second);
  return both ? 0.0 : -0.0;
}

// ---- f32 ----

template <class F>
void fast(Warp& w, const Instruction& i, F f) {
  apply<float, float, float>(w, i, [f](float a, float b) { return canonical(f(a, b)); });
}

PTX_WITH_FMA void multiply_add(float* out, const float* a, const float* b, const float* c) {
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = canonical(std::fma(a[lane], b[lane], c[lane]));
}

void run_add_32(Warp& w, const Instruction& i) {
  fast(w, i, [](float a, float b) { return a + b; });
}
void run_sub_32(Warp& w, const Instruction& i) {
  fast(w, i, [](float a, float b) { return a - b; });
}
void run_mul_32(Warp& w, const Instruction& i) {
  fast(w, i, [](float a, float b) { return a * b; });
}
void run_fma_32(Warp& w, const Instruction& i) {
  alignas(64) float out[kWarp];
  multiply_add(out, w.in<float>(i.slot[1]), w.in<float>(i.slot[2]), w.in<float>(i.slot[3]));
  w.put(i, i.slot[0], out, w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]) & w.defined(i, i.slot[3]));
}
template <bool kMax, bool kKeepNan>
void run_extreme_32(Warp& w, const Instruction& i) {
  apply<uint32_t, uint32_t, uint32_t>(w, i, [](uint32_t x, uint32_t y) {
    const auto a = bit_cast<float>(x), b = bit_cast<float>(y);
    // Of two zeros, the greater has the sign bit of both, the smaller that of either.
    const uint32_t equal = kMax ? x & y : x | y;
    const uint32_t chosen = a == b ? equal : (kMax ? a > b : a < b) ? x : y;
    const bool nan_a = a != a, nan_b = b != b;
    if (kKeepNan) return nan_a || nan_b ? kNan32 : chosen;
    return nan_a ? (nan_b ? kNan32 : y) : nan_b ? x : chosen;
  });
}
template <bool kAbsolute>
void run_sign_32(Warp& w, const Instruction& i) {
  apply<uint32_t, uint32_t>(w, i, [](uint32_t a) { return kAbsolute ? a & 0x7fffffff : a ^ 0x80000000; });
}

// Calls f(lane, values of up to three sources), for sources of a type that `load` widens.
template <class D, class S, class F>
void apply_any(Warp& w, const Instruction& i, F f) {
  const int sources = i.parts - 1;
  const S* in[3] = {};
  uint32_t defined = kAllLanes;
  for (int s = 0; s < 3; ++s) {
    const Slot& slot = i.slot[s < sources ? s + 1 : 1];
    in[s] = w.in<S>(slot);
    defined &= w.defined(i, slot);
  }
  alignas(64) D out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = f(in[0][lane], in[1][lane], in[2][lane]);
  w.put(i, i.slot[0], out, defined);
}

void run_32(Warp& w, const Instruction& i) {
  const Op op = op_of(i);
  const Round round = round_of(i);
  const uint32_t flags = i.flags;
  apply_any<float, float>(w, i, [=](float a, float b, float c) {
    if (flags & kFtz) {
      a = flushed(a);
      b = flushed(b);
      c = flushed(c);
    }
    double exact = evaluate(op, flags, a, b, c);
    if (round == Round::kDown) exact = sum_rounded_down(op, exact, a, b, c);
    float value = float_of(exact, round);
    if (flags & kFtz) value = flushed(value);
    return flags & kSat ? saturated(value) : value;
  });
}

void run_pair_32(Warp& w, const Instruction& i) {
  const Op op = op_of(i);
  const Round round = round_of(i);
  const uint32_t flags = i.flags;
  apply_any<uint64_t, uint64_t>(w, i, [=](uint64_t a, uint64_t b, uint64_t c) {
    uint64_t out = 0;
    for (int half = 0; half < 64; half += 32) {
      const auto part = [&](uint64_t v) {
        const auto value = bit_cast<float>(static_cast<uint32_t>(v >> half));
        return flags & kFtz ? flushed(value) : value;
      };
      double exact = evaluate(op, flags, part(a), part(b), part(c));
      if (round == Round::kDown) exact = sum_rounded_down(op, exact, part(a), part(b), part(c));
      float value = float_of(exact, round);
      if (flags & kFtz) value = flushed(value);
      out |= uint64_t{bit_cast<uint32_t>(value)} << half;
    }
    return out;
  });
}

// ---- f16 and bf16 ----

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
  static uint16_t sign(Op op, uint16_t a) {
    return op == Op::kAbs ? a & 0x7fff : a ^ 0x8000;
  }
};

template <bool kBrain>
uint16_t half_op(Op op, uint32_t flags, Round round, uint16_t a, uint16_t b, uint16_t c) {
  using H = Half<kBrain>;
  const bool flush = flags & kFtz;
  if (op == Op::kAbs || op == Op::kNeg) return H::sign(op, a);
  return H::narrow(evaluate(op, flags, H::widen(a, flush), H::widen(b, flush), H::widen(c, flush)), flags, round);
}

template <bool kBrain>
void run_16(Warp& w, const Instruction& i) {
  const Op op = op_of(i);
  const Round round = round_of(i);
  const uint32_t flags = i.flags;
  apply_any<uint16_t, uint16_t>(
      w, i, [=](uint16_t a, uint16_t b, uint16_t c) { return half_op<kBrain>(op, flags, round, a, b, c); });
}
template <bool kBrain>
void run_pair_16(Warp& w, const Instruction& i) {
  const Op op = op_of(i);
  const Round round = round_of(i);
  const uint32_t flags = i.flags;
  apply_any<uint32_t, uint32_t>(w, i, [=](uint32_t a, uint32_t b, uint32_t c) {
    const auto low =
        half_op<kBrain>(op, flags, round, static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c));
    const auto high = half_op<kBrain>(op, flags, round, static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16),
                                      static_cast<uint16_t>(c >> 16));
    return uint32_t{low} | uint32_t{high} << 16;
  });
}

// ---- f64 ----

// Rounds as an instruction says while it lives.
class Rounding {
 public:
  explicit Rounding(Round round) : before_(std::fegetround()) {
    std::fesetround(round == Round::kZero   ? FE_TOWARDZERO
                    : round == Round::kDown ? FE_DOWNWARD
                    : round == Round::kUp   ? FE_UPWARD
                                            : FE_TONEAREST);
  }
  ~Rounding() {
    std::fesetround(before_);
  }

 private:
  int before_;
};

double evaluate_64(Op op, uint32_t flags, double a, double b, double c) {
  volatile double x = a, y = b;  // not computed ahead, in another rounding
  switch (op) {
    case Op::kAdd:
      return x + y;
    case Op::kSub:
      return x - y;
    case Op::kMul:
      return x * y;
    case Op::kFma:
      return std::fma(x, y, c);
    case Op::kDiv:
      return x / y;
    case Op::kRcp:
      return 1.0 / x;
    case Op::kSqrt:
      return std::sqrt(x);
    default:
      return evaluate(op, flags, a, b, c);
  }
}

void run_64(Warp& w, const Instruction& i) {
  const Rounding rounding(round_of(i));
  const Op op = op_of(i);
  const uint32_t flags = i.flags;
  apply_any<double, double>(w, i, [=](double a, double b, double c) { return evaluate_64(op, flags, a, b, c); });
}

// ---- copysign and testp ----

template <class T>
void run_copysign(Warp& w, const Instruction& i) {
  constexpr T kSign = T{1} << (8 * sizeof(T) - 1);
  apply<T, T, T>(w, i, [](T a, T b) { return static_cast<T>((a & kSign) | (b & ~kSign)); });
}

enum Test : int64_t { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };
constexpr const char* kTests[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};

template <class T>
void run_test(Warp& w, const Instruction& i) {
  const T* a = w.in<T>(i.slot[1]);
  uint32_t holds = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int kind = std::fpclassify(a[lane]);
    const bool is = i.number == kFinite       ? kind != FP_INFINITE && kind != FP_NAN
                    : i.number == kInfinite   ? kind == FP_INFINITE
                    : i.number == kNumber     ? kind != FP_NAN
                    : i.number == kNotANumber ? kind == FP_NAN
                    : i.number == kNormal     ? kind == FP_NORMAL
                                              : kind == FP_SUBNORMAL;
    holds |= static_cast<uint32_t>(is) << lane;
  }
  w.put_mask(i, i.slot[0], holds, w.defined(i, i.slot[1]));
}

// ---- decoding ----

struct Known {
  const char* name;
  Op op;
  int sources;
};
constexpr Known kKnown[] = {
    {"add", Op::kAdd, 2}, {"sub", Op::kSub, 2}, {"mul", Op::kMul, 2},   {"fma", Op::kFma, 3},     {"mad", Op::kFma, 3},
    {"div", Op::kDiv, 2}, {"rcp", Op::kRcp, 1}, {"sqrt", Op::kSqrt, 1}, {"rsqrt", Op::kRsqrt, 1}, {"min", Op::kMin, 2},
    {"max", Op::kMax, 2}, {"abs", Op::kAbs, 1}, {"neg", Op::kNeg, 1},   {"sin", Op::kSin, 1},     {"cos", Op::kCos, 1},
    {"lg2", Op::kLg2, 1}, {"ex2", Op::kEx2, 1}, {"tanh", Op::kTanh, 1}};

Run fast_of(Op op, uint32_t flags) {
  if (flags & ~static_cast<uint32_t>(kNan)) return nullptr;
  const bool keep_nan = flags & kNan;
  switch (op) {
    case Op::kAdd:
      return run_add_32;
    case Op::kSub:
      return run_sub_32;
    case Op::kMul:
      return run_mul_32;
    case Op::kFma:
      return run_fma_32;
    case Op::kMax:
      return keep_nan ? run_extreme_32<true, true> : run_extreme_32<true, false>;
    case Op::kMin:
      return keep_nan ? run_extreme_32<false, true> : run_extreme_32<false, false>;
    case Op::kAbs:
      return run_sign_32<true>;
    case Op::kNeg:
      return run_sign_32<false>;
    default:
      return nullptr;
  }
}

bool is_approximate(Op op) {
  return op == Op::kRsqrt || (op >= Op::kSin && op <= Op::kTanh);
}

// The modifiers of a floating-point instruction. Returns false if the type does not have them.
bool take_flags(Modifiers& m, Op op, Type type, Form& f, Round& round) {
  const std::string rounding = m.take_one({"rn", "rz", "rm", "rp"});
  round = rounding == "rz"   ? Round::kZero
          : rounding == "rm" ? Round::kDown
          : rounding == "rp" ? Round::kUp
                             : Round::kNearest;
  if (m.take("ftz")) f.flags |= kFtz;
  if (m.take("sat")) f.flags |= kSat;
  if (m.take("relu")) f.flags |= kRelu;
  if (m.take("NaN")) f.flags |= kNan;
  if (m.take("xorsign")) f.flags |= kXorSign;
  if (m.take("abs")) f.flags |= kAbs;
  const bool approximate = m.take("approx"), full = m.take("full");
  if (approximate) f.flags |= kApprox;
  const bool divides = op == Op::kDiv || op == Op::kRcp || op == Op::kSqrt;
  if (divides && rounding.empty() && !approximate && !full) return false;
  if (full && op != Op::kDiv) return false;
  if (is_approximate(op) != (approximate && !divides)) return false;
  if ((f.flags & kNan) && op != Op::kMin && op != Op::kMax) return false;
  const bool small = type == Type::kF16 || type == Type::kBF16 || type == Type::kF16x2 || type == Type::kBF16x2;
  if ((f.flags & kRelu) && !(small && op == Op::kFma)) return false;
  if (small && divides) return false;
  return round == Round::kNearest || !small;
}

}  // namespace

Form decode_floating(Modifiers& m) {
  const std::string& name = m.name();
  Form f;
  if (name == "testp") {
    f.number = -1;
    for (int test = 0; test < 6; ++test)
      if (m.take(kTests[test])) f.number = test;
    const Type type = m.take_type();
    f.run = f.number < 0         ? nullptr
            : type == Type::kF32 ? run_test<float>
            : type == Type::kF64 ? run_test<double>
                                 : nullptr;
    f.wants = wants(Type::kPred, {type});
    return f;
  }
  // Whether the type is one of floating point decides who understands the opcode.
  Modifiers look = m;
  const Type type = look.take_type();
  const bool pair = type == Type::kF16x2 || type == Type::kBF16x2 || type == Type::kF32x2;
  if (!is_float(type) && !pair) return decode_integer(m);
  if (type == Type::kTF32) return f;
  m.take_type();
  if (name == "copysign") {
    f.run = type == Type::kF32 ? run_copysign<uint32_t> : type == Type::kF64 ? run_copysign<uint64_t> : nullptr;
    f.wants = wants(type, {type, type});
    return f;
  }
  for (const Known& known : kKnown) {
    if (name != known.name) continue;
    Round round = Round::kNearest;
    if (!take_flags(m, known.op, type, f, round)) return f;
    f.number = static_cast<int64_t>(known.op) | static_cast<int64_t>(round) << 8;
    f.wants = {{Want::kWrite, type}};
    for (int s = 0; s < known.sources; ++s) f.wants.push_back({Want::kRead, type});
    switch (type) {
      case Type::kF32:
        f.run = round == Round::kNearest ? fast_of(known.op, f.flags) : nullptr;
        if (f.run == nullptr) f.run = run_32;
        break;
      case Type::kF64:
        f.run = run_64;
        break;
      case Type::kF32x2:
        f.run = known.op <= Op::kFma ? run_pair_32 : nullptr;
        break;
      case Type::kF16:
        f.run = run_16<false>;
        break;
      case Type::kBF16:
        f.run = run_16<true>;
        break;
      case Type::kF16x2:
        f.run = run_pair_16<false>;
        break;
      default:
        f.run = run_pair_16<true>;
        break;
    }
  }
  return f;
}

}  // namespace ptx
