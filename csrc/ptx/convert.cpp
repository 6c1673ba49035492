// cvt: between all types but pairs of 8-bit numbers (float8.cpp), with every rounding, .ftz, .sat, .relu and
// .satfinite; exact to the bit.
//
// A NaN becomes the canonical NaN of the result's format, and 0 as an integer. One exception: cvt.f32.bf16 keeps the
// bits, as the shift that compilers make of it does.

#include <algorithm>

#include "apply.h"
#include "families.h"
#include "numbers.h"

namespace ptx {
namespace {

enum Flag : uint32_t { kFtz = 1, kSat = 2, kRelu = 4, kFinite = 8, kToInteger = 16 };

// ---- integers ----

int64_t integer_of(uint64_t bits, Type type) {
  switch (type) {
    case Type::kS8:
      return static_cast<int8_t>(bits);
    case Type::kU8:
      return static_cast<uint8_t>(bits);
    case Type::kS16:
      return static_cast<int16_t>(bits);
    case Type::kU16:
      return static_cast<uint16_t>(bits);
    case Type::kS32:
      return static_cast<int32_t>(bits);
    case Type::kU32:
      return static_cast<uint32_t>(bits);
    default:
      return static_cast<int64_t>(bits);
  }
}

// Truncated to the type, then extended by its sign.
int64_t narrowed(int64_t value, Type type) {
  switch (type) {
    case Type::kS8:
      return static_cast<int8_t>(value);
    case Type::kU8:
      return static_cast<uint8_t>(value);
    case Type::kS16:
      return static_cast<int16_t>(value);
    case Type::kU16:
      return static_cast<uint16_t>(value);
    case Type::kS32:
      return static_cast<int32_t>(value);
    case Type::kU32:
      return static_cast<uint32_t>(value);
    default:
      return value;
  }
}

__int128 greatest(Type type) {
  const int bits = 8 * bytes_of(type);
  return (static_cast<__int128>(1) << (is_signed(type) ? bits - 1 : bits)) - 1;
}
__int128 smallest(Type type) {
  return is_signed(type) ? -greatest(type) - 1 : 0;
}

// The result is stored as wide as the register is.
template <class F>
void for_width(Type type, F f) {
  switch (lane_bytes(type)) {
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint64_t{});
  }
}
void store(Warp& w, const Instruction& i, const int64_t* values, uint32_t defined) {
  for_width(i.slot[0].type, [&](auto narrow) {
    decltype(narrow) out[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = static_cast<decltype(narrow)>(values[lane]);
    w.put(i, i.slot[0], out, defined);
  });
}

void run_integer(Warp& w, const Instruction& i) {
  int64_t out[kWarp];
  const bool sat = i.flags & kSat;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int64_t value = integer_of(w.value(i.slot[1], lane), i.other_type);
    if (sat) {
      const __int128 wide = i.other_type == Type::kU64 ? static_cast<__int128>(static_cast<uint64_t>(value)) : value;
      out[lane] = static_cast<int64_t>(std::clamp(wide, smallest(i.type), greatest(i.type)));
    } else {
      out[lane] = narrowed(value, i.type);
    }
  }
  const uint32_t defined = w.defined(i, i.slot[1]);
  if ((w.active & ~defined) == 0 || sat) return store(w, i, out, defined);
  // Bits are dropped, or copied: those that are undefined likewise.
  int64_t bits[kWarp];
  for (int lane = 0; lane < kWarp; ++lane)
    bits[lane] = narrowed(integer_of(w.undefined_value(i.slot[1], lane), i.other_type), i.type);
  store(w, i, out, defined);
  for_width(i.slot[0].type, [&](auto narrow) {
    decltype(narrow) undefined[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) undefined[lane] = static_cast<decltype(narrow)>(bits[lane]);
    w.note_bits(i.slot[0], undefined);
  });
}

// From one width to another without narrowing below it: the most common conversions.
template <class D, class S>
void run_widen(Warp& w, const Instruction& i) {
  apply_bits<D, S>(
      w, i, [](S a) { return static_cast<D>(a); }, [](Partial<S> a) { return static_cast<D>(a.undefined); });
}

// ---- floating point ----

Format format_of(Type type) {
  switch (type) {
    case Type::kF16:
      return kFormat16;
    case Type::kBF16:
      return kFormatB16;
    case Type::kF64:
      return kFormat64;
    case Type::kTF32:
      return kFormatT32;
    default:
      return kFormat32;
  }
}

double number_of(const Warp& w, const Slot& slot, int lane, Type type, bool flush) {
  const uint64_t bits = w.value(slot, lane);
  switch (type) {
    case Type::kF16:
      return float_of_f16(static_cast<uint16_t>(bits));
    case Type::kBF16:
      return float_of_bf16(static_cast<uint16_t>(bits));
    case Type::kF64:
      return bit_cast<double>(bits);
    default: {
      const auto value = bit_cast<float>(static_cast<uint32_t>(bits));
      return flush ? flushed(value) : value;
    }
  }
}

uint64_t nan_of(Type type) {
  switch (type) {
    case Type::kF16:
    case Type::kBF16:
      return kNan16;
    case Type::kF64:
      return 0x7ff8000000000000;
    default:
      return kNan32;
  }
}

Round round_of(const Instruction& i) {
  return static_cast<Round>(i.number);
}

double integral(double value, Round round) {
  switch (round) {
    case Round::kZero:
      return std::trunc(value);
    case Round::kDown:
      return std::floor(value);
    case Round::kUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

uint64_t as_format(double value, Type type, uint32_t flags, Round round) {
  if (std::isnan(value)) return flags & kSat ? 0 : nan_of(type);
  if (flags & kSat) value = value > 0 ? std::min(value, 1.0) : 0.0;
  if ((flags & kRelu) && !(value > 0)) return 0;
  const Format format = format_of(type);
  uint64_t bits = round_to(format, value, round);
  const uint64_t infinity = ((uint64_t{1} << format.exponent) - 1) << format.mantissa;
  const uint64_t sign = uint64_t{1} << (format.mantissa + format.exponent);
  if ((flags & kFinite) && (bits & ~sign) >= infinity) bits = (bits & sign) | (infinity - 1);
  if ((flags & kFtz) && type == Type::kF32 && (bits & infinity) == 0) bits &= sign;
  return type == Type::kTF32 ? bits << 13 : bits;
}

void run_float(Warp& w, const Instruction& i) {
  int64_t out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    double value = number_of(w, i.slot[1], lane, i.other_type, i.flags & kFtz);
    if (i.flags & kToInteger) value = integral(value, round_of(i));
    const Round round = i.flags & kToInteger ? Round::kNearest : round_of(i);
    out[lane] = static_cast<int64_t>(as_format(value, i.type, i.flags, round));
  }
  store(w, i, out, w.defined(i, i.slot[1]));
}

void run_float_of_integer(Warp& w, const Instruction& i) {
  int64_t out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int64_t value = integer_of(w.value(i.slot[1], lane), i.other_type);
    const bool negative = is_signed(i.other_type) && value < 0;
    const uint64_t magnitude = negative ? uint64_t{0} - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
    if (i.flags & kSat) {
      out[lane] = static_cast<int64_t>(as_format(negative || magnitude == 0 ? 0.0 : 1.0, i.type, 0, Round::kNearest));
    } else {
      out[lane] = static_cast<int64_t>(round_to(format_of(i.type), negative, magnitude, 0, false, round_of(i)));
    }
  }
  store(w, i, out, w.defined(i, i.slot[1]));
}

void run_integer_of_float(Warp& w, const Instruction& i) {
  int64_t out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const double value = number_of(w, i.slot[1], lane, i.other_type, i.flags & kFtz);
    const double whole = integral(value, round_of(i));
    if (std::isnan(value)) {
      out[lane] = 0;
    } else if (whole >= static_cast<double>(greatest(i.type))) {
      out[lane] = static_cast<int64_t>(greatest(i.type));
    } else if (whole <= static_cast<double>(smallest(i.type))) {
      out[lane] = static_cast<int64_t>(smallest(i.type));
    } else {
      out[lane] = static_cast<int64_t>(static_cast<__int128>(whole));
    }
  }
  store(w, i, out, w.defined(i, i.slot[1]));
}

