// Whole numbers: sums, products, shifted sums, choices, comparisons.

#include "warp.h"

namespace sass {
namespace {

constexpr uint64_t kHalf = uint64_t{1} << 32;

int64_t extended(uint32_t value, bool is_signed) {
  return is_signed ? static_cast<int64_t>(static_cast<int32_t>(value)) : static_cast<int64_t>(value);
}

// Predicates at the end of the operands: carries.
int carries(const Instruction& i, int first) {
  int n = 0;
  while (first + n < static_cast<int>(i.operands.size()) &&
         (i.operands[first + n].kind == Kind::kP || i.operands[first + n].kind == Kind::kUP))
    ++n;
  return n;
}

// ---- sums ----

// The summand of a 32-bit sum: -x is ~x + 1, so that a carry out of it is the hardware's.
uint64_t summand(const Operand& o, uint32_t x) {
  return o.negated ? uint64_t{static_cast<uint32_t>(~x)} + 1 : o.inverted ? static_cast<uint32_t>(~x) : x;
}

// Without carries, which is most of them.
void run_plain_add(Warp& w, const Instruction& i) {
  Vec out, scratch[3];
  const Vec &a = w.read(i, i.source(0), scratch[0]), &b = w.read(i, i.source(1), scratch[1]);
  if (i.size == 2) {
    out.known = a.known & b.known;
    for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = a.v[lane] + b.v[lane];
  } else {
    const Vec& c = w.read(i, i.source(2), scratch[2]);
    out.known = a.known & b.known & c.known;
    for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = a.v[lane] + b.v[lane] + c.v[lane];
  }
  w.put(i.operands[0], out);
}

void run_add(Warp& w, const Instruction& i) {
  const int n = i.size;  // summands
  Vec out, scratch[3];
  const Vec* x[3];
  out.known = kAll;
  for (int k = 0; k < n; ++k) {
    x[k] = &w.plain(i, i.source(k), scratch[k]);
    out.known &= x[k]->known;
  }
  uint32_t carry_in[2] = {}, first = 0, second = 0;
  for (int k = 0; i.extended && k < carries(i, i.results + n); ++k) {
    const Mask m = w.predicate(i.source(n + k));
    carry_in[k] = m.v;
    out.known &= m.known;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    uint64_t sum = (carry_in[0] >> lane & 1) + (carry_in[1] >> lane & 1);
    for (int k = 0; k < n; ++k) sum += summand(i.source(k), x[k]->v[lane]);
    out.v[lane] = static_cast<uint32_t>(sum);
    first |= static_cast<uint32_t>(sum >= kHalf) << lane;
    second |= static_cast<uint32_t>(sum >= 2 * kHalf) << lane;
  }
  w.put(i.operands[0], out);
  if (i.results > 1) w.put(i.operands[1], Mask{first, out.known});
  if (i.results > 2) w.put(i.operands[2], Mask{second, out.known});
}

void run_add_wide(Warp& w, const Instruction& i) {
  Vec low = Vec::of(0), high = Vec::of(0), a, b;
  for (int k = 0; k < i.size; ++k) {
    const Operand& o = i.source(k);
    const Vec &x = w.plain(i, o, a), &y = w.plain(i, o, b, 1);
    low.known &= x.known & y.known;
    for (int lane = 0; lane < kWarp; ++lane) {
      uint64_t value = uint64_t{y.v[lane]} << 32 | x.v[lane];
      if (o.negated) value = 0 - value;
      const uint64_t sum = (uint64_t{high.v[lane]} << 32 | low.v[lane]) + value;
      low.v[lane] = static_cast<uint32_t>(sum);
      high.v[lane] = static_cast<uint32_t>(sum >> 32);
    }
  }
  high.known = low.known;
  w.put(i.operands[0], low);
  w.put(i.operands[0], high, 1);
}

bool decode_add(Instruction& i) {
  i.extended = i.take("X");
  i.size = i.name == "VIADD" ? 2 : 3;
  i.run = i.extended || i.results > 1 ? run_add : run_plain_add;
  if (i.take("64")) {
    i.run = run_add_wide;
    if (i.results > 1 && i.operands[1].number != kPT) return false;
  }
  return i.sources() >= i.size;
}

// ---- products ----

enum Part { kLow, kHigh, kWide };

// The lower half of a product, without a carry: whether its operands have signs does not matter.
void run_plain_multiply(Warp& w, const Instruction& i) {
  Vec out, scratch[3];
  const Vec &a = w.read(i, i.source(0), scratch[0]), &b = w.read(i, i.source(1), scratch[1]);
  const Vec& c = w.read(i, i.source(2), scratch[2]);
  out.known = a.known & b.known & c.known;
  for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = a.v[lane] * b.v[lane] + c.v[lane];
  w.put(i.operands[0], out);
}

void run_multiply(Warp& w, const Instruction& i) {
  Vec sa, sb, s[2], low, high;
  const Operand &oa = i.source(0), &ob = i.source(1), &oc = i.source(2);
  const Vec &a = w.plain(i, oa, sa), &b = w.plain(i, ob, sb);
  const bool wide = i.form != kLow;
  const Vec &c = w.plain(i, oc, s[0]), &d = wide ? w.plain(i, oc, s[1], 1) : c;
  uint32_t carry = 0, out = 0;
  low.known = a.known & b.known & c.known & d.known;
  if (i.extended) {
    const Mask m = w.predicate(i.source(3));
    carry = m.v;
    low.known &= m.known;
  }
  const bool negative = oa.negated != ob.negated;
  for (int lane = 0; lane < kWarp; ++lane) {
    uint64_t product = static_cast<uint64_t>(extended(a.v[lane], i.is_signed) * extended(b.v[lane], i.is_signed));
    if (negative) product = 0 - product;
    uint64_t plus = wide ? uint64_t{d.v[lane]} << 32 | c.v[lane] : c.v[lane];
    if (oc.negated) plus = 0 - plus;
    if (oc.inverted) plus = ~plus;
    const uint64_t before = product;
    product += plus;
    bool over = product < before;
    product += carry >> lane & 1;
    over |= (carry >> lane & 1) && product == 0;
    out |= static_cast<uint32_t>(over) << lane;
    low.v[lane] = static_cast<uint32_t>(i.form == kHigh ? product >> 32 : product);
    high.v[lane] = static_cast<uint32_t>(product >> 32);
  }
  high.known = low.known;
  w.put(i.operands[0], low);
  if (i.form == kWide) w.put(i.operands[0], high, 1);
  if (i.results > 1) w.put(i.operands[1], Mask{out, low.known});
}

bool decode_multiply(Instruction& i) {
  i.extended = i.take("X");
  i.form = i.take("WIDE") ? kWide : i.take("HI") ? kHigh : kLow;
  i.is_signed = !i.take("U32");
  i.take("MOV");
  i.take("IADD");
  i.take("SHL");
  i.run = i.form == kLow && !i.extended ? run_plain_multiply : run_multiply;
  if (i.results > 1 && i.form == kLow && i.operands[1].number != kPT) return false;
  return i.sources() >= (i.extended ? 4 : 3);
}

// ---- shifted sums ----

void run_lea(Warp& w, const Instruction& i) {
  // LEA d = (a << n) + b; with HI: the upper half of ((c, a) << n), plus b. SX32: c is the sign of a.
  Vec sa, sb, sc, out;
  const bool high = i.form != 0, from_sign = i.form == 2;
  const Operand& ob = i.source(1);
  const Vec &a = w.read(i, i.source(0), sa), &b = w.plain(i, ob, sb);
  const Vec& c = high && !from_sign ? w.plain(i, i.source(2), sc) : a;
  const int shift = i.size;
  out.known = a.known & b.known & c.known;
  uint32_t carry = 0, over = 0;
  if (i.extended) {
    const Mask m = w.predicate(i.operands[i.number]);
    carry = m.v;
    out.known &= m.known;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t upper = !high ? 0 : from_sign ? (static_cast<int32_t>(a.v[lane]) < 0 ? kAll : 0) : c.v[lane];
    const uint64_t shifted = (uint64_t{upper} << 32 | a.v[lane]) << shift;
    const uint32_t part = static_cast<uint32_t>(high ? shifted >> 32 : shifted);
    const uint64_t sum = uint64_t{part} + summand(ob, b.v[lane]) + (carry >> lane & 1);
    out.v[lane] = static_cast<uint32_t>(sum);
    over |= static_cast<uint32_t>(sum >= kHalf) << lane;
  }
  w.put(i.operands[0], out);
  if (i.results > 1) w.put(i.operands[1], Mask{over, out.known});
}

bool decode_lea(Instruction& i) {
  i.extended = i.take("X");
  const bool high = i.take("HI");
  i.form = high ? (i.take("SX32") ? 2 : 1) : 0;
  const int shift = i.form == 1 ? 3 : 2;
  if (i.sources() <= shift || i.source(shift).kind != Kind::kImmediate) return false;
  i.size = static_cast<int>(i.source(shift).value[0].v[0] & 31);
  i.number = i.results + shift + 1;
  i.run = run_lea;
  if (i.form == 1 && (i.source(0).negated || i.source(0).inverted)) return false;
  return !i.extended || static_cast<int>(i.operands.size()) > i.number;
}

// ---- choices ----

// Lanes where the predicate is known take one operand only, and need not know the other.
void choose(Warp& w, const Instruction& i, const Vec& a, const Vec& b, Mask p) {
  Vec out;
  out.known = (p.v & a.known) | (~p.v & b.known);
  for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = p.v >> lane & 1 ? a.v[lane] : b.v[lane];
  uint32_t same = 0;
  if (p.known != kAll)
    for (int lane = 0; lane < kWarp; ++lane) same |= static_cast<uint32_t>(a.v[lane] == b.v[lane]) << lane;
  out.known &= p.known | (same & a.known & b.known);
  w.put(i.operands[0], out);
}

void run_select(Warp& w, const Instruction& i) {
  Vec sa, sb;
  const Vec &a = w.read(i, i.source(0), sa), &b = w.read(i, i.source(1), sb);
  choose(w, i, a, b, w.predicate(i.source(2)));
}

bool decode_select(Instruction& i) {
  i.run = run_select;
  return i.sources() >= 3;
}

bool less(uint32_t a, uint32_t b, bool is_signed) {
  return is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
}

void run_minimum(Warp& w, const Instruction& i) {
  // The last operand is true for the minimum. VIADDMNMX adds its first two operands before.
  Vec sa, sb, sc, out;
  const int n = i.size;
  const Vec &a = w.read(i, i.source(0), sa), &b = w.read(i, i.source(1), sb);
  const Vec& c = n == 3 ? w.read(i, i.source(2), sc) : b;
  const Mask minimum = w.predicate(i.source(n));
  out.known = a.known & b.known & c.known & minimum.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t x = n == 3 ? a.v[lane] + b.v[lane] : a.v[lane], y = c.v[lane];
    out.v[lane] = less(x, y, i.is_signed) == static_cast<bool>(minimum.v >> lane & 1) ? x : y;
  }
  w.put(i.operands[0], out);
}

bool decode_minimum(Instruction& i) {
  i.is_signed = !i.take("U32");
  i.size = i.name == "VIADDMNMX" ? 3 : 2;
  i.run = run_minimum;
  if (i.take("RELU")) return false;
  return i.results == 1 && i.sources() == i.size + 1;
}

// ---- comparisons ----

enum Order { kEq, kNe, kLt, kLe, kGt, kGe };

template <class F>
uint32_t lanes_where(const Vec& a, const Vec& b, F holds) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarp; ++lane) lanes |= static_cast<uint32_t>(holds(a.v[lane], b.v[lane])) << lane;
  return lanes;
}

