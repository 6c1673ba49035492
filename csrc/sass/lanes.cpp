// Predicates, and what lanes tell each other.

#include <algorithm>

#include "warp.h"

namespace sass {
namespace {

// ---- predicates ----

void run_plop3(Warp& w, const Instruction& i) {
  const Mask x[3] = {w.predicate(i.source(0)), w.predicate(i.source(1)), w.predicate(i.source(2))};
  for (int result = 0; result < 2; ++result) {
    const uint32_t table = i.source(3 + result).value[0].v[0];
    uint32_t may_be[2] = {0, 0};  // lanes whose result can be false, true
    for (int n = 0; n < 8; ++n) {
      uint32_t fits = kAll;
      for (int k = 0; k < 3; ++k) fits &= ~x[k].known | (n >> (2 - k) & 1 ? x[k].v : ~x[k].v);
      may_be[table >> n & 1] |= fits;
    }
    w.put(i.operands[result], Mask{may_be[1] & ~may_be[0], may_be[0] ^ may_be[1]});
  }
}
bool decode_plop3(Instruction& i) {
  i.take("LUT");
  i.run = run_plop3;
  return i.results == 2 && i.sources() == 5;
}

// Seven predicates as bits of a register, and back.
void run_pack(Warp& w, const Instruction& i) {
  Vec sa, sm, out;
  const Vec &a = w.read(i, i.source(1), sa), &m = w.read(i, i.source(2), sm);
  const Mask* from = i.name == "UP2UR" ? w.up : w.p;
  out.known = m.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    uint32_t bits = 0, unknown = 0;
    for (int n = 0; n < 7; ++n) {
      bits |= (from[n].v >> lane & 1) << n;
      unknown |= (~from[n].known >> lane & 1) << n;
    }
    const uint32_t mask = m.v[lane] & 0x7f;
    out.v[lane] = (a.v[lane] & ~mask) | (bits & mask);
    if (unknown & mask) out.known &= ~(1u << lane);
  }
  out.known &= a.known;
  w.put(i.operands[0], out);
}
bool decode_pack(Instruction& i) {
  i.run = run_pack;
  return i.sources() == 3;
}

void run_unpack(Warp& w, const Instruction& i) {
  Vec sa, sm;
  const Vec &a = w.read(i, i.source(0), sa), &m = w.read(i, i.source(1), sm);
  Operand to;
  to.kind = i.name == "UR2UP" ? Kind::kUP : Kind::kP;
  for (to.number = 0; to.number < 7; ++to.number) {
    if (!(m.v[0] >> to.number & 1)) continue;
    Mask one{0, 0};
    for (int lane = 0; lane < kWarp; ++lane) {
      const bool known = !(w.unknown_of(i.source(0), a, lane) >> to.number & 1);
      one.known |= static_cast<uint32_t>(known) << lane;
      one.v |= (known ? a.v[lane] >> to.number & 1 : 0) << lane;
    }
    w.put(to, one);
  }
}
bool decode_unpack(Instruction& i) {
  i.run = run_unpack;
  return i.sources() == 2 && i.source(1).kind == Kind::kImmediate;
}

// ---- votes ----

void run_vote(Warp& w, const Instruction& i) {
  const Mask p = w.predicate(i.operands.back());
  const uint32_t yes = p.v & w.exec, unknown = w.exec & ~p.known;
  const bool all = i.form == 1;
  const bool value = all ? (yes | unknown) == w.exec && unknown == 0 : yes != 0;
  const bool known = unknown == 0 || (all ? (yes | unknown) != w.exec : yes != 0);
  for (int n = 0; n < i.results; ++n) {
    const Operand& to = i.operands[n];
    if (to.kind == Kind::kR || to.kind == Kind::kUR) {
      Vec ballot = Vec::of(yes);
      ballot.known = unknown == 0 ? kAll : 0;
      w.put(to, ballot);
    } else {
      w.put(to, Mask{value && known ? kAll : 0, known ? kAll : 0});
    }
  }
}
bool decode_vote(Instruction& i) {
  i.form = i.take("ALL") ? 1 : i.take("ANY") ? 0 : -1;
  i.run = run_vote;
  return i.form >= 0;
}

void run_elect(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const uint32_t first = w.leader();
  w.put(i.operands[0], Mask{1u << first, kAll});
  w.put(i.operands[1], Vec::of(first));
}
bool decode_elect(Instruction& i) {
  i.run = run_elect;
  return i.results == 2;
}

void run_reduce(Warp& w, const Instruction& i) {
  Vec s;
  const Vec& a = w.read(i, i.source(0), s);
  if (w.exec == 0) return;
  uint32_t out = a.v[w.leader()];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.exec >> lane & 1) || lane == static_cast<int>(w.leader())) continue;
    const uint32_t x = a.v[lane];
    const bool below = i.is_signed ? static_cast<int32_t>(x) < static_cast<int32_t>(out) : x < out;
    switch (i.form) {
      case 0:
        out += x;
        break;
      case 1:
        out = below ? x : out;
        break;
      case 2:
        out = below ? out : x;
        break;
      case 3:
        out &= x;
        break;
      case 4:
        out |= x;
        break;
      default:
        out ^= x;
    }
  }
  Vec all = Vec::of(out);
  all.known = (a.known & w.exec) == w.exec ? kAll : 0;
  w.put(i.operands[0], all);
}
bool decode_reduce(Instruction& i) {
  i.is_signed = i.take("S32");
  i.form = i.take("SUM") ? 0 : i.take("MIN") ? 1 : i.take("MAX") ? 2 : i.take("AND") ? 3 : i.take("XOR") ? 5 : 4;
  i.take("OR");
  i.run = run_reduce;
  return i.sources() == 1;
}

