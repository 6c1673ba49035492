// The emulator's scheduler and collectives. state.h has the shared state, runtime.h lists what is checked and counted.

#include "state.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <sstream>

#include <emulator/product.h>
#include <resnet_fast/fragments.h>

#if defined(__x86_64__)
// System V ABI: rbx, rbp and r12-r15 belong to the caller; the compiler has saved all other registers.
asm(R"(
.text
.globl resnet_fast_emulator_switch
.hidden resnet_fast_emulator_switch
.type resnet_fast_emulator_switch, @function
resnet_fast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnet_fast_emulator_switch, .-resnet_fast_emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

namespace emulator {

Launch* now = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;  // red zones around every local array
#else
constexpr size_t kStack = 96 << 10;
#endif

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

}  // namespace

std::string text_of(Where where) {
  return std::string(base_name(where.file)) + ":" + std::to_string(where.line);
}

uint64_t draw(uint64_t below) {
  uint64_t x = now->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  now->random = x;
  return (x >> 11) % below;
}

std::string thread_text(int index) {
  if (index >= kMaxWarps * kWarp) return "bulk copies of " + barrier_text(index / kWarp - kMaxWarps);
  return "thread " + std::to_string(index) + " (warp " + std::to_string(index / kWarp) + ", lane " +
         std::to_string(index % kWarp) + ")";
}

[[noreturn]] void fail(Where where, const std::string& what) {
  std::ostringstream out;
  out << base_name(where.file) << ":" << where.line << ": " << what << "\n  kernel " << now->kernel << ", block "
      << now->block << " of " << now->grid.blocks << ", " << thread_text(now->current->index);
  throw Fault(out.str());
}

Thread& self() {
  return *now->current;
}
int self_warp() {
  return now->current->index / kWarp;
}
int self_lane() {
  return now->current->index % kWarp;
}

namespace {

// ---- scheduling ----

void run_thread();

int take_runnable() {
  const size_t i = draw(now->runnable.size());
  const int next = now->runnable[i];
  now->runnable[i] = now->runnable.back();
  now->runnable.pop_back();
  return next;
}

}  // namespace

// Lets another thread run. This one continues once another has made it runnable and it is drawn.
void yield_from(int me) {
  if (now->runnable.empty()) {
    now->fibers[me].switch_to(now->scheduler);
  } else {
    const int next = take_runnable();
    if (next != me) {
      now->current = &now->threads[next];
      now->fibers[me].switch_to(now->fibers[next]);
    }
  }
  now->current = &now->threads[me];
}

void wait_at(const char* what, Where where) {
  Thread& me = self();
  me.waiting = true;
  me.waits_for = what;
  me.where = where;
  yield_from(me.index);
}

void release(int thread) {
  now->threads[thread].waiting = false;
  now->runnable.push_back(thread);
}

namespace {

void run_thread() {
  Fiber::arrived();
  const int me = now->current->index;
  try {
    (*now->body)();
    Thread& t = now->threads[me];
    t.done = true;
    const auto copies = [](const std::vector<Copy>& group) { return !group.empty(); };
    if (copies(t.issued) || std::any_of(t.groups.begin(), t.groups.end(), copies))
      fail(t.where.file ? t.where : Where{"kernel", 0}, "leaves the kernel with a cp_async that it never waited for");
    if (!t.async.issued.empty() || !t.async.groups.empty())
      fail(t.where.file ? t.where : Where{"kernel", 0}, "leaves the kernel with a wgmma that it never waited for");
    Warp& w = now->warps[me / kWarp];
    w.left |= 1u << me % kWarp;
    if (w.arrived)
      fail(w.where,
           std::string("lanes of the warp wait here for a ") + w.what + " that this one never reaches: it left");
    if (now->at_barrier) fail(now->barrier, "threads of the block wait at this barrier for one that left the kernel");
  } catch (const Fault& fault) {
    if (now->fault.empty()) now->fault = fault.what();
  } catch (const std::exception& error) {
    if (now->fault.empty()) now->fault = error.what();
  }
  if (!now->fault.empty()) now->runnable.clear();
  yield_from(me);
  __builtin_unreachable();
}

// ---- collectives of a warp ----

void collective(const char* what, void* argument, Where where, void (*run)(Warp&, Where)) {
  Thread& me = self();
  Warp& warp = now->warps[me.index / kWarp];
  if (warp.left) fail(where, std::string("waits for a ") + what + " of a warp that lanes have left");
  if (warp.arrived == 0) {
    warp.what = what;
    warp.where = where;
  } else if (std::strcmp(warp.what, what) != 0 || warp.where.line != where.line ||
             std::strcmp(warp.where.file, where.file) != 0) {
    fail(where, std::string("lanes of a warp part: this one is at a ") + what + ", others wait for a " + warp.what +
                    " at " + text_of(warp.where));
  }
  warp.arguments[me.index % kWarp] = argument;
  warp.arrived |= 1u << me.index % kWarp;
  if (warp.arrived != kAllLanes) return wait_at(what, where);
  warp.arrived = 0;
  run(warp, where);
  const int first = me.index / kWarp * kWarp;
  for (int t = first; t < first + kWarp; ++t) release(t);
  yield_from(me.index);
}

struct Shuffle {
  uint32_t value, result;
  int mask;
};

struct LoadMatrix {
  uint32_t* r;
  int matrices;
  uint32_t at;
};

struct Multiply {
  float* d;
  const uint32_t *a, *b;
  float (*widened)(uint16_t);
};

void run_shuffle(Warp& warp, Where) {
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* mine = static_cast<Shuffle*>(warp.arguments[lane]);
    mine->result = static_cast<Shuffle*>(warp.arguments[(lane ^ mine->mask) % kWarp])->value;
  }
}

void run_ldmatrix(Warp& warp, Where where) {
  const int id = now->sites.id(where, Kind::kLdmatrix);
  SiteCount& site = count_of(id);
  site.instructions += 1;
  std::array<uint64_t, kWarp> address{};
  const int matrices = static_cast<LoadMatrix*>(warp.arguments[0])->matrices;
  const uint32_t lanes = matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1;
  for (int lane = 0; lane < 8 * matrices; ++lane) address[lane] = static_cast<LoadMatrix*>(warp.arguments[lane])->at;
  count_shared(site, address.data(), lanes, 16);
  for (int m = 0; m < matrices; ++m) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const unsigned char* row = now->shared + address[8 * m + lane / 4];
      std::memcpy(&static_cast<LoadMatrix*>(warp.arguments[lane])->r[m], row + lane % 4 * 4, 4);
    }
  }
}

