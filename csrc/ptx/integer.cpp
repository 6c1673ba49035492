// Integer arithmetic: add, sub, mul, mad, div, rem, abs, neg, min, max, sad, dp4a, dp2a, and carries.

#include <limits>

#include "apply.h"
#include "families.h"

namespace ptx {
namespace {

// Overflow wraps, so arithmetic is done without a sign.
template <class T>
using Bits = std::make_unsigned_t<T>;

// The type of twice the width.
template <class T>
struct Double {
  using type =
      std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                         std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                            std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
};
template <class T>
using Wide = typename Double<T>::type;

template <class T>
constexpr T most() {
  return std::numeric_limits<T>::max();
}
template <class T>
constexpr T least() {
  return std::numeric_limits<T>::min();
}

template <class T>
T low(Wide<T> value) {
  return static_cast<T>(value);
}
template <class T>
T high(Wide<T> value) {
  return static_cast<T>(value >> 8 * sizeof(T));
}
template <class T>
Wide<T> times(T a, T b) {
  return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b);
}
template <class T>
T sum(T a, T b) {
  return static_cast<T>(static_cast<Bits<T>>(a) + static_cast<Bits<T>>(b));
}
template <class T>
T clamped(Wide<T> value) {
  return value > most<T>() ? most<T>() : value < least<T>() ? least<T>() : static_cast<T>(value);
}

template <class T>
void run_add(Warp& w, const Instruction& i) {
  apply_bits<T, T, T>(w, i, [](T a, T b) { return sum(a, b); }, carried<T, Partial<T>, Partial<T>>);
}
template <class T>
void run_sub(Warp& w, const Instruction& i) {
  const auto difference = [](T a, T b) { return static_cast<T>(static_cast<Bits<T>>(a) - static_cast<Bits<T>>(b)); };
  apply_bits<T, T, T>(w, i, difference, carried<T, Partial<T>, Partial<T>>);
}
template <class T>
void run_add_clamped(Warp& w, const Instruction& i) {
  apply<T, T, T>(w, i, [](T a, T b) { return clamped<T>(static_cast<Wide<T>>(a) + b); });
}
template <class T>
void run_sub_clamped(Warp& w, const Instruction& i) {
  apply<T, T, T>(w, i, [](T a, T b) { return clamped<T>(static_cast<Wide<T>>(a) - b); });
}

// Two numbers of 16 bits in one register.
template <class F>
void apply_halves(Warp& w, const Instruction& i, F f) {
  const Halves halves(w, i);
  apply<uint32_t, uint32_t, uint32_t>(w, i, [f](uint32_t a, uint32_t b) {
    return uint32_t{f(static_cast<uint16_t>(a), static_cast<uint16_t>(b))} |
           uint32_t{f(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16))} << 16;
  });
  halves.keep(w, i.slot[0]);
}
void run_add_halves(Warp& w, const Instruction& i) {
  apply_halves(w, i, [](uint16_t a, uint16_t b) { return static_cast<uint16_t>(a + b); });
}

template <class T>
void run_mul_low(Warp& w, const Instruction& i) {
  const auto product = [](T a, T b) {
    using U = std::conditional_t<sizeof(T) == 2, uint32_t, Bits<T>>;  // 16 bits would be multiplied as int
    return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
  };
  apply_bits<T, T, T>(w, i, product, carried<T, Partial<T>, Partial<T>>);
}
template <class T>
void run_mul_high(Warp& w, const Instruction& i) {
  apply<T, T, T>(w, i, [](T a, T b) { return high<T>(times(a, b)); });
}
template <class T>
void run_mul_wide(Warp& w, const Instruction& i) {
  apply_bits<Wide<T>, T, T>(w, i, [](T a, T b) { return times(a, b); }, carried<Wide<T>, Partial<T>, Partial<T>>);
}
template <class T>
void run_mad_low(Warp& w, const Instruction& i) {
  const auto total = [](T a, T b, T c) {
    using U = std::conditional_t<sizeof(T) == 2, uint32_t, Bits<T>>;
    return static_cast<T>(static_cast<U>(a) * static_cast<U>(b) + static_cast<U>(c));
  };
  apply_bits<T, T, T, T>(w, i, total, carried<T, Partial<T>, Partial<T>, Partial<T>>);
}
template <class T>
void run_mad_high(Warp& w, const Instruction& i) {
  apply<T, T, T, T>(w, i, [](T a, T b, T c) { return sum(high<T>(times(a, b)), c); });
}
void run_mad_high_clamped(Warp& w, const Instruction& i) {
  apply<int32_t, int32_t, int32_t, int32_t>(
      w, i, [](int32_t a, int32_t b, int32_t c) { return clamped<int32_t>(int64_t{high<int32_t>(times(a, b))} + c); });
}
template <class T>
void run_mad_wide(Warp& w, const Instruction& i) {
  const auto total = [](T a, T b, Wide<T> c) { return sum<Wide<T>>(times(a, b), c); };
  apply_bits<Wide<T>, T, T, Wide<T>>(w, i, total, carried<Wide<T>, Partial<T>, Partial<T>, Partial<Wide<T>>>);
}