uint32_t compared(int order, const Vec& a, const Vec& b, bool is_signed) {
  const auto below = [](const Vec& x, const Vec& y, bool with_sign) {
    return with_sign ? lanes_where(x, y, [](uint32_t p, uint32_t q) { return less(p, q, true); })
                     : lanes_where(x, y, [](uint32_t p, uint32_t q) { return less(p, q, false); });
  };
  const auto equal = [&] { return lanes_where(a, b, [](uint32_t p, uint32_t q) { return p == q; }); };
  switch (order) {
    case kEq:
      return equal();
    case kNe:
      return ~equal();
    case kLt:
      return below(a, b, is_signed);
    case kLe:
      return ~below(b, a, is_signed);
    case kGt:
      return below(b, a, is_signed);
    default:
      return ~below(a, b, is_signed);
  }
}

void run_compare(Warp& w, const Instruction& i) {
  Vec sa, sb;
  const Vec &a = w.read(i, i.source(0), sa), &b = w.read(i, i.source(1), sb);
  Mask is{compared(i.form, a, b, i.is_signed), a.known & b.known};
  if (i.extended) {  // the upper halves: the lower ones decide where these are equal
    const Mask lower = w.predicate(i.source(3));
    uint32_t equal = 0;
    for (int lane = 0; lane < kWarp; ++lane) equal |= static_cast<uint32_t>(a.v[lane] == b.v[lane]) << lane;
    is.v = (is.v & ~equal) | (lower.v & equal);
    is.known &= lower.known | ~equal;
  }
  is.v &= is.known;
  const Mask other = w.predicate(i.source(2));
  const auto joined = [&](uint32_t mine) {
    Mask m;
    switch (i.size) {
      case 0:  // false if either is known to be
        m = {mine & other.v, (is.known & other.known) | (is.known & ~mine) | (other.known & ~other.v)};
        break;
      case 1:
        m = {mine | other.v, (is.known & other.known) | (is.known & mine) | (other.known & other.v)};
        break;
      default:
        m = {mine ^ other.v, is.known & other.known};
    }
    m.v &= m.known;
    return m;
  };
  const Mask first = joined(is.v), second = joined(~is.v & is.known);
  w.put(i.operands[0], first);
  w.put(i.operands[1], second);
}

