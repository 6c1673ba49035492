// Logic, shifts, bit fields and permutations of bytes.

#include <algorithm>

#include "apply.h"
#include "families.h"

namespace ptx {
namespace {

template <class T>
constexpr int kBits = 8 * sizeof(T);

enum Logic : uint32_t { kAnd, kOr, kXor };

// A 0 in one operand of `and`, and a 1 of `or`, decide the bit alone, even if the other is undefined.
template <class T, Logic kLogic>
void run_logic(Warp& w, const Instruction& i) {
  const auto logic = [](T a, T b) { return static_cast<T>(kLogic == kAnd ? a & b : kLogic == kOr ? a | b : a ^ b); };
  apply_bits<T, T, T>(w, i, logic, [](Partial<T> a, Partial<T> b) {
    const T either = a.undefined | b.undefined, could_be = kLogic == kAnd ? T(~T{0}) : T{0};
    if (kLogic == kXor) return either;
    const auto open = [&](Partial<T> p) { return static_cast<T>(p.undefined | (p.value ^ could_be ^ T(~T{0}))); };
    return static_cast<T>(either & open(a) & open(b));
  });
}
template <class T>
void run_not(Warp& w, const Instruction& i) {
  apply_bits<T, T>(w, i, [](T a) { return static_cast<T>(~a); }, [](Partial<T> a) { return a.undefined; });
}
template <class T>
void run_cnot(Warp& w, const Instruction& i) {
  apply<T, T>(w, i, [](T a) { return static_cast<T>(a == 0); });
}

void run_logic_predicate(Warp& w, const Instruction& i) {
  const uint32_t a = w.mask(i.slot[1]), b = w.mask(i.slot[2]);
  const uint32_t has_a = w.defined(i, i.slot[1]), has_b = w.defined(i, i.slot[2]);
  if (i.flags == kXor) return w.put_mask(i, i.slot[0], a ^ b, has_a & has_b);
  const bool conjunction = i.flags == kAnd;
  w.put_mask(i, i.slot[0], conjunction ? a & b : a | b, defined_logic(conjunction, a, has_a, b, has_b));
}
void run_not_predicate(Warp& w, const Instruction& i) {
  w.put_mask(i, i.slot[0], ~w.mask(i.slot[1]), w.defined(i, i.slot[1]));
}

// Bit k of the table is the result where the bits of a, b and c are 1 in k = 4 a + 2 b + c.
void run_lop3(Warp& w, const Instruction& i) {
  const auto table = static_cast<uint32_t>(i.slot[4].plus);
  const auto look_up = [table](uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return out;
  };
  using Word = Partial<uint32_t>;
  apply_bits<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, look_up, [table](Word a, Word b, Word c) {
    uint32_t may_be[2] = {0, 0};
    const auto may = [](Word p, int bit) { return bit ? p.value | p.undefined : ~p.value; };
    for (int k = 0; k < 8; ++k) may_be[table >> k & 1] |= may(a, k & 4) & may(b, k & 2) & may(c, k & 1);
    return may_be[0] & may_be[1];
  });
}

// An operation that copies bits of its first operand, or sets them, as its other operands say. So the undefined bits of
// the result are what it makes of the undefined bits.
template <class T, class F>
void copy_bits(Warp& w, const Instruction& i, F f) {
  apply_bits<T, T>(w, i, f, [f](Partial<T> a) { return f(a.undefined); });
}
template <class T, class F>
void copy_bits_by(Warp& w, const Instruction& i, F f) {
  apply_bits<T, T, uint32_t>(w, i, f, [f](Partial<T> a, Partial<uint32_t> n) {
    return n.undefined ? static_cast<T>(~T{0}) : f(a.undefined, n.value);
  });
}

// Amounts above the width shift everything out.
template <class T>
void run_shl(Warp& w, const Instruction& i) {
  copy_bits_by<T>(w, i, [](T a, uint32_t n) {
    return n >= kBits<T> ? T{0} : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << n);
  });
}
template <class T>
void run_shr(Warp& w, const Instruction& i) {
  copy_bits_by<T>(w, i, [](T a, uint32_t n) {
    if (std::is_signed_v<T>) return static_cast<T>(a >> std::min<uint32_t>(n, kBits<T> - 1));
    return n >= kBits<T> ? T{0} : static_cast<T>(a >> n);
  });
}
// Of two operands, as the third says.
template <class F>
void copy_bits_of_two(Warp& w, const Instruction& i, F f) {
  using Word = Partial<uint32_t>;
  apply_bits<uint32_t, uint32_t, uint32_t, uint32_t>(
      w, i, f, [f](Word a, Word b, Word c) { return c.undefined ? ~0u : f(a.undefined, b.undefined, c.value); });
}