// Products of the low 24 bits; .hi has bits 16 to 47.
template <class T>
void run_mad24(Warp& w, const Instruction& i) {
  const bool take_high = i.flags != 0;
  const auto product = [take_high](T a, T b) {
    const auto narrow = [](T v) { return static_cast<T>(static_cast<T>(static_cast<uint32_t>(v) << 8) >> 8); };
    const auto wide = static_cast<int64_t>(narrow(a)) * static_cast<int64_t>(narrow(b));
    return static_cast<T>(take_high ? wide >> 16 : wide);
  };
  if (i.parts == 3) return apply<T, T, T>(w, i, product);
  apply<T, T, T, T>(w, i, [product](T a, T b, T c) { return sum(product(a, b), c); });
}

// What a division by zero returns is unspecified, so its lanes hold no defined value.
template <class T, bool kRemainder>
void run_div(Warp& w, const Instruction& i) {
  const T *a = w.in<T>(i.slot[1]), *b = w.in<T>(i.slot[2]);
  T out[kWarp];
  uint32_t defined = w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]);
  for (int lane = 0; lane < kWarp; ++lane) {
    const T n = a[lane], d = b[lane];
    if (d == 0) {
      defined &= ~(1u << lane);
      out[lane] = static_cast<T>(~T{0});
    } else if (std::is_signed_v<T> && d == static_cast<T>(-1)) {
      out[lane] = kRemainder ? T{0} : static_cast<T>(Bits<T>{0} - static_cast<Bits<T>>(n));  // also of the least number
    } else {
      out[lane] = static_cast<T>(kRemainder ? n % d : n / d);
    }
  }
  w.put(i, i.slot[0], out, defined);
}

template <class T>
void run_abs(Warp& w, const Instruction& i) {
  apply<T, T>(w, i, [](T a) { return a < 0 ? static_cast<T>(Bits<T>{0} - static_cast<Bits<T>>(a)) : a; });
}
template <class T>
void run_neg(Warp& w, const Instruction& i) {
  const auto negated = [](T a) { return static_cast<T>(Bits<T>{0} - static_cast<Bits<T>>(a)); };
  apply_bits<T, T>(w, i, negated, carried<T, Partial<T>>);
}
template <class T, bool kMax>
void run_extreme(Warp& w, const Instruction& i) {
  const bool relu = i.flags != 0;
  apply<T, T, T>(w, i, [relu](T a, T b) {
    const T chosen = kMax ? (a > b ? a : b) : (a < b ? a : b);
    return relu && chosen < 0 ? T{0} : chosen;
  });
}
template <class T, bool kMax>
void run_extreme_halves(Warp& w, const Instruction& i) {
  const bool relu = i.flags != 0;
  apply_halves(w, i, [relu](uint16_t x, uint16_t y) {
    const auto a = static_cast<T>(x), b = static_cast<T>(y);
    const T chosen = kMax ? (a > b ? a : b) : (a < b ? a : b);
    return static_cast<uint16_t>(relu && chosen < 0 ? T{0} : chosen);
  });
}
template <class T>
void run_sad(Warp& w, const Instruction& i) {
  apply<T, T, T, T>(w, i, [](T a, T b, T c) {
    const auto difference =
        a < b ? static_cast<Bits<T>>(b) - static_cast<Bits<T>>(a) : static_cast<Bits<T>>(a) - static_cast<Bits<T>>(b);
    return sum(static_cast<T>(difference), c);
  });
}