// ---- shuffles ----

void run_shuffle(Warp& w, const Instruction& i) {
  Vec sa, sb, sc, out;
  const Vec &a = w.read(i, i.source(0), sa), &b = w.read(i, i.source(1), sb), &c = w.read(i, i.source(2), sc);
  Mask inside{0, 0};
  out.known = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.exec >> lane & 1) || !(b.known & c.known & 1u << lane)) continue;
    const int clamp = c.v[lane] & 31, segment = c.v[lane] >> 8 & 31, by = b.v[lane] & 31;
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int from = lane;
    bool good = true;
    switch (i.form) {
      case 0:
        from = least | (by & ~segment);
        good = from <= most;
        break;
      case 1:
        from = lane - by;
        good = from >= most;
        break;
      case 2:
        from = lane + by;
        good = from <= most;
        break;
      default:
        from = lane ^ by;
        good = from <= most;
    }
    if (!good) from = lane;
    inside.v |= static_cast<uint32_t>(good) << lane;
    inside.known |= 1u << lane;
    if (!(w.active >> (from & 31) & 1)) continue;
    out.v[lane] = a.v[from & 31];
    out.known |= (a.known >> (from & 31) & 1) << lane;
  }
  w.put(i.operands[1], out);
  w.put(i.operands[0], inside);
}
bool decode_shuffle(Instruction& i) {
  i.form = i.take("IDX") ? 0 : i.take("UP") ? 1 : i.take("DOWN") ? 2 : i.take("BFLY") ? 3 : -1;
  i.run = run_shuffle;
  return i.form >= 0 && i.results == 2 && i.sources() == 3;
}

// ---- from lanes to uniform registers ----

void run_to_uniform(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  Vec s;
  const Vec& a = w.read(i, i.source(0), s);
  const uint32_t first = w.leader();
  Vec all = Vec::of(a.v[first]);
  all.known = a.known >> first & 1 ? kAll : 0;
  w.put(i.operands[0], all);
}
bool decode_to_uniform(Instruction& i) {
  i.run = run_to_uniform;
  return i.results == 1 && i.sources() == 1;
}

// ---- special registers ----

void run_special(Warp& w, const Instruction& i) {
  const Launch& l = *w.launch;
  const std::string& name = i.source(0).text;
  Vec out = Vec::of(0);
  const auto axis = [&](const char* prefix) {
    return name.size() > 1 && name.rfind(prefix, 0) == 0 ? name.back() - 'X' : -1;
  };
  if (const int d = axis("SR_TID."); d >= 0) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const int t = w.number * kWarp + lane;
      const int at[3] = {t % l.threads[0], t / l.threads[0] % l.threads[1], t / (l.threads[0] * l.threads[1])};
      out.v[lane] = static_cast<uint32_t>(at[d]);
    }
  } else if (const int e = axis("SR_CTAID."); e >= 0) {
    out = Vec::of(static_cast<uint32_t>(w.block->index[e]));
  } else if (name == "SR_LANEID") {
    for (int lane = 0; lane < kWarp; ++lane) out.v[lane] = static_cast<uint32_t>(lane);
  } else if (name == "SR_LTMASK" || name == "SR_LEMASK" || name == "SR_EQMASK" || name == "SR_GTMASK" ||
             name == "SR_GEMASK") {
    for (int lane = 0; lane < kWarp; ++lane) {
      const uint32_t below = (1u << lane) - 1, own = 1u << lane;
      const char kind = name[3], also = name[4];
      out.v[lane] = kind == 'L'   ? below | (also == 'E' ? own : 0)
                    : kind == 'E' ? own
                                  : ~below & (also == 'E' ? kAll : ~own);
    }
  } else if (name != "SRZ" && name != "SR_CgaCtaId") {  // a cluster has one block here
    out.known = 0;
  }
  w.put(i.operands[0], out);
  if (i.flag) {
    Vec high = Vec::of(0);
    high.known = out.known;
    w.put(i.operands[0], high, 1);
  }
}
bool decode_special(Instruction& i) {
  i.flag = i.name == "CS2R" && !i.take("32");
  i.run = run_special;
  return i.sources() == 1;
}

}  // namespace

const std::map<std::string, Decoder>& lane_decoders() {
  static const std::map<std::string, Decoder> all = {
      {"PLOP3", decode_plop3}, {"UPLOP3", decode_plop3}, {"P2R", decode_pack},     {"UP2UR", decode_pack},
      {"R2P", decode_unpack},  {"UR2UP", decode_unpack}, {"VOTE", decode_vote},    {"VOTEU", decode_vote},
      {"ELECT", decode_elect}, {"REDUX", decode_reduce}, {"SHFL", decode_shuffle}, {"R2UR", decode_to_uniform},
      {"S2R", decode_special}, {"S2UR", decode_special}, {"CS2R", decode_special},
  };
  return all;
}

}  // namespace sass