// A shift of 64 bits, b above a, of which one half is kept.
void run_funnel(Warp& w, const Instruction& i) {
  const bool left = i.flags & 1, wrap = i.flags & 2;
  copy_bits_of_two(w, i, [left, wrap](uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t n = wrap ? c & 31 : std::min(c, 32u);
    const uint64_t both = uint64_t{b} << 32 | a;
    return static_cast<uint32_t>(left ? both << n >> 32 : both >> n);
  });
}

template <class T>
void run_bfe(Warp& w, const Instruction& i) {
  using U = std::make_unsigned_t<T>;
  const auto extract = [](T a, uint32_t start, uint32_t length) {
    const uint32_t from = start & 0xff, bits = length & 0xff;
    if (bits == 0) return T{0};
    const U all = from >= kBits<T> ? U{0} : static_cast<U>(static_cast<U>(a) >> from);
    const U mask = bits >= kBits<T> ? static_cast<U>(~U{0}) : static_cast<U>((U{1} << bits) - 1);
    const uint32_t last = std::min<uint32_t>(from + bits - 1, kBits<T> - 1);
    const bool sign = std::is_signed_v<T> && (static_cast<U>(a) >> last & 1);
    // Bits past the end of a are copies of its sign.
    const uint32_t have = from >= kBits<T> ? 0 : std::min<uint32_t>(bits, kBits<T> - from);
    const U real = have >= kBits<T> ? static_cast<U>(~U{0}) : static_cast<U>((U{1} << have) - 1);
    return static_cast<T>(sign ? (all & mask & real) | static_cast<U>(~real) : (all & mask & real));
  };
  using Word = Partial<uint32_t>;
  apply_bits<T, T, uint32_t, uint32_t>(w, i, extract, [extract](Partial<T> a, Word start, Word length) {
    return start.undefined || length.undefined ? static_cast<T>(~T{0})
                                               : extract(a.undefined, start.value, length.value);
  });
}
template <class T>
void run_bfi(Warp& w, const Instruction& i) {
  const T *a = w.in<T>(i.slot[1]), *b = w.in<T>(i.slot[2]);
  const uint32_t *start = w.in<uint32_t>(i.slot[3]), *length = w.in<uint32_t>(i.slot[4]);
  T out[kWarp], undefined[kWarp];
  const uint32_t places = w.defined(i, i.slot[3]) & w.defined(i, i.slot[4]);
  const uint32_t defined = w.defined(i, i.slot[1]) & w.defined(i, i.slot[2]) & places;
  const bool partly = (w.active & ~defined) != 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t from = start[lane] & 0xff, bits = length[lane] & 0xff;
    const T field = bits >= kBits<T> ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << bits) - 1);
    const T mask = from >= kBits<T> ? T{0} : static_cast<T>(field << from);
    const auto insert = [&](T field, T into) {
      const T moved = from >= kBits<T> ? T{0} : static_cast<T>(field << from);
      return static_cast<T>((into & ~mask) | (moved & mask));
    };
    out[lane] = insert(a[lane], b[lane]);
    if (!partly) continue;
    undefined[lane] = insert(w.undefined_in<T>(i.slot[1], lane), w.undefined_in<T>(i.slot[2], lane));
    if (!(places >> lane & 1)) undefined[lane] = static_cast<T>(~T{0});
  }
  w.put(i, i.slot[0], out, defined);
  if (partly) w.note_bits(i.slot[0], undefined);
}

