// Instructions in which lanes of a warp see each other: shfl, vote, match, redux, elect, activemask.

#include "apply.h"
#include "families.h"
#include "members.h"

namespace ptx {

void require_members(Warp& w, const Instruction& i, const Slot& mask) {
  w.require(i, mask, "the mask of lanes");
  if (mask.reg == kConstantRegister) {  // the same in all lanes
    const auto members = static_cast<uint32_t>(w.value(mask, 0));
    if (((w.active & ~members) | (members & w.alive & ~w.active)) == 0) return;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const auto members = static_cast<uint32_t>(w.value(mask, lane));
    if (!(members >> lane & 1)) {
      w.finding(i, lane, "executes this without being in its mask of lanes");
      return;
    }
    if (const uint32_t missing = members & w.alive & ~w.active) {
      w.finding(i, first_lane(missing),
                "lanes part: this one is in the mask of lanes and does not come here with them");
      return;
    }
  }
}

namespace {

enum Shuffle : uint32_t { kUp, kDown, kButterfly, kIndex };

void run_shuffle(Warp& w, const Instruction& i) {
  require_members(w, i, i.at(4));
  const Slot &a = i.at(1), &b = i.at(2), &c = i.at(3);
  w.require(i, b, "the lane operand of a shuffle");
  w.require(i, c, "the clamp operand of a shuffle");
  const uint32_t* values = w.in<uint32_t>(a);
  const uint32_t has = w.defined(i, a);
  if (i.flags == kButterfly && w.active == kAllLanes && has == kAllLanes && b.reg == kConstantRegister &&
      c.reg == kConstantRegister && (w.in<uint32_t>(c)[0] & 0x1f1f) == 0x1f) {  // the whole warp, by the same distance
    const uint32_t by = w.in<uint32_t>(b)[0] & 31;
    alignas(64) uint32_t other[kWarp];
    for (uint32_t lane = 0; lane < kWarp; ++lane) other[lane] = values[lane ^ by];
    w.put(i, i.at(0), other, kAllLanes);
    return w.put_mask(i, i.at(0, 1), kAllLanes, kAllLanes);
  }
  uint32_t out[kWarp] = {}, undefined[kWarp] = {}, inside = 0, defined = 0;
  const bool partly = (w.active & ~has) != 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int by = static_cast<int>(w.in<uint32_t>(b)[lane] & 31);
    const uint32_t packed = w.in<uint32_t>(c)[lane];
    const int clamp = static_cast<int>(packed & 31), segment = static_cast<int>(packed >> 8 & 31);
    const int least = lane & segment, most = least | (clamp & ~segment & 31);
    int from = i.flags == kUp          ? lane - by
               : i.flags == kDown      ? lane + by
               : i.flags == kButterfly ? lane ^ by
                                       : least | (by & ~segment & 31);
    const bool in = i.flags == kUp ? from >= most : from <= most;
    if (!in) from = lane;
    inside |= static_cast<uint32_t>(in) << lane;
    out[lane] = values[from];
    // A lane that does not execute the shuffle has no value to give.
    defined |= (has & w.active) >> from << 31 >> (31 - lane) & 1u << lane;
    if (partly) undefined[lane] = w.active >> from & 1 ? w.undefined_in<uint32_t>(a, from) : ~0u;
  }
  w.put(i, i.at(0), out, defined);
  if (partly) w.note_bits(i.at(0), undefined);
  w.put_mask(i, i.at(0, 1), inside, kAllLanes);
}

enum Vote : uint32_t { kAll, kAny, kUniform, kBallot };

void run_vote(Warp& w, const Instruction& i) {
  require_members(w, i, i.at(2));
  w.require(i, i.at(1), "the predicate of a vote");
  const uint32_t yes = w.mask(i.at(1)) & w.active;
  if (i.flags == kBallot) {
    uint32_t out[kWarp];
    std::fill_n(out, kWarp, yes);
    return w.put(i, i.at(0), out, kAllLanes);
  }
  const bool result = i.flags == kAll ? yes == w.active : i.flags == kAny ? yes != 0 : yes == 0 || yes == w.active;
  w.put_mask(i, i.at(0), result ? kAllLanes : 0, kAllLanes);
}

void run_match(Warp& w, const Instruction& i) {
  require_members(w, i, i.at(2));
  w.require(i, i.at(1), "the value of a match");
  uint32_t out[kWarp] = {};
  bool same = true;
  const int first = first_lane(w.active);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    same &= w.value(i.at(1), lane) == w.value(i.at(1), first);
    for (int other = 0; other < kWarp; ++other)
      if (w.active >> other & 1 && w.value(i.at(1), other) == w.value(i.at(1), lane)) out[lane] |= 1u << other;
  }
  if (i.flags != 0) std::fill_n(out, kWarp, same ? w.active : 0);
  w.put(i, i.at(0), out, kAllLanes);
  if (i.flags != 0) w.put_mask(i, i.at(0, 1), same ? kAllLanes : 0, kAllLanes);
}

