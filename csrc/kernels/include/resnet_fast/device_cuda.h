// The device functions on NVIDIA GPUs, sm_80 and later. The PTX ISA explains each instruction under its name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RF_DEVICE __device__ __forceinline__
// Arguments: threads of a block and, optionally, the number of blocks for which an SM must have registers.
#define RF_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)

namespace resnet_fast {

// One array for every kernel, which each kernel divides by its own layout. 1024: the period of the widest swizzle.
extern __shared__ __align__(1024) unsigned char shared_memory[];

RF_DEVICE int thread_index() {
  return threadIdx.x;
}
RF_DEVICE int lane_index() {
  return threadIdx.x % kWarp;
}
RF_DEVICE int warp_index() {
  // Uniform over the warp. The shuffle tells the compiler so, which then uses uniform registers.
  return __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
}
RF_DEVICE int block_index() {
  return blockIdx.x;
}
RF_DEVICE int block_count() {
  return gridDim.x;
}

// Returns `value`, but hides its origin from the compiler. Otherwise the compiler computes the addresses of every phase
// once, before the loop over tiles, and keeps all of them in registers; with this, each phase computes its own.
RF_DEVICE int fresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

RF_DEVICE void sync_block() {
  __syncthreads();
}
RF_DEVICE void sync_warp() {
  __syncwarp();
}

template <typename V>
RF_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Returns the value of lane `source`.
template <typename V>
RF_DEVICE V shuffle(V value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

template <typename V>
RF_DEVICE V load_global(const void* p, bool inside = true) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "2, 4, 8 or 16 bytes");
  V value{};
  if (inside) {
    if constexpr (sizeof(V) == 16) {
      const uint4 raw = *static_cast<const uint4*>(p);
      __builtin_memcpy(&value, &raw, 16);
    } else {
      value = *static_cast<const V*>(p);
    }
  }
  return value;
}

template <typename V>
RF_DEVICE void store_global(void* p, const V& value, bool inside = true) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "2, 4, 8 or 16 bytes");
  if (!inside) return;
  if constexpr (sizeof(V) == 16) {
    uint4 raw;
    __builtin_memcpy(&raw, &value, 16);
    *static_cast<uint4*>(p) = raw;
  } else {
    *static_cast<V*>(p) = value;
  }
}

template <typename V>
RF_DEVICE V load_shared(uint32_t at, bool inside = true) {
  V value{};
  if (inside) {
    if constexpr (sizeof(V) == 16) {
      const uint4 raw = *reinterpret_cast<const uint4*>(shared_memory + at);
      __builtin_memcpy(&value, &raw, 16);
    } else {
      value = *reinterpret_cast<const V*>(shared_memory + at);
    }
  }
  return value;
}

template <typename V>
RF_DEVICE void store_shared(uint32_t at, const V& value, bool inside = true) {
  if (!inside) return;
  if constexpr (sizeof(V) == 16) {
    uint4 raw;
    __builtin_memcpy(&raw, &value, 16);
    *reinterpret_cast<uint4*>(shared_memory + at) = raw;
  } else {
    *reinterpret_cast<V*>(shared_memory + at) = value;
  }
}

RF_DEVICE uint32_t shared_address(uint32_t at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + at;
}

// Copies 16 bytes, or zeros where not inside; `p` must point into the tensor in both cases. Caches in L2 only, because
// staged data is not read again.
RF_DEVICE void cp_async16(uint32_t at, const void* p, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(at)), "l"(p), "r"(inside ? 16 : 0)
               : "memory");
}
RF_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kPending>
RF_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

RF_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(at)));
}
RF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at)));
}

struct Half {};
struct Bfloat16 {};

// d += a * b
template <typename T>
RF_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
RF_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
RF_DEVICE void mma_m16n8k16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two values in one word, the first in the low half; rounded to nearest, ties to even.
template <typename T>
RF_DEVICE uint32_t pack2(float first, float second);
template <typename T>
RF_DEVICE void unpack2(uint32_t word, float& first, float& second);

template <>
RF_DEVICE uint32_t pack2<Half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  __builtin_memcpy(&word, &pair, 4);
  return word;
}
template <>
RF_DEVICE uint32_t pack2<Bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  __builtin_memcpy(&word, &pair, 4);
  return word;
}
template <>
RF_DEVICE void unpack2<Half>(uint32_t word, float& first, float& second) {
  __half2 pair;
  __builtin_memcpy(&pair, &word, 4);
  const float2 both = __half22float2(pair);
  first = both.x;
  second = both.y;
}
template <>
RF_DEVICE void unpack2<Bfloat16>(uint32_t word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}

// max(value, 0), NaN for NaN, as ATen's ReLU; fmaxf would return 0 for NaN.
RF_DEVICE float relu(float value) {
  return value < 0.0f ? 0.0f : value;
}
// The element-wise maximum of two words of two values each, NaN where either is, as ATen's max-pool: one instruction.
template <typename T>
RF_DEVICE uint32_t larger2(uint32_t a, uint32_t b);

template <>
RF_DEVICE uint32_t larger2<Half>(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("max.NaN.f16x2 %0, %1, %2;\n" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
template <>
RF_DEVICE uint32_t larger2<Bfloat16>(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("max.NaN.bf16x2 %0, %1, %2;\n" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

}  // namespace resnet_fast