bool decode_compare(Instruction& i) {
  static const char* const kOrders[] = {"EQ", "NE", "LT", "LE", "GT", "GE"};
  i.form = -1;
  for (int n = 0; n < 6; ++n)
    if (i.take(kOrders[n])) i.form = n;
  i.is_signed = !i.take("U32");
  i.size = i.take("AND") ? 0 : i.take("OR") ? 1 : i.take("XOR") ? 2 : -1;
  i.extended = i.take("EX");
  i.run = run_compare;
  return i.form >= 0 && i.size >= 0 && i.results == 2 && i.sources() >= (i.extended ? 4 : 3);
}

}  // namespace

const std::map<std::string, Decoder>& integer_decoders() {
  static const std::map<std::string, Decoder> all = {
      {"IADD3", decode_add},      {"UIADD3", decode_add},     {"VIADD", decode_add},      {"IMAD", decode_multiply},
      {"UIMAD", decode_multiply}, {"LEA", decode_lea},        {"ULEA", decode_lea},       {"SEL", decode_select},
      {"USEL", decode_select},    {"IMNMX", decode_minimum},  {"VIMNMX", decode_minimum}, {"VIADDMNMX", decode_minimum},
      {"ISETP", decode_compare},  {"UISETP", decode_compare},
  };
  return all;
}

}  // namespace sass
