// The functions of hopper.h in PTX. The PTX ISA explains each instruction under its name.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstdio>

#define RF_GRID_CONSTANT __grid_constant__

namespace resnet_fast {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// The build defines RESNET_FAST_SM_90A where it compiles for sm_90a. Otherwise the kernels are empty, and host code
// must not launch them.
#ifdef RESNET_FAST_SM_90A
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

// Use it only in a kernel's parameters, declared `const RF_GRID_CONSTANT`: the copy engine reads it from there.
using TensorMap = CUtensorMap;

// Looks up a function of the driver at run time, because the library is not linked to the driver. Returns nullptr if
// the driver is older than CUDA 12.
template <typename Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<Function>(result == cudaDriverEntryPointSuccess ? found : nullptr);
}

// A tensor in the driver's form. Its type only determines the element size and the value that fills gaps: zero.
struct DriverTensor {
  static constexpr int kRank = TensorBox::kRank;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT16;
  cuuint64_t size[kRank], stride[kRank - 1];
  CUtensorMapSwizzle swizzle;

  explicit DriverTensor(const TensorBox& box) {
    for (int i = 0; i < kRank; ++i) {
      size[i] = box.size[i];
      if (i > 0) stride[i - 1] = box.stride[i];
    }
    swizzle = box.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  }
};

// Binds the context of the current device to this thread. A thread in which nothing has used CUDA yet has none, and the
// functions of the driver do not bind one.
inline Status bind_context() {
  int index = 0;
  cudaError_t failed = cudaGetDevice(&index);
  if (failed == cudaSuccess) failed = cudaSetDevice(index);
  return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
}

// The message for a function of the driver that failed; valid until this thread's next one.
inline Status refusal(const char* function, CUresult failed) {
  static const auto name_of = driver_function<PFN_cuGetErrorName_v6000>("cuGetErrorName");
  static const auto text_of = driver_function<PFN_cuGetErrorString_v6000>("cuGetErrorString");
  const char *name = nullptr, *text = nullptr;
  if (name_of != nullptr) name_of(failed, &name);
  if (text_of != nullptr) text_of(failed, &text);
  thread_local char message[256];
  std::snprintf(message, sizeof message, "%s returned %d, %s: %s", function, static_cast<int>(failed),
                name == nullptr ? "an error without a name" : name, text == nullptr ? "unknown to the driver" : text);
  return message;
}

inline Status encode(TensorMap* map, const TensorBox& box) {
  static const auto call = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  if (call == nullptr) return "the driver has no cuTensorMapEncodeTiled (it comes with CUDA 12)";
  if (const Status failed = bind_context()) return failed;
  const DriverTensor t(box);
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult failed = call(map, t.kType, t.kRank, const_cast<void*>(box.start), t.size, t.stride, box.box, steps,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return failed == CUDA_SUCCESS ? nullptr : refusal("cuTensorMapEncodeTiled", failed);
}

inline Status encode(TensorMap* map, const Im2colBox& box) {
  static const auto call = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  if (call == nullptr) return "the driver has no cuTensorMapEncodeIm2col (it comes with CUDA 12)";
  if (const Status failed = bind_context()) return failed;
  const DriverTensor t(box.x);
  const cuuint32_t steps[] = {1, box.step[0], box.step[1], 1};
  const CUresult failed = call(map, t.kType, t.kRank, const_cast<void*>(box.x.start), t.size, t.stride, box.lower,
                               box.upper, box.x.box[0], box.x.box[1], steps, CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return failed == CUDA_SUCCESS ? nullptr : refusal("cuTensorMapEncodeIm2col", failed);
}

RF_DEVICE void mbarrier_init(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}
// Makes this thread's initializations visible to the copy engine. Other threads see them after a block barrier.
RF_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
RF_DEVICE void mbarrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(at)) : "memory");
}
// Adds `bytes` to those expected in this phase, then arrives.
RF_DEVICE void mbarrier_expect(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(at)), "r"(bytes)
               : "memory");
}
RF_DEVICE void mbarrier_wait(uint32_t at, int parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}\n"
        : "=r"(over)
        : "r"(shared_address(at)), "r"(parity)
        : "memory");
  } while (!over);
}