template <class T>
int leading_zeros(T a) {
  if (a == 0) return kBits<T>;
  return sizeof(T) == 8 ? __builtin_clzll(a) : __builtin_clz(static_cast<uint32_t>(a));
}
template <class T>
void run_clz(Warp& w, const Instruction& i) {
  apply<uint32_t, T>(w, i, [](T a) { return static_cast<uint32_t>(leading_zeros(a)); });
}
template <class T>
void run_popc(Warp& w, const Instruction& i) {
  apply<uint32_t, T>(w, i, [](T a) { return static_cast<uint32_t>(__builtin_popcountll(a)); });
}
template <class T>
void run_brev(Warp& w, const Instruction& i) {
  copy_bits<T>(w, i, [](T a) {
    T out = 0;
    for (int bit = 0; bit < kBits<T>; ++bit) out |= static_cast<T>((a >> bit & 1) << (kBits<T> - 1 - bit));
    return out;
  });
}
// The place of the highest bit that differs from the sign, or -1.
template <class T>
void run_bfind(Warp& w, const Instruction& i) {
  using U = std::make_unsigned_t<T>;
  const bool shift = i.flags != 0;
  apply<uint32_t, T>(w, i, [shift](T a) {
    const auto bits = static_cast<U>(std::is_signed_v<T> && a < 0 ? ~a : a);
    if (bits == 0) return ~uint32_t{0};
    const auto zeros = static_cast<uint32_t>(leading_zeros(bits));
    return shift ? zeros : kBits<T> - 1 - zeros;
  });
}

// Which of the eight bytes of a and b each mode selects, lowest result byte last, by the low two bits of c.
constexpr uint16_t kModes[][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543},  // f4e
    {0x5670, 0x6701, 0x7012, 0x0123},  // b4e
    {0x0000, 0x1111, 0x2222, 0x3333},  // rc8
    {0x3210, 0x3211, 0x3222, 0x3333},  // ecl
    {0x0000, 0x1110, 0x2210, 0x3210},  // ecr
    {0x1010, 0x3232, 0x1010, 0x3232},  // rc16
};
constexpr const char* kModeNames[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};

void run_prmt(Warp& w, const Instruction& i) {
  const auto mode = static_cast<int>(i.number);
  copy_bits_of_two(w, i, [mode](uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    const uint32_t selectors = mode < 0 ? c : kModes[mode][c & 3];
    uint32_t out = 0;
    for (int n = 0; n < 4; ++n) {
      const uint32_t selector = selectors >> 4 * n & 0xf;
      uint32_t byte = bytes >> 8 * (selector & 7) & 0xff;
      if (selector & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, eight times
      out |= byte << 8 * n;
    }
    return out;
  });
}

// The low b bits of a, with or without sign.
void run_szext(Warp& w, const Instruction& i) {
  const bool wrap = i.flags != 0, with_sign = i.type == Type::kS32;
  copy_bits_by<uint32_t>(w, i, [wrap, with_sign](uint32_t a, uint32_t b) {
    const uint32_t n = b & 31;
    if (!wrap && b >= 32) return a;
    const uint32_t above = ~0u << n;
    const bool sign = with_sign && n > 0 && (a >> (n - 1) & 1);
    return sign ? a | above : a & ~above;
  });
}
// b ones from bit a on.
void run_bmsk(Warp& w, const Instruction& i) {
  const bool wrap = i.flags != 0;
  apply<uint32_t, uint32_t, uint32_t>(w, i, [wrap](uint32_t a, uint32_t b) {
    if (!wrap && a >= 32) return 0u;
    const uint32_t from = a & 31, bits = !wrap && b >= 32 ? 32 : b & 31;
    const uint64_t ones = ((uint64_t{1} << bits) - 1) << from;
    return static_cast<uint32_t>(ones);
  });
}

#define PTX_UNSIGNED(function)       \
  (bytes == 2   ? function<uint16_t> \
   : bytes == 4 ? function<uint32_t> \
   : bytes == 8 ? function<uint64_t> \
                : static_cast<Run>(nullptr))
#define PTX_LOGIC(logic)                     \
  (bytes == 2   ? run_logic<uint16_t, logic> \
   : bytes == 4 ? run_logic<uint32_t, logic> \
   : bytes == 8 ? run_logic<uint64_t, logic> \
                : static_cast<Run>(nullptr))

}  // namespace