void run_float_of_bf16(Warp& w, const Instruction& i) {
  apply<uint32_t, uint16_t>(w, i, [](uint16_t a) { return static_cast<uint32_t>(a) << 16; });
}
void run_bf16_of_float(Warp& w, const Instruction& i) {
  apply<uint16_t, float>(w, i, [](float a) { return bf16_of(a); });
}

// cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half.
void run_pair(Warp& w, const Instruction& i) {
  const Type type = i.type;
  const uint32_t flags = i.flags;
  const Round round = round_of(i);
  Halves halves;
  halves.lanes[0] = w.defined(i, i.slot[2]);
  halves.lanes[1] = w.defined(i, i.slot[1]);
  if (type == Type::kBF16 && flags == 0 && round == Round::kNearest) {
    apply<uint32_t, float, float>(
        w, i, [](float a, float b) { return static_cast<uint32_t>(bf16_of(a)) << 16 | bf16_of(b); });
  } else {
    apply<uint32_t, float, float>(w, i, [=](float a, float b) {
      return static_cast<uint32_t>(as_format(a, type, flags, round) << 16 | as_format(b, type, flags, round));
    });
  }
  halves.keep(w, i.slot[0]);
}

Run fast_of(Type to, Type from) {
  const bool wide_to = bytes_of(to) == 8, wide_from = bytes_of(from) == 8;
  const bool narrow_from = bytes_of(from) == 2;
  if (bytes_of(to) < 2 || bytes_of(from) < 2) return nullptr;
  if (bytes_of(to) == 2) {
    if (bytes_of(from) == 4) return run_widen<uint16_t, uint32_t>;
    return wide_from ? run_widen<uint16_t, uint64_t> : nullptr;
  }
  if (narrow_from) {
    if (from == Type::kS16) return wide_to ? run_widen<int64_t, int16_t> : run_widen<int32_t, int16_t>;
    return wide_to ? run_widen<uint64_t, uint16_t> : run_widen<uint32_t, uint16_t>;
  }
  if (wide_to && !wide_from) return from == Type::kS32 ? run_widen<int64_t, int32_t> : run_widen<uint64_t, uint32_t>;
  if (!wide_to && wide_from) return run_widen<uint32_t, uint64_t>;
  return nullptr;
}

