// Registers: reads with signs, writes under a guard.

#include "warp.h"

#include <cstring>

namespace sass {

void Warp::fail(const Instruction& i, const std::string& what) const {
  char address[16];
  std::snprintf(address, sizeof(address), "0x%x", i.address);
  const int* at = block->index;
  throw Error(i.text + " at " + address + " " + what + " (block " + std::to_string(at[0]) + ", " +
              std::to_string(at[1]) + ", " + std::to_string(at[2]) + ", warp " + std::to_string(number) +
              ", executed " + std::to_string(i.executed) + " times so far)");
}

bool constant(const Launch& l, int bank, int64_t offset, int bytes, uint32_t& value) {
  const auto content = l.constants.find(bank);
  if (content == l.constants.end() || offset < 0 || offset + bytes > static_cast<int64_t>(content->second.size()))
    return false;
  const auto& known = l.constants_known.at(bank);
  for (int n = 0; n < bytes; ++n)
    if (!known[offset + n]) return false;
  value = 0;
  std::memcpy(&value, content->second.data() + offset, bytes);
  return true;
}

const Vec& Warp::plain(const Instruction& i, const Operand& o, Vec& scratch, int part) const {
  switch (o.kind) {
    case Kind::kR:
      return o.number == kRZ ? r[kRZ] : r[o.number + part];
    case Kind::kUR:
      return o.number == kURZ ? ur[kURZ] : ur[o.number + part];
    case Kind::kImmediate:
      return o.value[part];
    case Kind::kConstant: {
      if (o.base < 0 && o.uniform < 0) return o.value[part];
      const Vec& index = o.base >= 0 ? r[o.base] : ur[o.uniform];
      scratch.known = index.known;
      for (int lane = 0; lane < kWarp; ++lane) {
        const int64_t at = static_cast<int32_t>(index.v[lane]) + o.offset + 4 * part;
        if (!(index.known >> lane & 1) || !constant(*launch, o.bank, at, 4, scratch.v[lane]))
          scratch.known &= ~(1u << lane);
      }
      return scratch;
    }
    default:
      fail(i, "has an operand " + o.text + " that is no number");
  }
}

const Vec& Warp::read(const Instruction& i, const Operand& o, Vec& scratch, int part) const {
  const Vec& from = plain(i, o, scratch, part);
  if (!o.negated && !o.inverted && !o.absolute) return from;
  scratch.known = from.known;
  for (int lane = 0; lane < kWarp; ++lane) {
    uint32_t x = from.v[lane];
    if (o.absolute && static_cast<int32_t>(x) < 0) x = 0 - x;
    scratch.v[lane] = o.negated ? 0 - x : o.inverted ? ~x : x;
  }
  return scratch;
}

Mask Warp::predicate(const Operand& o) const {
  Mask m = o.number == kPT ? Mask{kAll, kAll} : o.kind == Kind::kUP ? up[o.number] : p[o.number];
  if (o.inverted) m.v = ~m.v & m.known;
  return m;
}

void Warp::put(const Operand& o, const Vec& value, int part, const uint32_t* unknown) {
  if (o.kind == Kind::kUR) {
    if (o.number != kURZ && exec != 0) ur[o.number + part] = value;
    return;
  }
  if (o.kind != Kind::kR || o.number == kRZ) return;
  Vec& to = r[o.number + part];
  for (uint32_t lanes = exec & ~value.known; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    bits[o.number + part][lane] = unknown ? unknown[lane] : kAll;
  }
  if (exec == kAll) {
    to = value;
    return;
  }
  for (int lane = 0; lane < kWarp; ++lane) to.v[lane] = exec >> lane & 1 ? value.v[lane] : to.v[lane];
  to.known = (to.known & ~exec) | (value.known & exec);
}

void Warp::put(const Operand& o, Mask value) {
  if (o.number == kPT) return;
  Mask& to = o.kind == Kind::kUP ? up[o.number] : p[o.number];
  const uint32_t lanes = o.kind == Kind::kUP ? (exec != 0 ? kAll : 0) : exec;
  to.v = (to.v & ~lanes) | (value.v & value.known & lanes);
  to.known = (to.known & ~lanes) | (value.known & lanes);
}

void Warp::forget(const Instruction& i, uint32_t lanes) {
  if (lanes == 0) return;
  for (const Written& one : i.writes)
    for (int n = one.first; n < one.first + one.count; ++n) switch (one.kind) {
        case Kind::kR:
          r[n].known &= ~lanes;
          for (int lane = 0; lane < kWarp; ++lane) bits[n][lane] |= lanes >> lane & 1 ? kAll : 0;
          break;
        case Kind::kUR:
          ur[n].known = 0;
          break;
        case Kind::kP:
          p[n].known &= ~lanes;
          p[n].v &= ~lanes;
          break;
        case Kind::kUP:
          up[n] = Mask{0, 0};
          break;
        default:
          break;
      }
}

uint32_t Warp::leader() const {
  return static_cast<uint32_t>(__builtin_ctz(exec));
}

Event& Warp::event(const Instruction&) {
  events.push_back({});
  events.back().step = static_cast<uint32_t>(path.size());
  events.back().first = static_cast<uint32_t>(launch->sectors.size());
  return events.back();
}

}  // namespace sass
