// Numbers in float32 that come to addresses, and conversions: a quotient of whole numbers is computed through them.
//
// A reciprocal is rounded correctly here, and to one unit in the last place on a GPU. The code that follows corrects
// either to the same quotient.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "warp.h"

namespace sass {
namespace {

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float number(const Operand& o, uint32_t bits) {
  if (o.absolute) bits &= 0x7fffffff;
  if (o.negated) bits ^= 0x80000000;
  return float_of(bits);
}

bool plain_rounding(Instruction& i) {
  i.take("RN");
  i.flag = i.take("FTZ");
  return true;
}

float flushed(const Instruction& i, float x) {
  return i.flag && std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

template <class F>
void map(Warp& w, const Instruction& i, int n, F f) {
  Vec s[3], out;
  const Vec* x[3];
  out.known = kAll;
  for (int k = 0; k < n; ++k) {
    x[k] = &w.plain(i, i.source(k), s[k]);
    out.known &= x[k]->known;
  }
  if ((out.known & w.exec) == 0) return w.put(i.operands[0], out);
  for (int lane = 0; lane < kWarp; ++lane) {
    float value[3] = {};
    for (int k = 0; k < n; ++k) value[k] = flushed(i, number(i.source(k), x[k]->v[lane]));
    out.v[lane] = bits_of(flushed(i, f(value[0], value[1], value[2])));
  }
  w.put(i.operands[0], out);
}

void run_fadd(Warp& w, const Instruction& i) {
  map(w, i, 2, [](float a, float b, float) { return a + b; });
}
void run_fmul(Warp& w, const Instruction& i) {
  map(w, i, 2, [](float a, float b, float) { return a * b; });
}
void run_ffma(Warp& w, const Instruction& i) {
  map(w, i, 3, [](float a, float b, float c) { return std::fma(a, b, c); });
}
template <Run R, int N>
bool decode_arithmetic(Instruction& i) {
  plain_rounding(i);
  i.run = R;
  return i.sources() == N;
}

void run_minimum(Warp& w, const Instruction& i) {
  const Mask minimum = w.predicate(i.source(2));
  if (minimum.known != kAll || (minimum.v != 0 && minimum.v != kAll)) return w.forget(i, w.exec);
  map(w, i, 2, [&](float a, float b, float) {
    if (i.extended && (std::isnan(a) || std::isnan(b))) return std::numeric_limits<float>::quiet_NaN();
    return minimum.v ? std::fmin(a, b) : std::fmax(a, b);
  });
}
bool decode_minimum(Instruction& i) {
  plain_rounding(i);
  i.extended = i.take("NAN");
  i.run = run_minimum;
  return i.sources() == 3;
}

void run_select(Warp& w, const Instruction& i) {
  Vec sa, sb, out;
  const Vec &a = w.plain(i, i.source(0), sa), &b = w.plain(i, i.source(1), sb);
  const Mask p = w.predicate(i.source(2));
  out.known = p.known & ((p.v & a.known) | (~p.v & b.known));
  for (int lane = 0; lane < kWarp; ++lane) {
    const bool first = p.v >> lane & 1;
    out.v[lane] = bits_of(number(i.source(first ? 0 : 1), first ? a.v[lane] : b.v[lane]));
  }
  w.put(i.operands[0], out);
}
bool decode_select(Instruction& i) {
  i.take("FTZ");
  i.run = run_select;
  return i.sources() == 3;
}

// ---- comparisons ----

const char* const kOrders[] = {"LT",  "EQ",  "LE",  "GT",  "NE",  "GE",  "NUM",
                               "NAN", "LTU", "EQU", "LEU", "GTU", "NEU", "GEU"};

bool compared(int order, float a, float b) {
  const bool unordered = std::isnan(a) || std::isnan(b);
  if (order == 6) return !unordered;
  if (order == 7) return unordered;
  if (unordered) return order > 7;
  switch (order % 8) {
    case 0:
      return a < b;
    case 1:
      return a == b;
    case 2:
      return a <= b;
    case 3:
      return a > b;
    case 4:
      return a != b;
    default:
      return a >= b;
  }
}

void run_compare(Warp& w, const Instruction& i) {
  Vec sa, sb;
  const Vec &a = w.plain(i, i.source(0), sa), &b = w.plain(i, i.source(1), sb);
  const Mask other = w.predicate(i.source(2));
  uint32_t is = 0;
  const uint32_t known = a.known & b.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    const float x = flushed(i, number(i.source(0), a.v[lane])), y = flushed(i, number(i.source(1), b.v[lane]));
    is |= static_cast<uint32_t>(compared(i.form, x, y)) << lane;
  }
  const auto joined = [&](uint32_t mine) {
    mine &= known;
    Mask m = i.size == 0   ? Mask{mine & other.v, (known & other.known) | (known & ~mine) | (other.known & ~other.v)}
             : i.size == 1 ? Mask{mine | other.v, (known & other.known) | (known & mine) | (other.known & other.v)}
                           : Mask{mine ^ other.v, known & other.known};
    m.v &= m.known;
    return m;
  };
  const Mask first = joined(is), second = joined(~is);
  w.put(i.operands[0], first);
  w.put(i.operands[1], second);
}

bool decode_compare(Instruction& i) {
  plain_rounding(i);
  i.form = -1;
  for (int n = 0; n < 14; ++n)
    if (i.take(kOrders[n])) i.form = n;
  i.size = i.take("AND") ? 0 : i.take("OR") ? 1 : i.take("XOR") ? 2 : -1;
  i.run = run_compare;
  return i.form >= 0 && i.size >= 0 && i.sources() == 3;
}

// Whether a quotient needs the slow path: an operand or a result outside of the normal numbers.
void run_check(Warp& w, const Instruction& i) {
  Vec sa, sb;
  const Vec &a = w.plain(i, i.source(0), sa), &b = w.plain(i, i.source(1), sb);
  Mask slow{0, a.known & b.known};
  const auto exponent = [](uint32_t bits) { return static_cast<int>(bits >> 23 & 255) - 127; };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int x = exponent(a.v[lane]), y = exponent(b.v[lane]);
    const bool unusual = x == 128 || y == 128 || y < -126 || (x < -126 && (a.v[lane] & 0x7fffffff) != 0);
    slow.v |= static_cast<uint32_t>(unusual || x - y > 125 || x - y < -125) << lane;
  }
  slow.v &= slow.known;
  w.put(i.operands[0], slow);
}
bool decode_check(Instruction& i) {
  i.take("DIVIDE");
  i.run = run_check;
  return i.sources() == 2;
}

void run_function(Warp& w, const Instruction& i) {
  map(w, i, 1, [&](float x, float, float) -> float {
    switch (i.form) {
      case 0:
        return 1.0f / x;
      case 1:
        return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
      case 2:
        return std::sqrt(x);
      case 3:
        return std::exp2(x);
      default:
        return std::log2(x);
    }
  });
}
bool decode_function(Instruction& i) {
  static const char* const kNames[] = {"RCP", "RSQ", "SQRT", "EX2", "LG2"};
  i.form = -1;
  for (int n = 0; n < 5; ++n)
    if (i.take(kNames[n])) i.form = n;
  i.run = run_function;
  return i.form >= 0;
}

// ---- conversions ----

float rounded(long double value, int towards) {
  float out = static_cast<float>(value);
  const long double got = out;
  if (towards > 0 && got < value) out = std::nextafter(out, std::numeric_limits<float>::infinity());
  if (towards < 0 && got > value) out = std::nextafter(out, -std::numeric_limits<float>::infinity());
  if (towards == 0 && std::fabs(got) > std::fabs(value)) out = std::nextafter(out, 0.0f);
  return out;
}

constexpr int kNearest = 9;

void run_to_float(Warp& w, const Instruction& i) {
  Vec s[2], out;
  const Operand& o = i.source(0);
  const Vec &low = w.read(i, o, s[0]), &high = i.size == 64 ? w.plain(i, o, s[1], 1) : low;
  out.known = low.known & high.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    long double value;
    const uint64_t both = uint64_t{high.v[lane]} << 32 | low.v[lane];
    if (i.size == 64)
      value = i.is_signed ? static_cast<long double>(static_cast<int64_t>(both)) : static_cast<long double>(both);
    else if (i.size == 16)
      value = i.is_signed ? static_cast<int16_t>(low.v[lane]) : static_cast<uint16_t>(low.v[lane]);
    else
      value = i.is_signed ? static_cast<long double>(static_cast<int32_t>(low.v[lane])) : low.v[lane];
    out.v[lane] = bits_of(i.form == kNearest ? static_cast<float>(value) : rounded(value, i.form));
  }
  w.put(i.operands[0], out);
}