Form decode_bits(Modifiers& m) {
  Form f;
  const std::string& name = m.name();
  if (name == "shf") {
    f.flags = (m.take("l") ? 1 : m.take("r") ? 0 : 4) | (m.take("wrap") ? 2 : m.take("clamp") ? 0 : 4);
    f.run = m.take("b32") && f.flags < 4 ? run_funnel : nullptr;
    f.wants = wants(Type::kB32, {Type::kB32, Type::kB32, Type::kU32});
    return f;
  }
  if (name == "prmt") {
    f.number = -1;
    if (m.take("b32")) f.run = run_prmt;
    for (int mode = 0; mode < 6; ++mode)
      if (m.take(kModeNames[mode])) f.number = mode;
    f.wants = wants(Type::kB32, {Type::kB32, Type::kB32, Type::kB32});
    return f;
  }
  if (name == "bfind") f.flags = m.take("shiftamt");
  if (name == "szext" || name == "bmsk") f.flags = m.take("wrap") || !m.take("clamp");
  const Type type = m.take_type();
  const int bytes = bytes_of(type);
  const bool plain = type == Type::kB16 || type == Type::kB32 || type == Type::kB64;
  f.type = type;
  f.wants = wants(type, {type, type});
  if (name == "and" || name == "or" || name == "xor") {
    f.flags = name == "and" ? kAnd : name == "or" ? kOr : kXor;
    f.run = !plain ? nullptr : name == "and" ? PTX_LOGIC(kAnd) : name == "or" ? PTX_LOGIC(kOr) : PTX_LOGIC(kXor);
    if (type == Type::kPred) f.run = run_logic_predicate;
  } else if (name == "not" || name == "cnot") {
    f.wants = wants(type, {type});
    if (plain) f.run = name == "not" ? PTX_UNSIGNED(run_not) : PTX_UNSIGNED(run_cnot);
    if (type == Type::kPred && name == "not") f.run = run_not_predicate;
  } else if (name == "lop3") {
    if (type == Type::kB32) f.run = run_lop3;
    f.wants = wants(type, {type, type, type});
    f.wants.push_back({Want::kConstant});
  } else if (name == "shl" || name == "shr") {
    f.wants = wants(type, {type, Type::kU32});
    if (name == "shl") {
      if (plain) f.run = PTX_UNSIGNED(run_shl);
    } else if (bytes >= 2 && !is_float(type)) {
      f.run = for_integer(type, [](auto t) -> Run { return run_shr<decltype(t)>; });
    }
  } else if (name == "bfe") {
    f.wants = wants(type, {type, Type::kU32, Type::kU32});
    if (bytes >= 4 && !plain) f.run = for_integer(type, [](auto t) -> Run { return run_bfe<decltype(t)>; });
  } else if (name == "bfi") {
    f.wants = wants(type, {type, type, Type::kU32, Type::kU32});
    f.run = type == Type::kB32 ? run_bfi<uint32_t> : type == Type::kB64 ? run_bfi<uint64_t> : nullptr;
  } else if (name == "clz" || name == "popc") {
    f.wants = wants(Type::kU32, {type});
    if (plain && bytes >= 4) f.run = name == "clz" ? PTX_UNSIGNED(run_clz) : PTX_UNSIGNED(run_popc);
  } else if (name == "brev") {
    f.wants = wants(type, {type});
    if (plain && bytes >= 4) f.run = PTX_UNSIGNED(run_brev);
  } else if (name == "bfind") {
    f.wants = wants(Type::kU32, {type});
    if (bytes >= 4 && !plain) f.run = for_integer(type, [](auto t) -> Run { return run_bfind<decltype(t)>; });
  } else if (name == "szext") {
    if (type == Type::kS32 || type == Type::kU32) f.run = run_szext;
  } else if (name == "bmsk") {
    if (type == Type::kB32) f.run = run_bmsk;
  }
  return f;
}

}  // namespace ptx
