// Floating-point arithmetic of f32, f64, f16, bf16 and pairs of these.
//
// Exact to the bit: add, sub, mul, fma, mad, min, max, abs, neg, copysign, testp in every rounding, with .ftz, .sat and
// .relu; div, rcp and sqrt with a rounding (.rn and so on). Within the error that PTX documents, because they return
// the correctly rounded value: div.full (2 ulp there), div.approx (2 ulp), rcp.approx, rsqrt.approx, sqrt.approx (1
// ulp), ex2.approx, lg2.approx, sin.approx, cos.approx, tanh.approx.

#include <cfenv>

#include "families.h"
#include "floating.h"

namespace ptx {
namespace {

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

}  // namespace

double evaluate(FloatOp op, uint32_t flags, double a, double b, double c) {
  switch (op) {
    case FloatOp::kAdd:
      return add_odd(a, b);
    case FloatOp::kSub:
      return add_odd(a, -b);
    case FloatOp::kMul:
      return a * b;
    case FloatOp::kFma:
      return fma_odd(a, b, c);
    case FloatOp::kDiv:
      // Documented of div.approx: a divisor above 2^126 gives 0, or NaN from infinity.
      if ((flags & kApprox) && std::fabs(b) > 0x1p126 && std::isfinite(b))
        return std::isinf(a) ? std::nan("") : a * 0.0;
      return div_odd(a, b);
    case FloatOp::kRcp:
      return div_odd(1.0, a);
    case FloatOp::kSqrt:
      return sqrt_odd(a);
    case FloatOp::kRsqrt:
      return 1.0 / std::sqrt(a);
    case FloatOp::kMin:
    case FloatOp::kMax: {
      const bool negative = std::signbit(a) != std::signbit(b);
      if (flags & kAbs) {
        a = std::fabs(a);
        b = std::fabs(b);
      }
      const double chosen = extreme(a, b, op == FloatOp::kMax, flags & kNan);
      return flags & kXorSign ? std::copysign(chosen, negative ? -1.0 : 1.0) : chosen;
    }
    case FloatOp::kAbs:
      return std::fabs(a);
    case FloatOp::kNeg:
      return -a;
    case FloatOp::kSin:
      return std::sin(a);
    case FloatOp::kCos:
      return std::cos(a);
    case FloatOp::kLg2:
      return std::log2(a);
    case FloatOp::kEx2:
      return std::exp2(a);
    case FloatOp::kTanh:
      return std::tanh(a);
  }
  return 0;
}

namespace {

// Rounded down, a sum that is exactly zero is -0, unless both of its parts are +0.
double sum_rounded_down(FloatOp op, double sum, double a, double b, double c) {
  if (sum != 0 || op > FloatOp::kFma || op == FloatOp::kMul) return sum;
  const double first = op == FloatOp::kFma ? a * b : a, second = op == FloatOp::kFma ? c : op == FloatOp::kSub ? -b : b;
  const bool both = first == 0 && second == 0 && !std::signbit(first) && !std::signbit(second);
  return both ? 0.0 : -0.0;
}

// ---- f32 ----

template <class F>
void fast(Warp& w, const Instruction& i, F f) {
  apply<float, float, float>(w, i, [f](float a, float b) { return canonical(f(a, b)); });
}

void multiply_add(float* out, const float* a, const float* b, const float* c) {
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

void run_32(Warp& w, const Instruction& i) {
  const FloatOp op = op_of(i);
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
  const FloatOp op = op_of(i);
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

double evaluate_64(FloatOp op, uint32_t flags, double a, double b, double c) {
  volatile double x = a, y = b;  // not computed ahead, in another rounding
  switch (op) {
    case FloatOp::kAdd:
      return x + y;
    case FloatOp::kSub:
      return x - y;
    case FloatOp::kMul:
      return x * y;
    case FloatOp::kFma:
      return std::fma(x, y, c);
    case FloatOp::kDiv:
      return x / y;
    case FloatOp::kRcp:
      return 1.0 / x;
    case FloatOp::kSqrt:
      return std::sqrt(x);
    default:
      return evaluate(op, flags, a, b, c);
  }
}

void run_64(Warp& w, const Instruction& i) {
  const Rounding rounding(round_of(i));
  const FloatOp op = op_of(i);
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
  FloatOp op;
  int sources;
};
constexpr Known kKnown[] = {{"add", FloatOp::kAdd, 2}, {"sub", FloatOp::kSub, 2},   {"mul", FloatOp::kMul, 2},
                            {"fma", FloatOp::kFma, 3}, {"mad", FloatOp::kFma, 3},   {"div", FloatOp::kDiv, 2},
                            {"rcp", FloatOp::kRcp, 1}, {"sqrt", FloatOp::kSqrt, 1}, {"rsqrt", FloatOp::kRsqrt, 1},
                            {"min", FloatOp::kMin, 2}, {"max", FloatOp::kMax, 2},   {"abs", FloatOp::kAbs, 1},
                            {"neg", FloatOp::kNeg, 1}, {"sin", FloatOp::kSin, 1},   {"cos", FloatOp::kCos, 1},
                            {"lg2", FloatOp::kLg2, 1}, {"ex2", FloatOp::kEx2, 1},   {"tanh", FloatOp::kTanh, 1}};

Run fast_of(FloatOp op, uint32_t flags) {
  if (flags & ~static_cast<uint32_t>(kNan)) return nullptr;
  const bool keep_nan = flags & kNan;
  switch (op) {
    case FloatOp::kAdd:
      return run_add_32;
    case FloatOp::kSub:
      return run_sub_32;
    case FloatOp::kMul:
      return run_mul_32;
    case FloatOp::kFma:
      return run_fma_32;
    case FloatOp::kMax:
      return keep_nan ? run_extreme_32<true, true> : run_extreme_32<true, false>;
    case FloatOp::kMin:
      return keep_nan ? run_extreme_32<false, true> : run_extreme_32<false, false>;
    case FloatOp::kAbs:
      return run_sign_32<true>;
    case FloatOp::kNeg:
      return run_sign_32<false>;
    default:
      return nullptr;
  }
}

bool is_approximate(FloatOp op) {
  return op == FloatOp::kRsqrt || (op >= FloatOp::kSin && op <= FloatOp::kTanh);
}

// The modifiers of a floating-point instruction. Returns false if the type does not have them.
bool take_flags(Modifiers& m, FloatOp op, Type type, Form& f, Round& round) {
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
  const bool divides = op == FloatOp::kDiv || op == FloatOp::kRcp || op == FloatOp::kSqrt;
  if (divides && rounding.empty() && !approximate && !full) return false;
  if (full && op != FloatOp::kDiv) return false;
  if (is_approximate(op) != (approximate && !divides)) return false;
  if ((f.flags & kNan) && op != FloatOp::kMin && op != FloatOp::kMax) return false;
  const bool small = type == Type::kF16 || type == Type::kBF16 || type == Type::kF16x2 || type == Type::kBF16x2;
  if ((f.flags & kRelu) && !(small && op == FloatOp::kFma)) return false;
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
        f.run = known.op <= FloatOp::kFma ? run_pair_32 : nullptr;
        break;
      default:
        f.run = half_run(known.op, type, f.flags);
        break;
    }
  }
  return f;
}

}  // namespace ptx