void run_mma(Warp& warp, Where) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<Multiply*>(warp.arguments[lane]);
    for (int w = 0; w < 4; ++w)
      for (int i = 0; i < 2; ++i)
        a[resnet_fast::a_row(lane, w)][resnet_fast::a_k(lane, w) + i] = m.widened(m.a[w] >> 16 * i & 0xffff);
    for (int w = 0; w < 2; ++w)
      for (int i = 0; i < 2; ++i)
        b[resnet_fast::b_k(lane, w) + i][resnet_fast::b_column(lane)] = m.widened(m.b[w] >> 16 * i & 0xffff);
    for (int i = 0; i < 4; ++i) d[resnet_fast::d_row(lane, i)][resnet_fast::d_column(lane, i)] = m.d[i];
  }
  multiply_add(d[0], a[0], b[0], 16, 8, 16);
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& m = *static_cast<Multiply*>(warp.arguments[lane]);
    for (int i = 0; i < 4; ++i) m.d[i] = d[resnet_fast::d_row(lane, i)][resnet_fast::d_column(lane, i)];
  }
  now->counters.mma += 1;
}

void run_sync_warp(Warp& warp, Where) {
  const auto index = &warp - now->warps.data();
  warp.clock[index] += 1;
}

// ---- blocks ----

void start_block(int block) {
  now->block = block;
  now->at_barrier = 0;
  now->runnable.clear();
  std::memset(now->shared, 0xff, now->grid.shared);  // NaN in every format
  std::fill(now->history.begin(), now->history.end(), History{});
  now->reads.clear();
  now->free_read = -1;
  for (int t = 0; t < now->grid.threads; ++t) {
    now->threads[t] = Thread{};
    now->threads[t].index = t;
    now->fibers[t].reset(run_thread);
    now->runnable.push_back(t);
  }
  for (size_t i = 0; i < now->warps.size(); ++i) {
    Warp& w = now->warps[i];
    w.arrived = w.left = 0;
    w.clock.fill(0);
    w.clock[i] = 1;
  }
  start_block_of_hopper();
}