// Sums of four products of bytes, or of two products of a half and a byte.
template <class A, class B>
void run_dot(Warp& w, const Instruction& i) {
  const bool four = i.number == 4;
  const int offset = i.flags != 0 ? 16 : 0;  // dp2a.hi takes the upper two bytes of b
  apply<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, [four, offset](uint32_t a, uint32_t b, uint32_t c) {
    using Half = std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>;
    for (int e = 0; e < (four ? 4 : 2); ++e) {
      const int64_t x = four ? int64_t{static_cast<A>(a >> 8 * e)} : int64_t{static_cast<Half>(a >> 16 * e)};
      c += static_cast<uint32_t>(x * static_cast<B>(b >> (8 * e + offset)));
    }
    return c;
  });
}

// ---- carries ----

constexpr uint32_t kUsesCarry = 1, kSetsCarry = 2, kBorrows = 4;

// add.cc, addc, sub.cc, subc and the mad that add: the carry of each lane is that of the addition of its last operand.
template <class T>
void carry_chain(Warp& w, const Instruction& i, const T* a, const T* b, uint32_t defined) {
  const bool borrow = i.flags & kBorrows;
  T out[kWarp];
  uint32_t carry = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const T in = i.flags & kUsesCarry ? w.carry >> lane & 1 : 0;
    bool over = false;
    T value = 0;
    if (borrow) {
      over = __builtin_sub_overflow(a[lane], b[lane], &value);
      over |= __builtin_sub_overflow(value, in, &value);
    } else {
      over = __builtin_add_overflow(a[lane], b[lane], &value);
      over |= __builtin_add_overflow(value, in, &value);
    }
    out[lane] = value;
    carry |= static_cast<uint32_t>(over) << lane;
  }
  if (i.flags & kSetsCarry) w.carry = (w.carry & ~w.active) | (carry & w.active);
  w.put(i, i.slot[0], out, defined);
}

template <class T>
void run_add_carry(Warp& w, const Instruction& i) {
  using U = Bits<T>;
  carry_chain<U>(w, i, w.in<U>(i.slot[1]), w.in<U>(i.slot[2]), w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]));
}
template <class T, bool kHigh>
void run_mad_carry(Warp& w, const Instruction& i) {
  using U = Bits<T>;
  const T *a = w.in<T>(i.slot[1]), *b = w.in<T>(i.slot[2]);
  U products[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Wide<T> product = times(a[lane], b[lane]);
    products[lane] = static_cast<U>(kHigh ? high<T>(product) : low<T>(product));
  }
  carry_chain<U>(w, i, products, w.in<U>(i.slot[3]),
                 w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]) & w.defined(i, i.slot[3]));
}

Type widened(Type type) {
  switch (type) {
    case Type::kU16:
      return Type::kU32;
    case Type::kS16:
      return Type::kS32;
    case Type::kU32:
      return Type::kU64;
    case Type::kS32:
      return Type::kS64;
    default:
      return Type::kNone;
  }
}

#define PTX_RUN(function) for_integer(type, [](auto t) -> Run { return function<decltype(t)>; })

Form decode_multiply(Modifiers& m, Type type, bool add, bool carry) {
  Form f;
  const bool high = m.take("hi"), wide = m.take("wide");
  if (!high && !wide) m.take("lo");
  const Type to = wide ? widened(type) : type;
  f.wants = wants(to, {type, type});
  if (add) f.wants.push_back({Want::kRead, to});
  if (carry || m.take("cc")) {
    f.flags = (carry ? kUsesCarry : 0) | (!carry || m.take("cc") ? kSetsCarry : 0);
    f.run = for_integer(type, [high](auto t) -> Run {
      return high ? run_mad_carry<decltype(t), true> : run_mad_carry<decltype(t), false>;
    });
    return f;
  }
  if (wide) {
    switch (type) {
      case Type::kU16:
        f.run = add ? run_mad_wide<uint16_t> : run_mul_wide<uint16_t>;
        break;
      case Type::kS16:
        f.run = add ? run_mad_wide<int16_t> : run_mul_wide<int16_t>;
        break;
      case Type::kU32:
        f.run = add ? run_mad_wide<uint32_t> : run_mul_wide<uint32_t>;
        break;
      case Type::kS32:
        f.run = add ? run_mad_wide<int32_t> : run_mul_wide<int32_t>;
        break;
      default:
        break;
    }
  } else if (high) {
    f.run = add ? PTX_RUN(run_mad_high) : PTX_RUN(run_mul_high);
    if (m.take("sat")) f.run = add && type == Type::kS32 ? run_mad_high_clamped : nullptr;
  } else {
    f.run = add ? PTX_RUN(run_mad_low) : PTX_RUN(run_mul_low);
  }
  return f;
}