bool decode_to_float(Instruction& i) {
  i.form = i.take("RP") ? 1 : i.take("RM") ? -1 : i.take("RZ") ? 0 : kNearest;
  i.take("F32");
  i.is_signed = true;
  i.size = 32;
  for (const auto& [name, size, is_signed] : {std::tuple{"U64", 64, false},
                                              {"S64", 64, true},
                                              {"U32", 32, false},
                                              {"S32", 32, true},
                                              {"U16", 16, false},
                                              {"S16", 16, true}})
    if (i.take(name)) i.size = size, i.is_signed = is_signed;
  i.run = run_to_float;
  return i.source(0).modifiers.empty() && !(i.size == 64 && (i.source(0).negated || i.source(0).absolute));
}

void run_to_whole(Warp& w, const Instruction& i) {
  Vec s, low, high;
  const Vec& a = w.plain(i, i.source(0), s);
  low.known = high.known = a.known;
  const int bits = i.size;
  const long double top = std::ldexp(1.0L, i.is_signed ? bits - 1 : bits) - 1;
  const long double least = i.is_signed ? -std::ldexp(1.0L, bits - 1) : 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const float x = number(i.source(0), a.v[lane]);
    long double value = i.form == 0   ? std::trunc(x)
                        : i.form == 1 ? std::ceil(x)
                        : i.form < 0  ? std::floor(x)
                                      : std::nearbyint(x);
    value = std::isnan(x) ? 0 : std::clamp<long double>(value, least, top);
    const uint64_t whole =
        value < 0 ? static_cast<uint64_t>(static_cast<int64_t>(value)) : static_cast<uint64_t>(value);
    low.v[lane] = static_cast<uint32_t>(whole);
    high.v[lane] = static_cast<uint32_t>(whole >> 32);
  }
  w.put(i.operands[0], low);
  if (bits == 64) w.put(i.operands[0], high, 1);
}

