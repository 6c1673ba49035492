// From accumulators to memory: the stores of a finished tile.
//
// Each accumulator fragment gives a lane two neighbouring channels of a pixel, enough for a store of 4 bytes. Over four
// column tiles (32 channels) the four lanes of a quad hold 64 bytes of one pixel. After a transposition within the quad
// each lane holds 16 adjacent bytes. The transposition is its own inverse, so it also moves values that were loaded 16
// bytes a lane to the layout of the accumulators.
#pragma once

#include <resnet_fast/device.h>
#include <resnet_fast/fragments.h>

namespace resnet_fast {

struct alignas(8) Pair {
  float first, second;
};

// ReLU of two values after rounding, in one instruction instead of four. Rounding keeps signs, so the result is that of
// ReLU before rounding.
template <typename T>
RF_DEVICE uint32_t relu2(float first, float second) {
  return larger2<T>(pack2<T>(first, second), 0u);
}

// Transposes the four words of a quad's four lanes: word t of lane j becomes word j of lane t.
RF_DEVICE Vec16 transposed_in_quad(const uint32_t (&v)[4]) {
  const int quad = lane_index() % 4;
  const bool odd = quad & 1, high = quad & 2;
  uint32_t pair[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = shuffle_xor(odd ? v[2 * i] : v[2 * i + 1], 1);
    pair[i][0] = odd ? got : v[2 * i];
    pair[i][1] = odd ? v[2 * i + 1] : got;
  }
  Vec16 out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = shuffle_xor(high ? pair[0][i] : pair[1][i], 2);
    out.word[i] = high ? got : pair[0][i];
    out.word[2 + i] = high ? pair[1][i] : got;
  }
  return out;
}

// The output of a convolution as a matrix of pixels and channels, with its epilogue.
struct Output {
  const float* bias;     // (columns)
  const void* residual;  // (rows, columns) or nullptr
  void* y;               // (rows, columns), columns a multiple of 8
  int rows, columns;
  bool relu;
};

// y[row .., column ..] = act(acc + bias + residual) for kM x 4 accumulators of 16 x 8, clipped at the edges of the
// matrix. Computed in fp32 and rounded once.
template <typename T, int kM>
RF_DEVICE void store_tile(const float (&acc)[kM][4][4], const Output& out, int row, int column) {
  const int lane = lane_index(), quad = lane % 4;
  Pair bias[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int first = column + n * 8 + d_column(lane, 0);
    const bool inside = first < out.columns;
    bias[n] = load_global<Pair>(out.bias + (inside ? first : 0), inside);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = row + m * 16 + d_row(lane, 2 * half);
      const bool inside = pixel < out.rows && column + quad * 8 < out.columns;
      const size_t at = inside ? (static_cast<size_t>(pixel) * out.columns + column + quad * 8) * 2 : 0;
      Vec16 shortcut{};
      if (out.residual != nullptr) {
        shortcut = load_global<Vec16>(static_cast<const char*>(out.residual) + at, inside);
        shortcut = transposed_in_quad(shortcut.word);
      }
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Pair s;
        unpack2<T>(shortcut.word[n], s.first, s.second);
        const float first = acc[m][n][2 * half] + bias[n].first + s.first;
        const float second = acc[m][n][2 * half + 1] + bias[n].second + s.second;
        words[n] = pack2<T>(out.relu ? relu(first) : first, out.relu ? relu(second) : second);
      }
      store_global(static_cast<char*>(out.y) + at, transposed_in_quad(words), inside);
    }
}

}  // namespace resnet_fast