Form decode_dot(Modifiers& m, bool four) {
  Form f;
  f.number = four ? 4 : 2;
  if (!four && m.take("hi")) f.flags = 1;
  if (!four) m.take("lo");
  const Type a = m.take_type(), b = m.take_type();
  const bool signed_a = a == Type::kS32, signed_b = b == Type::kS32;
  f.run = signed_a ? (signed_b ? run_dot<int8_t, int8_t> : run_dot<int8_t, uint8_t>)
                   : (signed_b ? run_dot<uint8_t, int8_t> : run_dot<uint8_t, uint8_t>);
  f.wants = wants(Type::kB32, {Type::kB32, Type::kB32, Type::kB32});
  return f;
}

Form decode_extreme(Modifiers& m, Type type, bool greatest) {
  Form f;
  f.flags = m.take("relu");
  f.wants = wants(type, {type, type});
  if (type == Type::kS16x2) {
    f.run = greatest ? run_extreme_halves<int16_t, true> : run_extreme_halves<int16_t, false>;
  } else if (type == Type::kU16x2) {
    f.run = greatest ? run_extreme_halves<uint16_t, true> : run_extreme_halves<uint16_t, false>;
  } else {
    f.run = for_integer(type, [greatest](auto t) -> Run {
      return greatest ? run_extreme<decltype(t), true> : run_extreme<decltype(t), false>;
    });
  }
  return f;
}

}  // namespace

Form decode_integer(Modifiers& m) {
  const std::string& name = m.name();
  if (name == "dp4a" || name == "dp2a") return decode_dot(m, name == "dp4a");
  const Type type = m.take_type();
  if (type == Type::kB16 || type == Type::kB32 || type == Type::kB64) return {};  // arithmetic needs to know the sign
  if (name == "mul" || name == "mad" || name == "madc") return decode_multiply(m, type, name != "mul", name == "madc");
  if (name == "min" || name == "max") return decode_extreme(m, type, name == "max");
  Form f;
  f.wants = wants(type, {type, type});
  if (name == "add" || name == "sub" || name == "addc" || name == "subc") {
    const bool subtract = name[0] == 's', uses = name.size() == 4, sets = m.take("cc");
    if (uses || sets) {
      f.flags = (uses ? kUsesCarry : 0) | (sets ? kSetsCarry : 0) | (subtract ? kBorrows : 0);
      f.run = PTX_RUN(run_add_carry);
    } else if (m.take("sat")) {
      if (type == Type::kS32) f.run = subtract ? run_sub_clamped<int32_t> : run_add_clamped<int32_t>;
    } else if (type == Type::kU16x2 || type == Type::kS16x2) {
      if (!subtract) f.run = run_add_halves;
    } else {
      f.run = subtract ? PTX_RUN(run_sub) : PTX_RUN(run_add);
    }
  } else if (name == "div" || name == "rem") {
    const bool rem = name == "rem";
    f.run = for_integer(
        type, [rem](auto t) -> Run { return rem ? run_div<decltype(t), true> : run_div<decltype(t), false>; });
  } else if (name == "abs" || name == "neg") {
    f.wants = wants(type, {type});
    if (is_signed(type)) f.run = name == "abs" ? PTX_RUN(run_abs) : PTX_RUN(run_neg);
  } else if (name == "mul24" || name == "mad24") {
    f.flags = m.take("hi");
    if (!f.flags) m.take("lo");
    if (name == "mad24") f.wants.push_back({Want::kRead, type});
    f.run = type == Type::kS32 ? run_mad24<int32_t> : type == Type::kU32 ? run_mad24<uint32_t> : nullptr;
  } else if (name == "sad") {
    f.wants.push_back({Want::kRead, type});
    f.run = PTX_RUN(run_sad);
  }
  return f;
}

}  // namespace ptx
