// Bits: logic, shifts, permutations, moves, and functions of one number's bits.

#include <algorithm>

#include "warp.h"

namespace sass {
namespace {

void run_lop3(Warp& w, const Instruction& i) {
  Vec sa, sb, sc, out;
  const Vec &a = w.read(i, i.source(0), sa), &b = w.read(i, i.source(1), sb), &c = w.read(i, i.source(2), sc);
  const auto table = static_cast<uint32_t>(i.number);
  const uint32_t known = a.known & b.known & c.known;
  if (table == 0xc0) {
    for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = a.v[lane] & b.v[lane];
  } else {
    for (uint32_t& lane : out.v) lane = 0;
    for (int n = 0; n < 8; ++n) {
      if (!(table >> n & 1)) continue;
      const uint32_t x = n & 4 ? 0 : kAll, y = n & 2 ? 0 : kAll, z = n & 1 ? 0 : kAll;
      for (int lane = 0; lane < kWarp; ++lane) out.v[lane] |= (a.v[lane] ^ x) & (b.v[lane] ^ y) & (c.v[lane] ^ z);
    }
  }
  out.known = known;
  // Bit by bit where an operand is unknown: ptxas keeps predicates as bits of a register that nobody has set as a
  // whole.
  uint32_t unknown[kWarp] = {};
  for (int lane = 0; known != kAll && lane < kWarp; ++lane) {
    if (known >> lane & 1) continue;
    const uint32_t u[3] = {w.unknown_of(i.source(0), a, lane), w.unknown_of(i.source(1), b, lane),
                           w.unknown_of(i.source(2), c, lane)};
    const uint32_t x[3] = {a.v[lane], b.v[lane], c.v[lane]};
    uint32_t may_be[2] = {0, 0};
    for (int n = 0; n < 8; ++n) {
      uint32_t fits = kAll;
      for (int k = 0; k < 3; ++k) fits &= u[k] | (n >> (2 - k) & 1 ? x[k] : ~x[k]);
      may_be[table >> n & 1] |= fits;
    }
    unknown[lane] = may_be[0] & may_be[1];
    out.v[lane] = may_be[1] & ~may_be[0];
    if (unknown[lane] == 0) out.known |= 1u << lane;
  }
  w.put(i.operands[i.results - 1], out, 0, unknown);
  if (i.results == 1) return;
  Mask any{0, kAll};
  for (int lane = 0; lane < kWarp; ++lane) {
    any.v |= static_cast<uint32_t>(out.v[lane] != 0) << lane;
    if (out.v[lane] == 0 && unknown[lane] != 0) any.known &= ~(1u << lane);
  }
  const Mask also = w.predicate(i.source(4));
  w.put(i.operands[0],
        i.flag ? Mask{any.v & also.v, any.known & also.known} : Mask{any.v | also.v, any.known & also.known});
}

bool decode_lop3(Instruction& i) {
  i.take("LUT");
  i.flag = i.take("PAND");
  if (i.sources() < 4 || i.source(3).kind != Kind::kImmediate) return false;
  if (i.results > 1 && i.sources() < 5) return false;
  i.number = i.source(3).value[0].v[0];
  i.run = run_lop3;
  return true;
}

void run_shift(Warp& w, const Instruction& i) {
  Vec sa, ss, sc, out;
  const Vec &a = w.read(i, i.source(0), sa), &s = w.read(i, i.source(1), ss), &c = w.read(i, i.source(2), sc);
  const uint32_t width = static_cast<uint32_t>(i.size);
  out.known = a.known & s.known & c.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint64_t value = uint64_t{c.v[lane]} << 32 | a.v[lane];
    const uint32_t n = i.flag ? s.v[lane] & (width - 1) : std::min(s.v[lane], width);
    uint64_t shifted;
    if (i.form == 0)
      shifted = n > 63 ? 0 : value << n;
    else if (i.is_signed)
      shifted = static_cast<uint64_t>(static_cast<int64_t>(value) >> std::min(n, 63u));
    else
      shifted = n > 63 ? 0 : value >> n;
    out.v[lane] = static_cast<uint32_t>(i.extended ? shifted >> 32 : shifted);
  }
  w.put(i.operands[0], out);
}

bool decode_shift(Instruction& i) {
  i.form = i.take("L") ? 0 : i.take("R") ? 1 : -1;
  i.flag = i.take("W");
  i.extended = i.take("HI");
  const bool wide = i.take("S64") || i.take("U64");
  i.is_signed = i.opcode.find(".S64") != std::string::npos || i.take("S32");
  i.take("U32");
  i.size = wide ? 64 : 32;
  i.run = run_shift;
  return i.form >= 0 && i.sources() >= 3;
}

void run_permute(Warp& w, const Instruction& i) {
  Vec sa, ss, sb, out;
  const Vec &a = w.read(i, i.source(0), sa), &s = w.read(i, i.source(1), ss), &b = w.read(i, i.source(2), sb);
  out.known = s.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint64_t bytes = uint64_t{b.v[lane]} << 32 | a.v[lane];
    uint32_t value = 0;
    bool from_a = false, from_b = false;
    for (int n = 0; n < 4; ++n) {
      const uint32_t pick = s.v[lane] >> 4 * n & 15;
      (pick & 4 ? from_b : from_a) = true;
      uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (pick & 7)) & 0xff;
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      value |= byte << 8 * n;
    }
    out.v[lane] = value;
    if ((from_a && !(a.known >> lane & 1)) || (from_b && !(b.known >> lane & 1))) out.known &= ~(1u << lane);
  }
  w.put(i.operands[0], out);
}

