// The products of staged operands: weight fragments by ldmatrix, then mma.
#pragma once

#include <resnet_fast/device.h>
#include <resnet_fast/fragments.h>

namespace resnet_fast {

// acc += a . b for kM row tiles of 16 and kN column tiles of 8. `a`: the k-th group of 16 of the 64 values of each row.
// b: the swizzled rows from `column` on of the weights' step at `step`. `lane`: this thread's lane. Only the first
// `used` row tiles are computed.
template <typename T, int kM, int kN>
RF_DEVICE void multiply(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][4], uint32_t step, int column, int k, int lane,
                        int used = kM) {
  static_assert(kN % 2 == 0, "two column tiles at a time");
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t both[4];
    ldmatrix_x4(both, step + swizzled(column + n * 8 + b_address_row(lane), k * 2 + b_address_chunk(lane)));
    const uint32_t b0[2] = {both[0], both[1]}, b1[2] = {both[2], both[3]};
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= used) break;
      mma_m16n8k16<T>(acc[m][n], a[m], b0);
      mma_m16n8k16<T>(acc[m][n + 1], a[m], b1);
    }
  }
}

}  // namespace resnet_fast
