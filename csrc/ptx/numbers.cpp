// Rounding to any format.

#include "numbers.h"

#include <algorithm>

namespace ptx {

uint64_t round_to(Format format, bool negative, uint64_t significand, int exponent, bool sticky, Round round) {
  const uint64_t sign = static_cast<uint64_t>(negative) << (format.mantissa + format.exponent);
  const int bias = (1 << (format.exponent - 1)) - 1;
  const uint64_t infinity = ((uint64_t{1} << format.exponent) - 1) << format.mantissa;
  if (significand == 0 && !sticky) return sign;
  // The place of the first bit: 2^top.
  const int top = significand == 0 ? exponent : exponent + 63 - __builtin_clzll(significand);
  // The last bit that the format keeps is worth 2^last.
  const int last = std::max(top, 1 - bias) - format.mantissa;
  const int drop = last - exponent;
  uint64_t kept = 0, rest = 0, half = 0;  // rest and half in units of 2^exponent, if bits are dropped
  if (drop <= 0) {
    kept = significand << -drop;
  } else if (drop < 64) {
    kept = significand >> drop;
    rest = significand & ((uint64_t{1} << drop) - 1);
    half = uint64_t{1} << (drop - 1);
  } else {
    rest = 1;  // less than half of the last bit, unless the first dropped bit is set
    half = 2;
    if (drop == 64) {
      rest = significand >> 1 | (significand & 1);
      half = uint64_t{1} << 62;
    }
  }
  const bool exact = rest == 0 && !sticky;
  bool up = false;
  switch (round) {
    case Round::kNearest:
      up = !exact && half != 0 && (rest > half || (rest == half && (sticky || (kept & 1))));
      break;
    case Round::kAway:
      up = !exact && half != 0 && rest >= half;
      break;
    case Round::kZero:
      break;
    case Round::kDown:
      up = !exact && negative;
      break;
    case Round::kUp:
      up = !exact && !negative;
      break;
  }
  kept += up;
  // `kept` has its leading bit at format.mantissa for normal numbers; adding the exponent lets a carry move into it.
  const int biased = std::max(top, 1 - bias) + bias;
  const uint64_t bits = kept + (static_cast<uint64_t>(biased - 1) << format.mantissa);
  if (top > bias || bits >= infinity) {
    const bool to_infinity = round == Round::kNearest || round == Round::kAway || (round == Round::kUp && !negative) ||
                             (round == Round::kDown && negative);
    return sign | (to_infinity ? infinity : infinity - 1);
  }
  return sign | bits;
}

uint64_t round_to(Format format, double value, Round round) {
  const auto bits = bit_cast<uint64_t>(value);
  const bool negative = bits >> 63;
  const uint64_t mantissa = bits & ((uint64_t{1} << 52) - 1);
  const int biased = static_cast<int>(bits >> 52 & 0x7ff);
  if (biased == 0x7ff)
    return static_cast<uint64_t>(negative) << (format.mantissa + format.exponent) |
           ((uint64_t{1} << format.exponent) - 1) << format.mantissa;
  const uint64_t significand = biased == 0 ? mantissa : mantissa | uint64_t{1} << 52;
  return round_to(format, negative, significand, std::max(biased, 1) - 1075, false, round);
}

float float_of_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t rest = bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(rest > 0x7c00 ? kNan32 : sign | 0x7f800000);
  if (rest >= 0x400) return bit_cast<float>(sign | ((rest << 13) + ((127 - 15) << 23)));
  const float small = static_cast<float>(rest) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(small));
}

uint16_t f16_of(double value, Round round) {
  return std::isnan(value) ? kNan16 : static_cast<uint16_t>(round_to(kFormat16, value, round));
}
uint16_t bf16_of(double value, Round round) {
  return std::isnan(value) ? kNan16 : static_cast<uint16_t>(round_to(kFormatB16, value, round));
}
float float_of(double value, Round round) {
  if (std::isnan(value)) return bit_cast<float>(kNan32);
  if (round == Round::kNearest) return static_cast<float>(value);
  return bit_cast<float>(static_cast<uint32_t>(round_to(kFormat32, value, round)));
}

}  // namespace ptx
