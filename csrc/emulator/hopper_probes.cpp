// See hopper_probes.h. test_hopper.py compares the results with NumPy, and breaks the kernels on purpose.

#include "hopper_probes.h"

#include <algorithm>

#include <emulator/runtime.h>

namespace {

using namespace resnet_fast;

constexpr int kThreads = kProductGroups * kWarpgroup;
constexpr int kRows = kProductRows, kDepth = kProductDepth, kSteps = kDepth / 16;

// d (64 x columns) = a (64 x 64) . b (columns x 64)^T, computed twice: the first warpgroup takes a from shared memory,
// the second from registers. Threads write a, the copy engine loads b.
struct Product {
  const void* a;
  const void* b;
  float* d;  // (2, 64, columns)
  TensorMap map;
  int columns;

  template <typename F>
  void tensors(F f) const {
    f("a", a, kRows * kDepth * 2, Access::kRead);
    f("b", b, static_cast<size_t>(columns) * kDepth * 2, Access::kRead);
    f("d", d, static_cast<size_t>(kProductGroups) * kRows * columns * 4, Access::kWrite);
  }
};

template <typename T, int kColumns>
void product_kernel(const RF_GRID_CONSTANT Product p) {
  const uint32_t barrier = 0, a_at = kSwizzleBytes, b_at = a_at + kRows * kRowBytes;
  const int thread = thread_index();
  if (thread == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, kColumns * kRowBytes);
    tensor_load(b_at, p.map, 0, 0, 0, 0, barrier);
  }
  for (int i = thread; i < kRows * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    store_shared(a_at + swizzled128(row, chunk), load_global<Vec16>(static_cast<const char*>(p.a) + i * 16));
  }
  fence_async();
  sync_block();
  mbarrier_wait(barrier, 0);

  float d[kColumns / 8][4] = {};
  uint32_t a[kSteps][4];
  const int of_group = thread % kWarpgroup, lane = lane_index();
  if (thread < kWarpgroup) {
    wgmma_fence(d);
    for (int k = 0; k < kSteps; ++k) wgmma<T>(d, wgmma_operand(a_at + k * 32), wgmma_operand(b_at + k * 32), k > 0);
  } else {
    for (int k = 0; k < kSteps; ++k)
      ldmatrix_x4(a[k], a_at + swizzled128(of_group / kWarp * 16 + a_address_row(lane), k * 2 + a_address_chunk(lane)));
    wgmma_fence(d);
    for (int k = 0; k < kSteps; ++k) wgmma<T>(d, a[k], wgmma_operand(b_at + k * 32), true);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int n = 0; n < kColumns / 8; ++n)
    for (int j = 0; j < 4; ++j) {
      const int row = thread / kWarpgroup * kRows + wgmma_row(of_group, j);
      store_global(p.d + row * kColumns + wgmma_column(of_group, n, j), d[n][j]);
    }
}

template <typename T>
Status launch_product(const Product& p, const Grid& grid) {
  if (p.columns == 32) return emulator::launch<product_kernel<T, 32>>(grid, p);
  if (p.columns == 64) return emulator::launch<product_kernel<T, 64>>(grid, p);
  if (p.columns == 128) return emulator::launch<product_kernel<T, 128>>(grid, p);
  return emulator::launch<product_kernel<T, 256>>(grid, p);
}

// A box in the layout of shared memory. An Im2colBox is read at a tap.
struct Box {
  TensorMap map;
  int corner[4], tap[2];
  size_t tensor_bytes;
  int bytes;
  void* out;

  template <typename F>
  void tensors(F f) const {
    f("x", map.box.x.start, tensor_bytes, Access::kRead);
    f("out", out, static_cast<size_t>(bytes), Access::kWrite);
  }
};

template <bool kIm2col>
void box_kernel(const RF_GRID_CONSTANT Box p) {
  const uint32_t barrier = 0, at = kSwizzleBytes;
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, p.bytes);
    const int *c = p.corner, *tap = p.tap;
    if (kIm2col) im2col_load(at, p.map, c[0], c[1], c[2], c[3], tap[0], tap[1], barrier);
    if (!kIm2col) tensor_load(at, p.map, c[0], c[1], c[2], c[3], barrier);
  }
  sync_block();
  mbarrier_wait(barrier, 0);
  for (int i = thread_index() * 16; i < p.bytes; i += kThreads * 16)
    store_global(static_cast<char*>(p.out) + i, load_shared<Vec16>(at + i));
}

