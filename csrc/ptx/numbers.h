// Numbers of PTX's floating-point formats, exact to the bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

enum class Round : uint8_t { kNearest, kZero, kDown, kUp, kAway };  // kAway: to nearest, halves away from zero

constexpr uint32_t kNan32 = 0x7fffffff;
constexpr uint16_t kNan16 = 0x7fff;  // of f16 and bf16

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Format {
  int mantissa, exponent;  // bits
};
constexpr Format kFormat16{10, 5}, kFormatB16{7, 8}, kFormat32{23, 8}, kFormatT32{10, 8}, kFormat64{52, 11};

// The bits, in this format, of (-1)^negative * significand * 2^exponent, to which something smaller than the last bit
// was added if `sticky`. Overflow gives infinity or the largest number, as the rounding says.
uint64_t round_to(Format format, bool negative, uint64_t significand, int exponent, bool sticky, Round round);
// Of a double that is no NaN.
uint64_t round_to(Format format, double value, Round round);

inline float float_of_bf16(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
float float_of_f16(uint16_t bits);

// To nearest; NaN becomes the canonical one.
inline uint16_t bf16_of(float value) {
  const auto bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? kNan16 : static_cast<uint16_t>(rounded);
}
uint16_t f16_of(double value, Round round = Round::kNearest);
uint16_t bf16_of(double value, Round round);
float float_of(double value, Round round);

inline float canonical(float value) {
  return value == value ? value : bit_cast<float>(kNan32);
}
inline float flushed(float value) {
  const auto bits = bit_cast<uint32_t>(value);
  return (bits & 0x7f800000) == 0 ? bit_cast<float>(bits & 0x80000000) : value;
}
inline float saturated(float value) {
  return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f;  // NaN and -0 become +0
}

// a + b and a * b + c rounded to odd: a last bit of 1 says that bits are missing below. Rounding the result again, to
// at least two bits fewer, is the same as rounding the exact value once. a * b must be exact in double.
double odd(double rounded, double error);
inline double add_odd(double a, double b) {
  const double sum = a + b, b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  return odd(sum, error);
}
inline double fma_odd(double a, double b, double c) {
  return add_odd(a * b, c);
}
inline double odd(double rounded, double error) {
  if (error == 0 || !std::isfinite(rounded) || !std::isfinite(error)) return rounded;
  const auto bits = bit_cast<uint64_t>(rounded);
  if (bits & 1) return rounded;
  return bit_cast<double>((error > 0) == (rounded > 0) ? bits + 1 : bits - 1);
}

// To nearest, without a branch.
inline uint16_t f16_of_float(float value) {
  const auto bits = bit_cast<uint32_t>(value);
  const uint32_t size = bits & 0x7fffffff;
  constexpr uint32_t kBias = (127 - 15) << 23;                     // between the exponents
  constexpr uint32_t kLeastNormal = 113 << 23, kHalf = 126 << 23;  // of f16, in fp32; and 0.5, whose last bit is 2^-24
  const uint32_t normal = (size - kBias + 0xfff + (size >> 13 & 1)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - kHalf;
  const uint32_t finite = size < kLeastNormal ? subnormal : normal;
  const uint32_t bounded = finite > 0x7c00 ? 0x7c00 : finite;
  const auto sized = static_cast<uint16_t>(bounded | (bits >> 16 & 0x8000));
  return size > 0x7f800000 ? kNan16 : sized;
}

}  // namespace ptx