enum Reduce : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

void run_redux(Warp& w, const Instruction& i) {
  require_members(w, i, i.at(2));
  const uint32_t* values = w.in<uint32_t>(i.at(1));
  const bool with_sign = i.type == Type::kS32;
  uint32_t total = values[first_lane(w.active)];
  for (int lane = first_lane(w.active) + 1; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const uint32_t value = values[lane];
    const bool less = with_sign ? static_cast<int32_t>(value) < static_cast<int32_t>(total) : value < total;
    switch (i.flags) {
      case kAdd:
        total += value;
        break;
      case kMin:
        total = less ? value : total;
        break;
      case kMax:
        total = less ? total : value;
        break;
      case kAnd:
        total &= value;
        break;
      case kOr:
        total |= value;
        break;
      default:
        total ^= value;
    }
  }
  uint32_t out[kWarp];
  std::fill_n(out, kWarp, total);
  w.put(i, i.at(0), out, (w.active & ~w.defined(i, i.at(1))) ? 0 : kAllLanes);
}

void run_elect(Warp& w, const Instruction& i) {
  require_members(w, i, i.at(1));
  const int leader = first_lane(w.active);
  uint32_t out[kWarp];
  std::fill_n(out, kWarp, static_cast<uint32_t>(leader));
  w.put(i, i.at(0), out, kAllLanes);
  w.put_mask(i, i.at(0, 1), 1u << leader, kAllLanes);
}

void run_active_mask(Warp& w, const Instruction& i) {
  uint32_t out[kWarp];
  std::fill_n(out, kWarp, w.active);
  w.put(i, i.at(0), out, kAllLanes);
}

uint32_t place_of(const std::string& word, std::initializer_list<const char*> words) {
  uint32_t at = 0;
  for (const char* other : words) {
    if (word == other) break;
    ++at;
  }
  return at;
}

}  // namespace

Form decode_lanes(Modifiers& m) {
  Form f;
  const std::string& name = m.name();
  const Want mask{Want::kRead, Type::kB32};
  if (name == "activemask") {
    f.run = m.take_type() == Type::kB32 ? run_active_mask : nullptr;
    f.wants = {{Want::kWrite, Type::kB32}};
    return f;
  }
  if (!m.take("sync")) return f;  // without a mask, as before Volta
  if (name == "shfl") {
    const std::string mode = m.take_one({"up", "down", "bfly", "idx"});
    f.flags = place_of(mode, {"up", "down", "bfly", "idx"});
    f.run = m.take_type() == Type::kB32 && !mode.empty() ? run_shuffle : nullptr;
    f.wants = {{Want::kPair, Type::kB32}, mask, mask, mask, mask};
  } else if (name == "vote") {
    const std::string mode = m.take_one({"all", "any", "uni", "ballot"});
    f.flags = place_of(mode, {"all", "any", "uni", "ballot"});
    const Type type = m.take_type();
    f.run = !mode.empty() && type == (mode == "ballot" ? Type::kB32 : Type::kPred) ? run_vote : nullptr;
    f.wants = {{Want::kWrite, type}, {Want::kRead, Type::kPred}, mask};
  } else if (name == "match") {
    f.flags = m.take("all");
    const bool any = m.take("any");
    const Type type = m.take_type();
    f.run = (type == Type::kB32 || type == Type::kB64) && any != (f.flags != 0) ? run_match : nullptr;
    f.wants = {{f.flags ? Want::kPair : Want::kWrite, Type::kB32}, {Want::kRead, type}, mask};
  } else if (name == "redux") {
    const std::string op = m.take_one({"add", "min", "max", "and", "or", "xor"});
    f.flags = place_of(op, {"add", "min", "max", "and", "or", "xor"});
    f.type = m.take_type();
    const bool bits = f.flags >= kAnd;
    const bool fits = bits ? f.type == Type::kB32 : f.type == Type::kS32 || f.type == Type::kU32;
    f.run = !op.empty() && fits ? run_redux : nullptr;
    f.wants = {{Want::kWrite, Type::kB32}, mask, mask};
  } else if (name == "elect") {
    f.run = run_elect;
    f.wants = {{Want::kPair, Type::kB32}, mask};
  }
  return f;
}

}  // namespace ptx