template <bool kIm2col, typename AnyBox>
Status box_in_shared(const AnyBox& box, const TensorBox& tensor, size_t tensor_bytes, std::array<int, 4> corner,
                     std::array<int, 2> tap, void* out) {
  Box p{{}, {}, {}, tensor_bytes, 2, out};
  for (const uint32_t side : tensor.box) p.bytes *= static_cast<int>(side);
  std::copy(corner.begin(), corner.end(), p.corner);
  std::copy(tap.begin(), tap.end(), p.tap);
  if (const Status failed = encode(&p.map, box)) return failed;
  return emulator::launch<box_kernel<kIm2col>>({1, kThreads, kSwizzleBytes + (p.bytes + 15) / 16 * 16}, p);
}

// Doubles the words of x. One warp copies them to a ring of buffers, and the other warps read them from there.
struct Ring {
  static constexpr int kPlaces = 3, kPieceBytes = kRingPieceBytes, kTakers = 4;
  const uint32_t* x;
  uint32_t* y;
  int pieces;

  template <typename F>
  void tensors(F f) const {
    f("x", x, static_cast<size_t>(pieces) * kPieceBytes, Access::kRead);
    f("y", y, static_cast<size_t>(pieces) * kPieceBytes, Access::kWrite);
  }
};

void ring_kernel(const Ring p) {
  const auto full = [](int place) { return static_cast<uint32_t>(place * kBarrierBytes); };
  const auto empty = [&](int place) { return full(Ring::kPlaces + place); };
  const auto data = [](int place) { return static_cast<uint32_t>(256 + place * Ring::kPieceBytes); };
  if (thread_index() == 0) {
    for (int i = 0; i < Ring::kPlaces; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), Ring::kTakers * kWarp);
    }
    mbarrier_init_fence();
  }
  sync_block();
  if (warp_index() == Ring::kTakers) {
    for (int i = 0; i < p.pieces && lane_index() == 0; ++i) {
      const int place = i % Ring::kPlaces, round = i / Ring::kPlaces;
      mbarrier_wait(empty(place), (round + 1) % 2);
      mbarrier_expect(full(place), Ring::kPieceBytes);
      bulk_load(data(place), p.x + i * Ring::kPieceBytes / 4, Ring::kPieceBytes, full(place));
    }
    return;
  }
  for (int i = 0; i < p.pieces; ++i) {
    const int place = i % Ring::kPlaces, round = i / Ring::kPlaces;
    mbarrier_wait(full(place), round % 2);
    const uint32_t word = load_shared<uint32_t>(data(place) + thread_index() * 4);
    fence_async();
    mbarrier_arrive(empty(place));
    store_global(p.y + i * Ring::kPieceBytes / 4 + thread_index(), 2 * word);
  }
}

}  // namespace

Status run_product(const void* a, const void* b, float* d, int columns, bool bfloat16) {
  Product p{a, b, d, {}, columns};
  const uint64_t rows = static_cast<uint64_t>(columns), bytes = rows * kRowBytes;
  const TensorBox box{
      b, {kDepth, rows, 1, 1}, {2, kRowBytes, bytes, bytes}, {kDepth, static_cast<uint32_t>(rows), 1, 1}, true};
  if (const Status failed = encode(&p.map, box)) return failed;
  const Grid grid{1, kThreads, kSwizzleBytes + (kRows + columns) * kRowBytes};
  return bfloat16 ? launch_product<Bfloat16>(p, grid) : launch_product<Half>(p, grid);
}

Status run_box(const TensorBox& box, size_t tensor_bytes, std::array<int, 4> corner, void* out) {
  return box_in_shared<false>(box, box, tensor_bytes, corner, {}, out);
}
Status run_im2col(const Im2colBox& box, size_t tensor_bytes, std::array<int, 4> first, std::array<int, 2> tap,
                  void* out) {
  return box_in_shared<true>(box, box.x, tensor_bytes, first, tap, out);
}

Status run_ring(const uint32_t* x, uint32_t* y, int pieces) {
  const Ring p{x, y, pieces};
  return emulator::launch<ring_kernel>({1, (Ring::kTakers + 1) * kWarp, 256 + Ring::kPlaces * Ring::kPieceBytes}, p);
}