void run_block(int block) {
  start_block(block);
  const int first = take_runnable();
  now->current = &now->threads[first];
  now->scheduler.switch_to(now->fibers[first]);
  // No thread can run any more.
  if (now->fault.empty()) {
    for (Thread& t : now->threads) {
      if (t.done) continue;
      now->current = &t;
      try {
        fail(t.where, awaited(t.async, t.waits_for));
      } catch (const Fault& fault) {
        now->fault = fault.what();
      }
      break;
    }
  }
  if (now->fault.empty()) now->fault = left_in_flight();
  if (now->fault.empty()) flush_logs();
}

std::string& last_fault() {
  static std::string text;
  return text;
}

}  // namespace

// ---- what the vocabulary calls ----

int current_thread() {
  return now->current->index;
}

int current_block() {
  return now->block;
}

int block_count() {
  return now->grid.blocks;
}

void sync_block(Where where) {
  Thread& me = self();
  for (const Warp& w : now->warps)
    if (w.left) fail(where, "waits at a barrier of a block that threads have left");
  if (now->at_barrier == 0) {
    now->barrier = where;
    now->barrier_first = me.index;
  } else if (now->barrier.line != where.line || std::strcmp(now->barrier.file, where.file) != 0) {
    fail(where, "threads of a block part: this one is at this barrier, " + thread_text(now->barrier_first) +
                    " waits at the one at " + text_of(now->barrier));
  }
  if (now->warps[self_warp()].arrived)
    fail(where, std::string("is at a barrier while lanes of its warp wait for a ") + now->warps[self_warp()].what +
                    " at " + text_of(now->warps[self_warp()].where));
  now->at_barrier += 1;
  if (now->at_barrier < now->grid.threads) return wait_at("barrier of the block", where);
  now->at_barrier = 0;
  now->counters.barriers += 1;
  join_clocks();
  flush_logs();
  for (int t = 0; t < now->grid.threads; ++t) release(t);
  yield_from(me.index);
}

void sync_warp(Where where) {
  collective("sync_warp", nullptr, where, run_sync_warp);
}

uint32_t shuffle_xor(uint32_t value, int mask, Where where) {
  Shuffle argument{value, 0, mask};
  collective("shuffle_xor", &argument, where, run_shuffle);
  return argument.result;
}

void ldmatrix(uint32_t* r, int matrices, uint32_t at, Where where) {
  if (self_lane() < 8 * matrices) {
    check_bounds(at, 16, where);
    check_read(at, 16, where);
  }
  expect_free(r, matrices, "ldmatrix writes", where);
  self().async.registers_fenced = false;
  LoadMatrix argument{r, matrices, at};
  collective(matrices == 4 ? "ldmatrix_x4" : "ldmatrix_x2", &argument, where, run_ldmatrix);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, float (*widened)(uint16_t), Where where) {
  expect_free(a, 4, "mma reads", where);
  expect_free(b, 2, "mma reads", where);
  expect_free(d, 4, "mma writes", where);
  Multiply argument{d, a, b, widened};
  collective("mma_m16n8k16", &argument, where, run_mma);
}

