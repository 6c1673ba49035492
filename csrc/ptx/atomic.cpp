// atom and red: lanes update memory one after another, in an order that the seed rotates. An element of a vector is
// updated by itself.

#include <algorithm>

#include "access.h"
#include "apply.h"
#include "families.h"
#include "numbers.h"

namespace ptx {
namespace {

constexpr int kMostElements = 8;

enum Op : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <class T>
T extreme_of(bool greatest, T a, T b) {
  return greatest ? std::max(a, b) : std::min(a, b);
}

uint32_t add_halves(bool brain, uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const uint16_t sum = brain ? bf16_of(add_odd(float_of_bf16(x), float_of_bf16(y)), Round::kNearest)
                               : f16_of(add_odd(float_of_f16(x), float_of_f16(y)));
    out |= uint32_t{sum} << shift;
  }
  return out;
}

uint64_t added(Type type, bool global, uint64_t a, uint64_t b) {
  switch (type) {
    case Type::kF32: {
      auto x = bit_cast<float>(static_cast<uint32_t>(a)), y = bit_cast<float>(static_cast<uint32_t>(b));
      // Documented: in global memory subnormal numbers are flushed, in shared memory they are not.
      if (global) return bit_cast<uint32_t>(flushed(canonical(flushed(x) + flushed(y))));
      return bit_cast<uint32_t>(canonical(x + y));
    }
    case Type::kF64:
      return bit_cast<uint64_t>(bit_cast<double>(a) + bit_cast<double>(b));
    case Type::kF16:
      return add_halves(false, static_cast<uint32_t>(a), static_cast<uint32_t>(b)) & 0xffff;
    case Type::kBF16:
      return add_halves(true, static_cast<uint32_t>(a), static_cast<uint32_t>(b)) & 0xffff;
    case Type::kF16x2:
      return add_halves(false, static_cast<uint32_t>(a), static_cast<uint32_t>(b));
    case Type::kBF16x2:
      return add_halves(true, static_cast<uint32_t>(a), static_cast<uint32_t>(b));
    default:
      return a + b;
  }
}

uint64_t updated(const Instruction& i, bool global, uint64_t old, uint64_t b, uint64_t c) {
  switch (i.flags) {
    case kAdd:
      return added(i.type, global, old, b);
    case kMin:
    case kMax: {
      const bool greatest = i.flags == kMax;
      if (i.type == Type::kS32)
        return static_cast<uint32_t>(extreme_of(greatest, static_cast<int32_t>(old), static_cast<int32_t>(b)));
      if (i.type == Type::kS64)
        return static_cast<uint64_t>(extreme_of(greatest, static_cast<int64_t>(old), static_cast<int64_t>(b)));
      return extreme_of(greatest, old, b);
    }
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kExch:
      return b;
    case kCas:
      return old == b ? c : old;
    case kInc:
      return old >= b ? 0 : old + 1;
    default:
      return old == 0 || old > b ? b : old - 1;
  }
}

void run_atomic(Warp& w, const Instruction& i) {
  const bool returns = i.number != 0;
  const int first = returns ? 1 : 0;
  const Slot &base = i.at(first), &c = i.at(i.flags == kCas ? first + 2 : first + 1);
  const int bytes = bytes_of(i.type), elements = i.part[first + 1].count;
  uint32_t values = w.defined(i, c);
  for (int e = 0; e < elements; ++e) values &= w.defined(i, i.at(first + 1, e));
  Reached r;
  reach(w, i, base, static_cast<Space>(i.other_type), bytes * elements, Use::kUpdate, values, nullptr, r);
  uint64_t old[kMostElements][kWarp] = {};
  const int start = static_cast<int>(w.launch->draw(kWarp));
  for (int n = 0; n < kWarp; ++n) {
    const int lane = (start + n) % kWarp;
    if (!(w.active >> lane & 1)) continue;
    for (int e = 0; e < elements; ++e) {
      uint8_t* at = r.at[lane] + e * bytes;
      std::memcpy(&old[e][lane], at, bytes);
      const uint64_t b = w.value(i.at(first + 1, e), lane);
      const uint64_t fresh = updated(i, r.global >> lane & 1, old[e][lane], b, w.value(c, lane));
      std::memcpy(at, &fresh, bytes);
    }
  }
  w.launch->counters.events["atomics"] += 1;
  if (!returns) return;
  const auto put = [&](auto narrow) {
    decltype(narrow) out[kWarp];
    for (int e = 0; e < elements; ++e) {
      for (int lane = 0; lane < kWarp; ++lane) out[lane] = static_cast<decltype(narrow)>(old[e][lane]);
      w.put(i, i.at(0, e), out, r.defined);
    }
  };
  if (bytes == 2) return put(uint16_t{});
  if (bytes == 4) return put(uint32_t{});
  put(uint64_t{});
}

// Vectors are of 16 or 32 bits, up to 16 bytes in all, in global memory, and are added to element by element.
bool fits_vector(uint32_t op, Type type, int elements, Space space) {
  const bool narrow = type == Type::kF16 || type == Type::kBF16;
  const bool wide = type == Type::kF32 || type == Type::kF16x2 || type == Type::kBF16x2;
  return op == kAdd && elements <= (narrow ? 8 : 4) && (narrow || wide) &&
         (space == Space::kGlobal || space == Space::kGeneric);
}

bool fits(uint32_t op, Type type) {
  switch (op) {
    case kAdd:
      return type != Type::kB32 && type != Type::kB64 && type != Type::kB16;
    case kMin:
    case kMax:
      return type == Type::kU32 || type == Type::kS32 || type == Type::kU64 || type == Type::kS64;
    case kInc:
    case kDec:
      return type == Type::kU32;
    case kCas:
      return type == Type::kB16 || type == Type::kB32 || type == Type::kB64 || type == Type::kU32 || type == Type::kU64;
    default:
      return type == Type::kB32 || type == Type::kB64 || type == Type::kU32 || type == Type::kU64 || type == Type::kS32;
  }
}

}  // namespace

Form decode_atomic(Modifiers& m) {
  Form f;
  const bool returns = m.name() == "atom";
  const Space space = take_space(m);
  const bool hint = m.take("L2::cache_hint");
  f.order = take_order(m) | kStrong | (returns ? 0 : kBlind);
  m.take("async");
  constexpr const char* kOps[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
  f.flags = ~0u;
  for (uint32_t op = 0; op < 10; ++op)
    if (f.flags == ~0u && m.take(kOps[op])) f.flags = op;
  m.take("noftz");
  const std::string vector = m.take_one({"v2", "v4", "v8"});
  const auto elements = static_cast<uint16_t>(vector.empty() ? 1 : vector[1] - '0');
  f.type = m.take_type();
  f.other_type = static_cast<Type>(space);
  f.number = returns;
  if (f.flags == ~0u || bytes_of(f.type) < 2 || bytes_of(f.type) > 8 || !fits(f.flags, f.type)) return f;
  f.run = run_atomic;
  if (elements > 1 && !fits_vector(f.flags, f.type, elements, space)) return Form{};
  if (returns) f.wants.push_back({Want::kWriteMany, f.type, false, false, false, elements});
  f.wants.push_back({Want::kMemory});
  f.wants.push_back({Want::kReadMany, f.type, false, false, false, elements});
  if (f.flags == kCas) f.wants.push_back({Want::kRead, f.type});
  if (hint) f.wants.push_back({Want::kRead, Type::kB64});
  return f;
}

}  // namespace ptx