RF_DEVICE void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Copies `bytes`, a multiple of 16; both addresses are aligned to 16 bytes.
RF_DEVICE void bulk_load(uint32_t at, const void* p, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(at)),
               "l"(__cvta_generic_to_global(p)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Copies the box at these coordinates, innermost first; zeros outside the tensor.
RF_DEVICE void tensor_load(uint32_t at, const TensorMap& map, int c0, int c1, int c2, int c3, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(at)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Copies the rows of an Im2colBox from pixel (w, h) of image n and channel c on, at the tap (right, down).
RF_DEVICE void im2col_load(uint32_t at, const TensorMap& map, int c, int w, int h, int n, int right, int down,
                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8};\n" ::"r"(shared_address(at)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n),
      "h"(static_cast<uint16_t>(right)), "h"(static_cast<uint16_t>(down))
      : "memory");
}

// Keeps the compiler from moving uses of these registers across this point.
template <int kTiles>
RF_DEVICE void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// Pass the accumulators to which the next wgmma adds.
template <int... kTiles>
RF_DEVICE void wgmma_fence(float (&... d)[kTiles][4]) {
  (pin(d), ...);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
RF_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until all but the last kPending groups are done. Pass the accumulators that are read afterwards.
template <int kPending, int... kTiles>
RF_DEVICE void wgmma_wait(float (&... d)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
  (pin(d), ...);
}

template <typename T, int kTiles>
struct Wgmma;

#define RF_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define RF_D_TEXT_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
#define RF_D_LIST_32 RF_D(0), RF_D(1), RF_D(2), RF_D(3)
#define RF_D_TEXT_64                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define RF_D_LIST_64 RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7)
#define RF_D_TEXT_128                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define RF_D_LIST_128                                                                                           \
  RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9), RF_D(10), RF_D(11), \
      RF_D(12), RF_D(13), RF_D(14), RF_D(15)
#define RF_D_TEXT_256                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define RF_D_LIST_256                                                                                               \
  RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9), RF_D(10), RF_D(11),     \
      RF_D(12), RF_D(13), RF_D(14), RF_D(15), RF_D(16), RF_D(17), RF_D(18), RF_D(19), RF_D(20), RF_D(21), RF_D(22), \
      RF_D(23), RF_D(24), RF_D(25), RF_D(26), RF_D(27), RF_D(28), RF_D(29), RF_D(30), RF_D(31)
// kColumns, the type's name, and the operand numbers that follow the accumulator's.
#define RF_WGMMA(T, NAME, N, A0, A1, A2, A3, A4, A5)                                                            \
  template <>                                                                                                   \
  struct Wgmma<T, N / 8> {                                                                                      \
    static RF_DEVICE void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b, int accumulate) {                \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " A2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
                   "k16.f32." NAME "." NAME " " RF_D_TEXT_##N A0 ", " A1 ", add, 1, 1, 0, 0;\n}\n"              \
                   : RF_D_LIST_##N                                                                              \
                   : "l"(a), "l"(b), "r"(accumulate));                                                          \
    }                                                                                                           \
    static RF_DEVICE void registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " A5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
                   "k16.f32." NAME "." NAME " " RF_D_TEXT_##N "{" A0 ", " A1 ", " A2 ", " A3 "}, " A4           \
                                                              ", add, 1, 1, 0;\n}\n"                            \
                   : RF_D_LIST_##N                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                      \
    }                                                                                                           \
  };
RF_WGMMA(Half, "f16", 32, "%16", "%17", "%18", "%19", "%20", "%21")
RF_WGMMA(Bfloat16, "bf16", 32, "%16", "%17", "%18", "%19", "%20", "%21")
RF_WGMMA(Half, "f16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
RF_WGMMA(Bfloat16, "bf16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
RF_WGMMA(Half, "f16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
RF_WGMMA(Bfloat16, "bf16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
RF_WGMMA(Half, "f16", 256, "%128", "%129", "%130", "%131", "%132", "%133")
RF_WGMMA(Bfloat16, "bf16", 256, "%128", "%129", "%130", "%131", "%132", "%133")
#undef RF_WGMMA
#undef RF_D
#undef RF_D_TEXT_32
#undef RF_D_LIST_32
#undef RF_D_TEXT_64
#undef RF_D_LIST_64
#undef RF_D_TEXT_128
#undef RF_D_LIST_128
#undef RF_D_TEXT_256
#undef RF_D_LIST_256

// Columns: 32, 64, 128 or 256.
template <typename T, int kTiles>
RF_DEVICE void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T, kTiles>::shared(d, a, b, accumulate);
}
template <typename T, int kTiles>
RF_DEVICE void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<T, kTiles>::registers(d, a, b, accumulate);
}

}  // namespace resnet_fast