bool decode_to_whole(Instruction& i) {
  i.take("FTZ");
  i.take("NTZ");
  i.take("F32");
  i.form = i.take("TRUNC") ? 0 : i.take("CEIL") ? 1 : i.take("FLOOR") ? -1 : kNearest;
  i.size = 32;
  for (const auto& [name, size, is_signed] :
       {std::tuple{"U64", 64, false}, {"S64", 64, true}, {"U32", 32, false}, {"S32", 32, true}})
    if (i.take(name)) i.size = size, i.is_signed = is_signed;
  i.run = run_to_whole;
  return i.source(0).modifiers.empty();
}

// ---- constants through the half-precision pipe ----

// HFMA2 R, -RZ, RZ, x, y: ptxas moves a constant so, in the pipe that is free.
void run_half(Warp& w, const Instruction& i) {
  w.put(i.operands[0], Vec::of(static_cast<uint32_t>(i.word >> 32)));
}
bool decode_half(Instruction& i) {
  i.take("MMA");
  i.run = run_half;
  if (i.sources() != 4 || i.opcode.find("BF16") != std::string::npos) return false;
  const Operand &a = i.source(0), &b = i.source(1);
  return a.kind == Kind::kR && a.number == kRZ && b.kind == Kind::kR && b.number == kRZ &&
         i.source(2).kind == Kind::kImmediate && i.source(3).kind == Kind::kImmediate;
}

}  // namespace

const std::map<std::string, Decoder>& floating_decoders() {
  static const std::map<std::string, Decoder> all = {
      {"FADD", decode_arithmetic<run_fadd, 2>},
      {"FMUL", decode_arithmetic<run_fmul, 2>},
      {"FFMA", decode_arithmetic<run_ffma, 3>},
      {"FMNMX", decode_minimum},
      {"FSEL", decode_select},
      {"FSETP", decode_compare},
      {"FCHK", decode_check},
      {"MUFU", decode_function},
      {"I2F", decode_to_float},
      {"I2FP", decode_to_float},
      {"F2I", decode_to_whole},
      {"HFMA2", decode_half},
  };
  return all;
}

}  // namespace sass
