// setp, set, selp, slct.

#include <limits>

#include "apply.h"
#include "families.h"
#include "numbers.h"

namespace ptx {
namespace {

// A comparison holds for some of: less, equal, greater, unordered (one is NaN).
enum Holds : uint32_t { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };
enum Combine : uint32_t { kAlone, kAnd, kOr, kXor };

struct Comparison {
  const char* name;
  uint32_t holds;
};
constexpr Comparison kComparisons[] = {
    {"eq", kEqual},
    {"ne", kLess | kGreater},
    {"lt", kLess},
    {"le", kLess | kEqual},
    {"gt", kGreater},
    {"ge", kGreater | kEqual},
    {"lo", kLess},
    {"ls", kLess | kEqual},
    {"hi", kGreater},
    {"hs", kGreater | kEqual},
    {"equ", kEqual | kUnordered},
    {"neu", kLess | kGreater | kUnordered},
    {"ltu", kLess | kUnordered},
    {"leu", kLess | kEqual | kUnordered},
    {"gtu", kGreater | kUnordered},
    {"geu", kGreater | kEqual | kUnordered},
    {"num", kLess | kEqual | kGreater},
    {"nan", kUnordered},
};

constexpr uint32_t kFtz = 1;

// The lanes in which the comparison holds; Instruction::number says for what.
template <class T>
uint32_t compared(const T* a, const T* b, uint32_t holds) {
  uint32_t less = 0, equal = 0, greater = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    less |= static_cast<uint32_t>(a[lane] < b[lane]) << lane;
    equal |= static_cast<uint32_t>(a[lane] == b[lane]) << lane;
    greater |= static_cast<uint32_t>(a[lane] > b[lane]) << lane;
  }
  uint32_t lanes = holds & kUnordered ? ~(less | equal | greater) : 0;
  if (holds & kLess) lanes |= less;
  if (holds & kEqual) lanes |= equal;
  if (holds & kGreater) lanes |= greater;
  return lanes;
}

void widen(const Warp& w, const Instruction& i, const Slot& slot, int shift, float* out) {
  const bool brain = i.type == Type::kBF16 || i.type == Type::kBF16x2;
  for (int lane = 0; lane < kWarp; ++lane) {
    uint16_t bits = 0;
    if (i.type == Type::kF32) {
      out[lane] = w.in<float>(slot)[lane];
    } else {
      bits = lane_bytes(i.type) == 2 ? w.in<uint16_t>(slot)[lane]
                                     : static_cast<uint16_t>(w.in<uint32_t>(slot)[lane] >> shift);
      if ((i.flags & kFtz) && !brain && (bits & 0x7c00) == 0) bits &= 0x8000;
      out[lane] = brain ? float_of_bf16(bits) : float_of_f16(bits);
    }
    if ((i.flags & kFtz) && i.type == Type::kF32) out[lane] = flushed(out[lane]);
  }
}

uint32_t comparison(Warp& w, const Instruction& i, const Slot& a, const Slot& b, int shift) {
  const auto holds = static_cast<uint32_t>(i.number);
  switch (i.type) {
    case Type::kU16:
    case Type::kB16:
      return compared(w.in<uint16_t>(a), w.in<uint16_t>(b), holds);
    case Type::kS16:
      return compared(w.in<int16_t>(a), w.in<int16_t>(b), holds);
    case Type::kU32:
    case Type::kB32:
      return compared(w.in<uint32_t>(a), w.in<uint32_t>(b), holds);
    case Type::kS32:
      return compared(w.in<int32_t>(a), w.in<int32_t>(b), holds);
    case Type::kU64:
    case Type::kB64:
      return compared(w.in<uint64_t>(a), w.in<uint64_t>(b), holds);
    case Type::kS64:
      return compared(w.in<int64_t>(a), w.in<int64_t>(b), holds);
    case Type::kF64:
      return compared(w.in<double>(a), w.in<double>(b), holds);
    default: {
      if (i.type == Type::kF32 && i.flags == 0) return compared(w.in<float>(a), w.in<float>(b), holds);
      float x[kWarp], y[kWarp];
      widen(w, i, a, shift, x);
      widen(w, i, b, shift, y);
      return compared(x, y, holds);
    }
  }
}

// The lanes in which two integers, of which bits are undefined, compare in one way only.
template <class T>
uint32_t decided(const Warp& w, const Slot& a, const Slot& b, uint32_t holds) {
  constexpr T kSign = std::is_signed_v<T> ? std::numeric_limits<T>::min() : T{0};
  const auto least = [](Partial<T> p) { return static_cast<T>(p.value | (p.undefined & kSign)); };
  const auto most = [](Partial<T> p) { return static_cast<T>(p.value | (p.undefined & ~kSign)); };
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Partial<T> x(w, a, lane), y(w, b, lane);
    const bool may_equal = ((x.value ^ y.value) & ~(x.undefined | y.undefined)) == 0;
    const uint32_t may_be =
        (least(x) < most(y) ? kLess : 0u) | (most(x) > least(y) ? kGreater : 0u) | (may_equal ? kEqual : 0u);
    lanes |= static_cast<uint32_t>((may_be & holds) == 0 || (may_be & ~holds) == 0) << lane;
  }
  return lanes;
}