std::string readable_kernel(const char* signature) {
  std::string text = signature;
  const size_t begin = text.find("kKernel = ");
  if (begin == std::string::npos) return text;
  text = text.substr(begin + std::strlen("kKernel = "));
  text = text.substr(0, text.find_first_of(";]"));
  for (const char* space : {"resnet_fast::", "{anonymous}::", "(anonymous namespace)::", "<unnamed>::", "&"})
    for (size_t at; (at = text.find(space)) != std::string::npos;) text.erase(at, std::strlen(space));
  if (!text.empty() && text.front() == '(') text = text.substr(1, text.find_last_of(')') - 1);
  return text;
}

Settings& settings() {
  static Settings all;
  return all;
}

namespace {

// Why the emulated device cannot launch this grid, or "".
std::string refused(const char* kernel, const resnet_fast::Grid& grid) {
  const int shared = settings().device.shared;
  if (grid.threads % kWarp == 0 && grid.threads > 0 && grid.threads <= kMaxWarps * kWarp && grid.blocks > 0 &&
      grid.shared <= shared)
    return "";
  return std::string("kernel ") + kernel + " cannot be launched: " + std::to_string(grid.blocks) + " blocks of " +
         std::to_string(grid.threads) + " threads with " + std::to_string(grid.shared) +
         " bytes of shared memory, of which the device has " + std::to_string(shared);
}

// The history of a tensor; fills an output with NaN.
Buffer buffer_for(Tensor tensor) {
  Buffer b;
  const auto start = reinterpret_cast<uintptr_t>(tensor.start);
  b.first_sector = start / kSector;
  b.touched.resize((start + tensor.bytes - 1) / kSector - b.first_sector + 1);
  b.in_l1.resize(b.touched.size());
  if (tensor.access == Access::kWrite) {
    b.writers.resize((tensor.bytes + 1) / 2);
    std::memset(const_cast<unsigned char*>(tensor.start), 0xff, tensor.bytes);
  }
  b.tensor = std::move(tensor);
  return b;
}

// Makes the threads, warps and shared memory that all blocks use one after another.
void make_block() {
  const resnet_fast::Grid& grid = now->grid;
  now->threads.resize(grid.threads);
  now->warps.resize(grid.threads / kWarp);
  now->fibers.reserve(grid.threads);
  for (int t = 0; t < grid.threads; ++t) now->fibers.emplace_back(kStack, run_thread);
  constexpr size_t kAlign = 1024;
  now->shared_storage.resize(grid.shared + kAlign);
  now->shared =
      now->shared_storage.data() + (kAlign - reinterpret_cast<uintptr_t>(now->shared_storage.data()) % kAlign) % kAlign;
  now->history.resize(grid.shared / kGranule + 1);
}

// Runs all blocks in a random order, until one fails.
void run_blocks() {
  std::vector<int> order(now->grid.blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int i = now->grid.blocks - 1; i > 0; --i) std::swap(order[i], order[draw(i + 1)]);
  for (int block : order) {
    run_block(block);
    if (!now->fault.empty()) return;
  }
}

}  // namespace

resnet_fast::Status execute(const char* kernel, const resnet_fast::Grid& grid, std::vector<Tensor> tensors,
                            const std::function<void()>& body) {
  last_fault() = refused(kernel, grid);
  if (!last_fault().empty()) return last_fault().c_str();
  auto launch = std::make_unique<Launch>();
  now = launch.get();
  now->kernel = kernel;
  now->grid = grid;
  now->body = &body;
  now->counters.kernel = kernel;
  now->counters.grid = grid;
  now->random = settings().seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  for (Tensor& t : tensors)
    if (t.bytes > 0) now->buffers.push_back(buffer_for(std::move(t)));
  make_block();
  run_blocks();
  for (const Buffer& b : now->buffers)
    if (now->fault.empty()) now->fault = unwritten(b);
  last_fault() = now->fault;
  if (now->fault.empty()) keep_counters();
  now = nullptr;
  return last_fault().empty() ? nullptr : last_fault().c_str();
}

}  // namespace emulator
