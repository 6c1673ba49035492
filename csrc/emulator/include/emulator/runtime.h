// A block of threads on a CPU: what the emulated vocabulary calls.
//
// Threads are fibers. A thread runs until it must wait for others (a barrier, a collective of its warp); who runs next
// is drawn from a seeded random order. All that is wrong ends the launch with a report that names kernel, block, thread
// and source line:
//
//   global memory   an access outside of the tensors that the launch names, or not aligned; a write to an input; two
//                   threads writing one place; reading what the launch writes; an output that was not written in full
//   shared memory   an access outside of the block's, or not aligned; reading what nobody wrote; two accesses of which
//   one
//                   is a write with no barrier between them (vector clocks, one component per warp)
//   cp_async        any access to bytes in flight; leaving the kernel with bytes in flight
//   collectives     lanes of a warp, or threads of a block, that wait at different lines; that wait for one which left
//
// What is counted is in Counters, per launch: module.cpp gives it to Python.
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

// Of one tensor. Bytes are what threads asked for; sectors are the 32-byte pieces that memory moves, once per
// instruction of a warp; unique ones are those that differ, over the whole launch: what DRAM must deliver. Of the
// sectors read, L2 delivers those that the block has not read before, which L1 holds, and all that go round L1
// (cp_async).
struct BufferCount {
  uint64_t size = 0;
  uint64_t bytes_read = 0, sectors_read = 0, unique_sectors_read = 0, l2_sectors_read = 0;
  uint64_t bytes_written = 0, sectors_written = 0, unique_sectors_written = 0;
};

// Of one source line. `units`: sectors for global memory, wavefronts for shared memory (cycles of its 32 banks);
// `least`: the same with full sectors, or without bank conflicts. `narrowest`: bytes per lane. A wgmma's wavefronts are
// 128 bytes of operands each: the four warps fetch 16 rows of a apiece, where it is in shared memory, and b together.
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

// The GPU that launchers believe to be on, and the seed of the next launch's order of threads and blocks.
struct Settings {
  resnet_fast::Device device{90, 132, 227 * 1024, nullptr};
  uint64_t seed = 0;
};
Settings& settings();

// Counters of the launches since the last call, in their order.
std::vector<Counters> take_counters();

struct Tensor {
  std::string name;
  const unsigned char* start;
  size_t bytes;
  resnet_fast::Access access;
};

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
  return execute(name_of<kKernel>().c_str(), grid, std::move(tensors), [&] { kKernel(params); });
}

}  // namespace emulator
