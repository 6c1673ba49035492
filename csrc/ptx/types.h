// The types of PTX, and how wide a register of each is.
#pragma once

#include <cstdint>
#include <string_view>

namespace ptx {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kU8,
  kS8,
  kB16,
  kE4M3x2,
  kE5M2x2,
  kU16,
  kS16,
  kF16,
  kBF16,
  kB32,
  kU32,
  kS32,
  kF32,
  kTF32,
  kF16x2,
  kBF16x2,
  kU16x2,
  kS16x2,
  kB64,
  kU64,
  kS64,
  kF64,
  kF32x2,
  kB128,
};

// The type that a modifier such as "s32" names, or kNone.
Type type_named(std::string_view text);

// Bytes in memory; 0 for a predicate.
constexpr int bytes_of(Type type) {
  if (type <= Type::kPred) return 0;
  if (type <= Type::kS8) return 1;
  if (type <= Type::kBF16) return 2;
  if (type <= Type::kS16x2) return 4;
  return type == Type::kB128 ? 16 : 8;
}

// Bytes of one lane of a register. Registers of 8 bits are kept in 16.
constexpr int lane_bytes(Type type) {
  return bytes_of(type) == 1 ? 2 : bytes_of(type);
}

constexpr bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBF16 || type == Type::kF32 || type == Type::kF64 || type == Type::kTF32;
}

constexpr bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

}  // namespace ptx
