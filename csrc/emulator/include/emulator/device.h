// The device functions of resnet_fast/device.h on a CPU. runtime.cpp checks, counts and executes each call. The
// compiler fills in the last two arguments: the source line of the call.
#pragma once

#include <cstdint>
#include <cstring>

#include <emulator/product.h>
#include <emulator/runtime.h>

#define RF_DEVICE inline
#define RF_KERNEL(...) static void
#define RF_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace resnet_fast {

inline int thread_index() {
  return emulator::current_thread();
}
inline int lane_index() {
  return emulator::current_thread() % kWarp;
}
inline int warp_index() {
  return emulator::current_thread() / kWarp;
}
inline int block_index() {
  return emulator::current_block();
}
inline int block_count() {
  return emulator::block_count();
}

inline int fresh(int value) {
  return value;
}

inline void sync_block(RF_HERE) {
  emulator::sync_block({file, line});
}
inline void sync_warp(RF_HERE) {
  emulator::sync_warp({file, line});
}

template <typename V>
V shuffle_xor(V value, int mask, RF_HERE) {
  static_assert(sizeof(V) == 4, "shuffles exchange words");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = emulator::shuffle_xor(word, mask, {file, line});
  std::memcpy(&value, &word, 4);
  return value;
}

template <typename V>
V shuffle(V value, int source, RF_HERE) {
  return shuffle_xor(value, source ^ lane_index(), file, line);
}

template <typename V>
V load_global(const void* p, bool inside = true, RF_HERE) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "2, 4, 8 or 16 bytes");
  emulator::global_access(p, sizeof(V), emulator::Kind::kGlobalRead, inside, {file, line});
  V value{};
  if (inside) std::memcpy(&value, p, sizeof(V));
  return value;
}

template <typename V>
void store_global(void* p, const V& value, bool inside = true, RF_HERE) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "2, 4, 8 or 16 bytes");
  emulator::global_access(p, sizeof(V), emulator::Kind::kGlobalWrite, inside, {file, line});
  if (inside) std::memcpy(p, &value, sizeof(V));
}

template <typename V>
V load_shared(uint32_t at, bool inside = true, RF_HERE) {
  const unsigned char* from = emulator::shared_access(at, sizeof(V), emulator::Kind::kSharedRead, inside, {file, line});
  V value{};
  if (inside) std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
void store_shared(uint32_t at, const V& value, bool inside = true, RF_HERE) {
  unsigned char* to = emulator::shared_access(at, sizeof(V), emulator::Kind::kSharedWrite, inside, {file, line});
  if (inside) std::memcpy(to, &value, sizeof(V));
}

inline void cp_async16(uint32_t at, const void* p, bool inside = true, RF_HERE) {
  emulator::cp_async16(at, p, inside, {file, line});
}
inline void cp_async_commit() {
  emulator::cp_async_commit();
}
template <int kPending>
void cp_async_wait(RF_HERE) {
  emulator::cp_async_wait(kPending, {file, line});
}

inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t at, RF_HERE) {
  emulator::ldmatrix(r, 2, at, {file, line});
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t at, RF_HERE) {
  emulator::ldmatrix(r, 4, at, {file, line});
}

struct Half {};
struct Bfloat16 {};

namespace number {

using emulator::bits_of;
using emulator::float_of;

inline uint16_t to_bfloat16(float f) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

inline uint16_t to_half(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below the smallest normal number: in units of 2^-24, rounded by the addition
    const float scaled = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(scaled) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

template <typename T>
float widened(uint16_t raw);
template <>
inline float widened<Half>(uint16_t raw) {
  return emulator::float_of_half(raw);
}
template <>
inline float widened<Bfloat16>(uint16_t raw) {
  return emulator::float_of_bfloat16(raw);
}

inline float larger(float a, float b) {
  return a > b || a != a ? a : b;
}

}  // namespace number

template <typename T>
uint32_t pack2(float first, float second);
template <>
inline uint32_t pack2<Half>(float first, float second) {
  return number::to_half(first) | static_cast<uint32_t>(number::to_half(second)) << 16;
}
template <>
inline uint32_t pack2<Bfloat16>(float first, float second) {
  return number::to_bfloat16(first) | static_cast<uint32_t>(number::to_bfloat16(second)) << 16;
}

template <typename T>
void unpack2(uint32_t word, float& first, float& second) {
  first = number::widened<T>(static_cast<uint16_t>(word));
  second = number::widened<T>(static_cast<uint16_t>(word >> 16));
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RF_HERE) {
  emulator::mma_m16n8k16(d, a, b, &number::widened<T>, {file, line});
}

inline float relu(float value) {
  return value < 0.0f ? 0.0f : value;
}
template <typename T>
uint32_t larger2(uint32_t a, uint32_t b) {
  float a_first, a_second, b_first, b_second;
  unpack2<T>(a, a_first, a_second);
  unpack2<T>(b, b_first, b_second);
  return pack2<T>(number::larger(a_first, b_first), number::larger(a_second, b_second));
}

}  // namespace resnet_fast
