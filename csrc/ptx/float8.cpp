// cvt of pairs of 8-bit floating-point numbers, exact to the bit.
//
//   e4m3  1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity: 0x7e is 448, the largest, and 0x7f is NaN
//   e5m2  1 sign, 5 exponent (bias 15), 2 mantissa bits: the upper half of an f16
//
// To 8 bits numbers are rounded to nearest even, and those beyond the largest number become it, infinity too
// (.satfinite, which these instructions must have). A NaN becomes 0x7f, and in f16 the canonical NaN.

#include <algorithm>
#include <cmath>

#include "apply.h"
#include "families.h"
#include "numbers.h"

namespace ptx {
namespace {

constexpr Format kFormatE4M3{3, 4}, kFormatE5M2{2, 5};
constexpr uint32_t kSign = 0x80, kNan8 = 0x7f, kMostE4M3 = 0x7e, kMostE5M2 = 0x7b;

uint32_t byte_of(double value, bool wide, bool relu) {
  if (std::isnan(value)) return kNan8;
  if (relu && !(value > 0)) return 0;
  const uint32_t sign = std::signbit(value) ? kSign : 0;
  const double size = std::fabs(value);
  if (wide) return sign | std::min(static_cast<uint32_t>(round_to(kFormatE5M2, size, Round::kNearest)), kMostE5M2);
  // Up to 256 as in a format with infinity, whose place 256 has here; from there to 448 in steps of 32.
  constexpr double kAbove = 256, kStep = 32, kLargest = 448;
  if (size < kAbove) return sign | static_cast<uint32_t>(round_to(kFormatE4M3, size, Round::kNearest));
  return sign | std::min(0x70 + static_cast<uint32_t>(std::nearbyint(std::min(size, kLargest) / kStep)), kMostE4M3);
}

uint32_t half_of(uint32_t byte, bool wide, bool relu) {
  const uint32_t sign = (byte & kSign) << 8, size = byte & ~kSign;
  if (wide ? size > kMostE5M2 + 1 : size == kNan8) return kNan16;
  if (relu && sign) return 0;
  if (wide) return sign | size << 8;
  constexpr double kSubnormal = 1.0 / 512;
  const uint32_t exponent = size >> 3, mantissa = size & 7;
  if (exponent == 0) return sign | f16_of(static_cast<float>(mantissa * kSubnormal));
  return sign | (exponent + 8) << 10 | mantissa << 7;
}

enum Flag : uint32_t { kWide = 1, kRelu = 2 };

// cvt.rn.satfinite.e4m3x2.f32 d, a, b: a becomes the upper half.
void run_from_floats(Warp& w, const Instruction& i) {
  const bool wide = i.flags & kWide, relu = i.flags & kRelu;
  const uint32_t upper = w.defined(i, i.slot[1]), lower = w.defined(i, i.slot[2]);
  apply<uint16_t, float, float>(w, i, [=](float a, float b) {
    return static_cast<uint16_t>(byte_of(a, wide, relu) << 8 | byte_of(b, wide, relu));
  });
  if ((w.active & ~(upper & lower)) == 0) return;
  uint16_t undefined[kWarp];
  for (int lane = 0; lane < kWarp; ++lane)
    undefined[lane] = static_cast<uint16_t>((upper >> lane & 1 ? 0 : 0xff00) | (lower >> lane & 1 ? 0 : 0xff));
  w.note_bits(i.slot[0], undefined);
}

void run_from_halves(Warp& w, const Instruction& i) {
  const bool wide = i.flags & kWide, relu = i.flags & kRelu;
  apply_bits<uint16_t, uint32_t>(
      w, i,
      [=](uint32_t a) {
        return static_cast<uint16_t>(byte_of(float_of_f16(static_cast<uint16_t>(a >> 16)), wide, relu) << 8 |
                                     byte_of(float_of_f16(static_cast<uint16_t>(a)), wide, relu));
      },
      [](const Partial<uint32_t>& a) {
        return static_cast<uint16_t>((a.undefined >> 16 ? 0xff00 : 0) | (a.undefined & 0xffff ? 0xff : 0));
      });
}

void run_to_halves(Warp& w, const Instruction& i) {
  const bool wide = i.flags & kWide, relu = i.flags & kRelu;
  apply_bits<uint32_t, uint16_t>(
      w, i, [=](uint16_t a) { return half_of(a >> 8, wide, relu) << 16 | half_of(a & 0xff, wide, relu); },
      [](const Partial<uint16_t>& a) {
        return (a.undefined >> 8 ? 0xffff0000u : 0) | (a.undefined & 0xff ? 0xffffu : 0);
      });
}

}  // namespace

Form decode_float8(Modifiers& m) {
  Form f;
  const bool nearest = m.take("rn"), relu = m.take("relu"), finite = m.take("satfinite");
  const Type to = m.take_type(), from = m.take_type();
  const auto is_eight = [](Type type) { return type == Type::kE4M3x2 || type == Type::kE5M2x2; };
  f.flags = (to == Type::kE5M2x2 || from == Type::kE5M2x2 ? kWide : 0u) | (relu ? kRelu : 0u);
  if (!nearest) return f;
  if (is_eight(to) && finite && from == Type::kF32) {
    f.run = run_from_floats;
    f.wants = wants(Type::kB16, {Type::kF32, Type::kF32});
  } else if (is_eight(to) && finite && from == Type::kF16x2) {
    f.run = run_from_halves;
    f.wants = wants(Type::kB16, {Type::kB32});
  } else if (is_eight(from) && !finite && to == Type::kF16x2) {
    f.run = run_to_halves;
    f.wants = wants(Type::kB32, {Type::kB16});
  }
  return f;
}

}  // namespace ptx