// The lanes in which a comparison is defined.
uint32_t comparison_defined(Warp& w, const Instruction& i, const Slot& a, const Slot& b) {
  const uint32_t whole = w.defined(i, a) & w.defined(i, b);
  if ((w.active & ~whole) == 0) return whole;
  const auto holds = static_cast<uint32_t>(i.number);
  return whole | for_integer(i.type, [&](auto t) { return decided<decltype(t)>(w, a, b, holds); });
}

uint32_t combined(Combine how, uint32_t value, uint32_t other) {
  return how == kAnd ? value & other : how == kOr ? value | other : how == kXor ? value ^ other : value;
}

uint32_t combined_defined(Combine how, uint32_t value, uint32_t has, uint32_t other, uint32_t has_other) {
  if (how == kAnd || how == kOr) return defined_logic(how == kAnd, value, has, other, has_other);
  return has & has_other;
}

Combine combine_of(const Instruction& i) {
  return static_cast<Combine>(i.other_type);
}

void run_setp(Warp& w, const Instruction& i) {
  const Slot &p = i.at(0), &q = i.at(0, 1), &a = i.at(1), &b = i.at(2);
  const uint32_t defined = comparison_defined(w, i, a, b);
  uint32_t other = 0, has_other = kAllLanes;
  const uint32_t value = comparison(w, i, a, b, 0);
  uint32_t second = ~value;
  if (bytes_of(i.type) == 4 && (i.type == Type::kF16x2 || i.type == Type::kBF16x2)) second = comparison(w, i, a, b, 16);
  const Combine how = combine_of(i);
  if (how != kAlone) {
    other = w.mask(i.at(3));
    has_other = w.defined(i, i.at(3));
  }
  w.put_mask(i, p, combined(how, value, other), combined_defined(how, value, defined, other, has_other));
  w.put_mask(i, q, combined(how, second, other), combined_defined(how, second, defined, other, has_other));
}

template <class D>
void run_set(Warp& w, const Instruction& i) {
  uint32_t other = 0, has_other = kAllLanes;
  const Combine how = combine_of(i);
  if (how != kAlone) {
    other = w.mask(i.at(3));
    has_other = w.defined(i, i.at(3));
  }
  const uint32_t alone = comparison(w, i, i.at(1), i.at(2), 0), value = combined(how, alone, other);
  const uint32_t defined = combined_defined(how, alone, comparison_defined(w, i, i.at(1), i.at(2)), other, has_other);
  D out[kWarp];
  const D yes = std::is_same_v<D, float> ? D{1} : static_cast<D>(-1);
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = value >> lane & 1 ? yes : D{0};
  w.put(i, i.at(0), out, defined);
}