bool is_integer(Type type) {
  return (type >= Type::kU8 && type <= Type::kS8) || type == Type::kU16 || type == Type::kS16 || type == Type::kU32 ||
         type == Type::kS32 || type == Type::kU64 || type == Type::kS64;
}

}  // namespace

Form decode_convert(Modifiers& m) {
  Form f;
  for (const std::string& word : m.left())
    if (word == "e4m3x2" || word == "e5m2x2") return decode_float8(m);
  const std::string rounding = m.take_one({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  if (m.take("ftz")) f.flags |= kFtz;
  if (m.take("sat")) f.flags |= kSat;
  if (m.take("relu")) f.flags |= kRelu;
  if (m.take("satfinite")) f.flags |= kFinite;
  const bool to_integer = rounding.size() == 3 && rounding != "rna";
  Round round = Round::kNearest;
  if (rounding.size() > 1) {
    const char kind = rounding[1];
    round = rounding == "rna" ? Round::kAway
            : kind == 'z'     ? Round::kZero
            : kind == 'm'     ? Round::kDown
            : kind == 'p'     ? Round::kUp
                              : Round::kNearest;
  }
  f.number = static_cast<int64_t>(round);
  f.type = m.take_type();
  f.other_type = m.take_type();
  const Type to = f.type, from = f.other_type;
  if (to == Type::kF16x2 || to == Type::kBF16x2) {
    if (from != Type::kF32 || rounding.empty() || to_integer) return f;
    f.type = to == Type::kF16x2 ? Type::kF16 : Type::kBF16;
    f.run = run_pair;
    f.wants = wants(Type::kB32, {Type::kF32, Type::kF32});
    return f;
  }
  f.wants = {{Want::kWrite, to, false, true}, {Want::kRead, from, false, true}};
  // The fast ways need registers that are as wide as the types.
  const auto exactly = [&](Run run) {
    if (run == nullptr || (f.flags & ~static_cast<uint32_t>(kFtz))) return;
    f.exact = run;
  };
  if (is_integer(to) && is_integer(from)) {
    f.run = rounding.empty() ? run_integer : nullptr;
    exactly(fast_of(to, from));
  } else if (is_float(to) && is_float(from)) {
    if (to_integer) f.flags |= kToInteger;
    const bool narrows = bytes_of(to) < bytes_of(from) || to == Type::kTF32;
    const bool same = to == from;
    if (from != Type::kTF32 && (!narrows || !rounding.empty()) && (!to_integer || same)) f.run = run_float;
    if (to == Type::kF32 && from == Type::kBF16) exactly(run_float_of_bf16);
    if (to == Type::kBF16 && from == Type::kF32 && round == Round::kNearest) exactly(run_bf16_of_float);
  } else if (is_float(to) && is_integer(from)) {
    if (!rounding.empty() && !to_integer && to != Type::kTF32) f.run = run_float_of_integer;
  } else if (is_integer(to) && is_float(from)) {
    if (to_integer && from != Type::kTF32) f.run = run_integer_of_float;
  }
  return f;
}

}  // namespace ptx
