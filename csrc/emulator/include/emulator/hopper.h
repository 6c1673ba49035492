// The device functions of resnet_fast/hopper.h on a CPU. Checked in addition to the rules of runtime.h:
//
//   mbarriers     use before the init, or without a block barrier after it; arrivals or bytes that a phase does not
//                 expect; copies to one whose init was not fenced; a wait that never ends (the report names the
//                 mbarrier, the phase and what is missing). An arrival publishes what its warp has seen, a wait
//                 acquires it
//   bulk copies   the rules of a thread's write; access before the end of the mbarrier's phase, which comes only when
//                 a thread waits for it; exit from the kernel before that; a map of the other mode; a first pixel or an
//                 offset outside the range of im2col
//   wgmma         four warps at different lines or with different operands; a descriptor of an unknown mode; registers
//                 without a wgmma_fence; operands, accumulators or registers of operand a written before the wait.
//                 Until the wait these registers are NaN, so they must be in scope then
//   proxies       bulk copies and wgmma that meet a thread's write without a fence_async; bulk copies that meet a
//                 thread's read without one
//
// Not checked: a warp of which some lanes arrive or wait for the others without a sync_warp.
#pragma once

#include <emulator/runtime.h>

#define RF_GRID_CONSTANT

namespace resnet_fast {

constexpr bool kHopper = true, kHopperBuilt = true;

// Of the size and alignment of CUtensorMap, so that a kernel's parameters have the layout that they have on a GPU, and
// with a mark by which another executor of the launch finds it there.
struct alignas(64) TensorMap {
  static constexpr uint32_t kMark = 0x70616d74;
  Im2colBox box;
  bool im2col;  // else box.x alone
  uint32_t mark = kMark;
};
static_assert(sizeof(TensorMap) == 128, "the size of CUtensorMap");

}  // namespace resnet_fast

namespace emulator {

resnet_fast::Status encode(const resnet_fast::TensorMap& map);

void mbarrier_init(uint32_t at, int arrivals, Where where);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t at, int bytes, Where where);
void mbarrier_wait(uint32_t at, int parity, Where where);
void fence_async();
void bulk_load(uint32_t at, const void* p, int bytes, uint32_t barrier, Where where);
void tensor_load(uint32_t at, const resnet_fast::TensorMap& map, const int* corner, uint32_t barrier, Where where);
void im2col_load(uint32_t at, const resnet_fast::TensorMap& map, const int* first, const int* offset, uint32_t barrier,
                 Where where);

// What one thread of a warpgroup brings to a wgmma.
struct Wgmma {
  float* d;
  int columns;
  uint32_t* a;  // its registers, or nullptr and the descriptor
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
  float (*widened)(uint16_t);
};
void wgmma(Wgmma argument, Where where);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator

namespace resnet_fast {

inline Status encode(TensorMap* map, const TensorBox& box) {
  *map = {{box, {}, {}, {}}, false};
  return emulator::encode(*map);
}
inline Status encode(TensorMap* map, const Im2colBox& box) {
  *map = {box, true};
  return emulator::encode(*map);
}

inline uint32_t shared_address(uint32_t at) {
  return at;
}

inline void mbarrier_init(uint32_t at, int arrivals, RF_HERE) {
  emulator::mbarrier_init(at, arrivals, {file, line});
}
inline void mbarrier_init_fence() {
  emulator::mbarrier_init_fence();
}
inline void mbarrier_arrive(uint32_t at, RF_HERE) {
  emulator::mbarrier_arrive(at, 0, {file, line});
}
inline void mbarrier_expect(uint32_t at, int bytes, RF_HERE) {
  emulator::mbarrier_arrive(at, bytes, {file, line});
}
inline void mbarrier_wait(uint32_t at, int parity, RF_HERE) {
  emulator::mbarrier_wait(at, parity, {file, line});
}
inline void fence_async() {
  emulator::fence_async();
}
inline void bulk_load(uint32_t at, const void* p, int bytes, uint32_t barrier, RF_HERE) {
  emulator::bulk_load(at, p, bytes, barrier, {file, line});
}
inline void tensor_load(uint32_t at, const TensorMap& map, int c0, int c1, int c2, int c3, uint32_t barrier, RF_HERE) {
  const int corner[] = {c0, c1, c2, c3};
  emulator::tensor_load(at, map, corner, barrier, {file, line});
}
inline void im2col_load(uint32_t at, const TensorMap& map, int c, int w, int h, int n, int right, int down,
                        uint32_t barrier, RF_HERE) {
  const int first[] = {c, w, h, n}, offset[] = {right, down};
  emulator::im2col_load(at, map, first, offset, barrier, {file, line});
}

template <typename... D>
void wgmma_fence(D&...) {
  emulator::wgmma_fence();
}
inline void wgmma_commit() {
  emulator::wgmma_commit();
}
template <int kPending, typename... D>
void wgmma_wait(D&...) {
  emulator::wgmma_wait(kPending);
}
template <typename T, int kTiles>
void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate, RF_HERE) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 32, "32, 64, 128 or 256 columns");
  emulator::wgmma({&d[0][0], kTiles * 8, nullptr, a, b, accumulate, &number::widened<T>}, {file, line});
}
template <typename T, int kTiles>
void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, RF_HERE) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 32, "32, 64, 128 or 256 columns");
  // A reference to const that the kernel may have bound to its registers; the registers themselves are not const.
  emulator::wgmma({&d[0][0], kTiles * 8, const_cast<uint32_t*>(a), 0, b, accumulate, &number::widened<T>},
                  {file, line});
}

}  // namespace resnet_fast