// The side that is not chosen may be undefined. An undefined choice leaves the bits in which both sides agree.
template <class T>
void choose(Warp& w, const Instruction& i, uint32_t first, uint32_t known) {
  const T *a = w.in<T>(i.slot[1]), *b = w.in<T>(i.slot[2]);
  alignas(64) T out[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = first >> lane & 1 ? a[lane] : b[lane];
  const uint32_t defined = known & ((w.defined(i, i.slot[1]) & first) | (w.defined(i, i.slot[2]) & ~first));
  if ((w.active & ~defined) == 0) return w.put(i, i.slot[0], out, defined);
  T bits[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Partial<T> x(w, i.slot[1], lane), y(w, i.slot[2], lane);
    const T either = (x.value ^ y.value) | x.undefined | y.undefined;
    bits[lane] = !(known >> lane & 1) ? either : first >> lane & 1 ? x.undefined : y.undefined;
  }
  w.put(i, i.slot[0], out, defined);
  w.note_bits(i.slot[0], bits);
}
template <class T>
void run_selp(Warp& w, const Instruction& i) {
  choose<T>(w, i, w.mask(i.slot[3]), w.defined(i, i.slot[3]));
}
template <class T>
void run_slct(Warp& w, const Instruction& i) {
  uint32_t first = 0;
  const Slot& c = i.slot[3];
  for (int lane = 0; lane < kWarp; ++lane) {
    const bool positive = i.other_type == Type::kF32 ? w.in<float>(c)[lane] >= 0 : w.in<int32_t>(c)[lane] >= 0;
    first |= static_cast<uint32_t>(positive) << lane;
  }
  choose<T>(w, i, first, w.defined(i, c));
}

Form decode_set(Modifiers& m, bool predicate) {
  Form f;
  bool found = false;
  for (const Comparison& c : kComparisons)
    if (!found && m.take(c.name)) {
      f.number = c.holds;
      found = true;
    }
  const Combine how = m.take("and") ? kAnd : m.take("or") ? kOr : m.take("xor") ? kXor : kAlone;
  if (m.take("ftz")) f.flags = kFtz;
  const Type to = predicate ? Type::kPred : m.take_type();
  f.type = m.take_type();
  f.other_type = static_cast<Type>(how);
  if (!found || bytes_of(f.type) < 2 || f.type == Type::kB128 || f.type == Type::kTF32) return f;
  if (predicate) {
    f.run = run_setp;
    f.wants = {{Want::kPair, Type::kPred}};
  } else {
    f.run = to == Type::kF32 ? run_set<float> : to == Type::kU32 || to == Type::kS32 ? run_set<uint32_t> : nullptr;
    f.wants = {{Want::kWrite, to}};
  }
  f.wants.push_back({Want::kRead, f.type});
  f.wants.push_back({Want::kRead, f.type});
  if (how != kAlone) f.wants.push_back({Want::kRead, Type::kPred});
  return f;
}

}  // namespace

Form decode_compare(Modifiers& m) {
  const std::string& name = m.name();
  if (name == "setp" || name == "set") return decode_set(m, name == "setp");
  Form f;
  const Type type = m.take_type();
  const int bytes = bytes_of(type);
  if (name == "selp") {
    f.run = bytes == 2   ? run_selp<uint16_t>
            : bytes == 4 ? run_selp<uint32_t>
            : bytes == 8 ? run_selp<uint64_t>
                         : nullptr;
    f.wants = wants(type, {type, type, Type::kPred});
  } else {
    m.take("ftz");
    f.other_type = m.take_type();
    f.run = bytes == 2   ? run_slct<uint16_t>
            : bytes == 4 ? run_slct<uint32_t>
            : bytes == 8 ? run_slct<uint64_t>
                         : nullptr;
    if (f.other_type != Type::kF32 && f.other_type != Type::kS32) f.run = nullptr;
    f.wants = wants(type, {type, type, f.other_type});
  }
  return f;
}

}  // namespace ptx