bool decode_permute(Instruction& i) {
  i.run = run_permute;
  return i.sources() >= 3;
}

template <class F>
void map1(Warp& w, const Instruction& i, F f) {
  Vec sa, out;
  const Vec& a = w.read(i, i.source(0), sa);
  out.known = a.known;
  for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = f(a.v[lane]);
  w.put(i.operands[0], out);
}

template <class F>
void map2(Warp& w, const Instruction& i, F f) {
  Vec sa, sb, out;
  const Vec &a = w.read(i, i.source(0), sa), &b = w.read(i, i.source(1), sb);
  out.known = a.known & b.known;
  for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = f(a.v[lane], b.v[lane]);
  w.put(i.operands[0], out);
}

void run_move(Warp& w, const Instruction& i) {
  Vec scratch;
  const Operand& from = i.source(0);
  const Vec& x = w.read(i, from, scratch);
  if (x.known == kAll) return w.put(i.operands[0], x);
  uint32_t unknown[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) unknown[lane] = w.unknown_of(from, x, lane);
  w.put(i.operands[0], Vec(x), 0, unknown);
}

bool decode_move(Instruction& i) {
  i.take("32");
  i.run = run_move;
  return i.sources() >= 1;
}

void run_abs(Warp& w, const Instruction& i) {
  map1(w, i, [](uint32_t x) { return static_cast<int32_t>(x) < 0 ? 0 - x : x; });
}

bool decode_abs(Instruction& i) {
  i.run = run_abs;
  return true;
}

void run_find(Warp& w, const Instruction& i) {
  // The place of the highest bit that differs from the sign, or -1; with SH counted from the top.
  map1(w, i, [&](uint32_t x) -> uint32_t {
    if (i.is_signed && static_cast<int32_t>(x) < 0) x = ~x;
    if (x == 0) return kAll;
    const auto place = static_cast<uint32_t>(31 - __builtin_clz(x));
    return i.flag ? 31 - place : place;
  });
}

bool decode_find(Instruction& i) {
  i.is_signed = !i.take("U32");
  i.flag = i.take("SH");
  i.run = run_find;
  return i.results == 1;
}

void run_count(Warp& w, const Instruction& i) {
  map1(w, i, [](uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); });
}

bool decode_count(Instruction& i) {
  i.run = run_count;
  return true;
}

void run_reverse(Warp& w, const Instruction& i) {
  map1(w, i, [](uint32_t x) {
    uint32_t out = 0;
    for (int n = 0; n < 32; ++n) out |= (x >> n & 1) << (31 - n);
    return out;
  });
}

bool decode_reverse(Instruction& i) {
  i.run = run_reverse;
  return true;
}

void run_extend(Warp& w, const Instruction& i) {
  map2(w, i, [&](uint32_t x, uint32_t n) -> uint32_t {
    n = i.flag ? n & 31 : std::min(n, 32u);
    if (n == 0) return 0;
    if (n == 32) return x;
    return i.is_signed ? static_cast<uint32_t>(static_cast<int32_t>(x << (32 - n)) >> (32 - n)) : x & ((1u << n) - 1);
  });
}

bool decode_extend(Instruction& i) {
  i.is_signed = !i.take("U32");
  i.flag = i.take("W");
  i.run = run_extend;
  return i.sources() >= 2;
}

void run_mask(Warp& w, const Instruction& i) {
  map2(w, i, [&](uint32_t first, uint32_t n) -> uint32_t {
    if (i.flag) first &= 31, n &= 31;
    if (first > 31 || n == 0) return 0;
    return (n > 31 ? kAll : (1u << n) - 1) << first;
  });
}

bool decode_mask(Instruction& i) {
  i.flag = i.take("W");
  i.take("C");
  i.run = run_mask;
  return i.sources() >= 2;
}

}  // namespace

const std::map<std::string, Decoder>& bit_decoders() {
  static const std::map<std::string, Decoder> all = {
      {"LOP3", decode_lop3},    {"ULOP3", decode_lop3},    {"SHF", decode_shift},     {"USHF", decode_shift},
      {"PRMT", decode_permute}, {"UPRMT", decode_permute}, {"MOV", decode_move},      {"UMOV", decode_move},
      {"IABS", decode_abs},     {"FLO", decode_find},      {"UFLO", decode_find},     {"POPC", decode_count},
      {"UPOPC", decode_count},  {"BREV", decode_reverse},  {"UBREV", decode_reverse}, {"SGXT", decode_extend},
      {"USGXT", decode_extend}, {"BMSK", decode_mask},     {"UBMSK", decode_mask},
  };
  return all;
}

}  // namespace sass
