// Runs the threads of a block on a CPU, for the emulated device functions.
//
// Threads are fibers. A thread runs until it must wait for others, at a barrier or a collective of its warp; a seeded
// random draw decides which one runs next. A mistake ends the launch with a report that names kernel, block, thread and
// source line:
//
//   global memory   access outside the tensors that the launch names, or unaligned; write to an input; two threads that
//                   write one place; read of an output before it is written; output not written in full
//   shared memory   access outside the block's, or unaligned; read of bytes that nobody wrote; two accesses, at least
//                   one a write, with no barrier between them (vector clocks, one component per warp)
//   cp_async        access to bytes in flight; exit from the kernel with bytes in flight
//   collectives     lanes of a warp, or threads of a block, that wait at different lines, or for one that has exited
//
// Counters holds the counts of a launch; module.cpp passes them to Python.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <resnet_fast/launch.h>

namespace emulator {

struct Where {
  const char* file;
  int line;
};

enum class Kind {
  kGlobalRead,
  kGlobalCopy,
  kGlobalWrite,
  kSharedRead,
  kSharedWrite,
  kLdmatrix,
  kBulkRead,
  kWgmma,
};

// Counts of one tensor. Bytes: what threads requested. Sectors: the 32-byte units that memory moves, once per
// instruction of a warp. Unique sectors: distinct ones over the whole launch, which DRAM must deliver. L2 sectors:
// those that L2 delivers, which are the sectors that the block has not read before (L1 holds those), and all that
// bypass L1 (cp_async).
struct BufferCount {
  uint64_t size = 0;
  uint64_t bytes_read = 0, sectors_read = 0, unique_sectors_read = 0, l2_sectors_read = 0;
  uint64_t bytes_written = 0, sectors_written = 0, unique_sectors_written = 0;
};

// Counts of one source line. `units`: sectors for global memory, wavefronts (cycles of the 32 banks) for shared memory.
// `least`: the same with full sectors, or without bank conflicts. `narrowest`: bytes per lane. A wavefront of a wgmma
// is 128 bytes of operands: each of the four warps fetches 16 rows of a, if a is in shared memory, and all fetch b
// together.
struct SiteCount {
  uint64_t instructions = 0, units = 0, least = 0;
  int narrowest = 16;
};

struct Counters {
  std::string kernel;
  resnet_fast::Grid grid;
  std::map<std::string, BufferCount> buffers;
  std::map<std::pair<std::string, Kind>, SiteCount> sites;  // by "file:line"
  uint64_t mma = 0;                                         // m16n8k16: 2,048 multiply-adds each
  uint64_t wgmma = 0, wgmma_multiply_adds = 0;
  uint64_t bulk_copies = 0, bulk_bytes = 0;  // bytes of shared memory, zeros among them
  uint64_t barriers = 0;                     // of blocks
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int current_thread();
int current_block();
int block_count();

void sync_block(Where where);
void sync_warp(Where where);
uint32_t shuffle_xor(uint32_t value, int mask, Where where);
void global_access(const void* p, int bytes, Kind kind, bool inside, Where where);
unsigned char* shared_access(uint32_t at, int bytes, Kind kind, bool inside, Where where);
void cp_async16(uint32_t at, const void* p, bool inside, Where where);
void cp_async_commit();
void cp_async_wait(int pending, Where where);
void ldmatrix(uint32_t* r, int matrices, uint32_t at, Where where);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, float (*widened)(uint16_t), Where where);

struct Tensor {
  std::string name;
  const unsigned char* start;
  size_t bytes;
  resnet_fast::Access access;
};

// A launch for another executor of the same kernel: its name, its grid, the bytes of its parameter, and its tensors.
struct Diverted {
  const char* kernel;
  int blocks, threads, shared;
  const void* params;
  uint64_t params_bytes;
  const Tensor* tensors;
  int count;
};

// Executes a launch in the emulator's place. Returns nullptr, or a report that stays valid until the next launch.
using Executor = resnet_fast::Status (*)(const Diverted& launch);

// The GPU that launchers believe to be on, the seed of the next launch's order of threads and blocks, and what executes
// launches in the emulator's place, if anything.
struct Settings {
  resnet_fast::Device device{90, 132, 227 * 1024, 0, nullptr};
  uint64_t seed = 0;
  Executor executor = nullptr;
};
Settings& settings();

// Counters of the launches since the last call, in their order.
std::vector<Counters> take_counters();

// Runs `body` as every thread of every block. Returns nullptr, or the report of a fault, which stays valid until the
// next launch.
resnet_fast::Status execute(const char* kernel, const resnet_fast::Grid& grid, std::vector<Tensor> tensors,
                            const std::function<void()>& body);

// `signature`: "... [with auto kKernel = space::kernel<space::Type, 3>; ...]" -> "kernel<Type, 3>".
std::string readable_kernel(const char* signature);

// The kernel's name with its template arguments, out of what the compiler calls this function.
template <auto kKernel>
const std::string& name_of() {
  static const std::string name = readable_kernel(__PRETTY_FUNCTION__);
  return name;
}

template <auto kKernel, typename Params>
resnet_fast::Status launch(const resnet_fast::Grid& grid, const Params& params) {
  std::vector<Tensor> tensors;
  params.tensors([&](const char* tensor, const void* start, size_t bytes, resnet_fast::Access access) {
    if (start != nullptr) tensors.push_back({tensor, static_cast<const unsigned char*>(start), bytes, access});
  });
  const char* kernel = name_of<kKernel>().c_str();
  if (const Executor other = settings().executor) {
    return other({kernel, grid.blocks, grid.threads, grid.shared, &params, sizeof(Params), tensors.data(),
                  static_cast<int>(tensors.size())});
  }
  return execute(kernel, grid, std::move(tensors), [&] { kKernel(params); });
}

}  // namespace emulator
