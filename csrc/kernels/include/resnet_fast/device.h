// The device functions: everything through which a kernel of this library uses the hardware.
//
//   ids            thread_index  warp_index  lane_index  block_index  block_count
//   barriers       sync_block  sync_warp
//   shuffles       shuffle  shuffle_xor
//   global memory  load_global  store_global             2, 4, 8 or 16 bytes a thread
//   shared memory  load_shared  store_shared             addresses are byte offsets into the block's shared memory
//   async copies   cp_async16  cp_async_commit  cp_async_wait                      global -> shared, 16 bytes a thread
//   tensor cores   ldmatrix_x2  ldmatrix_x4  mma_m16n8k16                          fragments: fragments.h
//   compiler       fresh                                     hide a value's origin from the compiler: device_cuda.h
//   numbers        Half  Bfloat16, pack2  unpack2, relu  larger2
//
// Under nvcc each is one or two instructions (device_cuda.h). Under any other C++ compiler the emulator in
// csrc/emulator/ implements them, so the same source runs on a CPU, where every access is checked and counted. A kernel
// must therefore access memory only through these functions: a plain `*pointer` compiles, but the emulator does not see
// it.
//
// Where some threads must not access memory, pass a flag instead of using an `if`: `store_global(p, v, inside)`. All
// lanes of a warp then run the same line together, as on the hardware, and the emulator counts them as one instruction.
//
// Additions for Hopper: hopper.h. How to write a kernel and debug it on a CPU: docs/cuda-kernels.md.
#pragma once

#include <cstdint>

#include <resnet_fast/launch.h>

namespace resnet_fast {

constexpr int kWarp = 32;

// 16 bytes as four words: the widest access of a thread.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

}  // namespace resnet_fast

#ifdef __CUDACC__
#include <resnet_fast/device_cuda.h>
#else
#include <emulator/device.h>
#endif
