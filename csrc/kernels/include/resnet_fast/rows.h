// Tensors as the passes over whole tensors see them: columns of 16-byte chunks, for any number of channels.
//
// A tensor (N, C, H, W) in NHWC is M = N*H*W rows of C channels, one after another without gaps. A chunk is what a
// thread loads at once, 16 bytes: kN = 8 numbers of 16 bit or 4 of 32. Where kN does not divide C, rows do not begin at
// chunks; `copies` of them together do, the fewest for which copies * C is a multiple of kN:
//
//   C = 6, kN = 8: copies = 4        | c0 c1 c2 c3 c4 c5 c0 c1 | c2 c3 c4 c5 c0 c1 c2 c3 | c4 c5 c0 c1 c2 c3 c4 c5 |
//                                      column 0                  column 1                  column 2
//
// So every tensor is a matrix of `columns` chunks whose entry i of column j always belongs to the channel
// (kN * j + i) % C, and a thread that walks down a column keeps what it needs per channel in registers. The numbers
// behind the last whole chunk of the tensor, `rest` < kN of them, are not in the matrix: whoever finishes the pass
// takes them one by one.
//
//        width                          A block owns `width` columns and a walk of `walk` rows. Its 256 threads stand
//      [ t0  t1  t2 ]  } tall rows      `tall` rows high, and go down kUnroll * tall rows at a time, so that kUnroll
//      [ t3  t4  t5 ]  }                loads of each tensor are in flight per thread.
//      [  .   .   . ]
//
// width is at most 16 (256 consecutive bytes), and divides the columns into tiles of one size as well as it can be
// done: 7 % of the threads idle at most where a row has 16 columns and more. Only the shape decides, so that whatever
// is summed in this order is the same on every machine.
#pragma once

#include <resnet_fast/launch.h>

namespace resnet_fast {

enum class Dtype { kHalf, kBfloat16, kFloat32 };

RF_HOST_DEVICE constexpr int bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

constexpr int kChunkBytes = 16;
constexpr int kRowsThreads = 256;
constexpr int kRowsWidth = 16;

struct Rows {
  long long numbers;  // M * C
  int channels;       // C
  int kn;             // numbers of a chunk
  int copies;         // rows of the tensor that make a row of the matrix
  int columns;        // chunks of a row of the matrix
  int full, last;     // rows that are complete, and chunks of the one that is not
  int rest;           // numbers behind the last whole chunk
  int width, tall, tiles;
  int walk, splits;  // rows of a walk; walks that cover a column

  RF_HOST_DEVICE int rows() const {
    return full + (last > 0 ? 1 : 0);
  }
  // Channels of a row of the matrix, each of the tensor's `copies` times.
  RF_HOST_DEVICE int wide() const {
    return copies * channels;
  }
  RF_HOST_DEVICE int blocks() const {
    return tiles * splits;
  }
  // The i-th number behind the last whole chunk: where it is, and its channel.
  RF_HOST_DEVICE long long behind(int i) const {
    return numbers - rest + i;
  }
  RF_HOST_DEVICE int channel_behind(int i) const {
    return (last * kn + i) % channels;
  }
  // Rows in which a column has a chunk.
  RF_HOST_DEVICE int height(int column) const {
    return full + (column < last ? 1 : 0);
  }
  // How many of those are in a walk.
  RF_HOST_DEVICE int count(int split, int column) const {
    const int left = height(column) - split * walk;
    return left < 0 ? 0 : left < walk ? left : walk;
  }
};

// At most `blocks` blocks or one per tile of columns, where every thread has at least `least` rows if there are enough.
RF_HOST_DEVICE Rows rows_of(long long m, int channels, Dtype dtype, int blocks, int least) {
  Rows r{};
  r.numbers = m * channels;
  r.channels = channels;
  r.kn = kChunkBytes / bytes_of(dtype);
  r.copies = 1;
  while (static_cast<long long>(r.copies) * channels % r.kn != 0) r.copies *= 2;
  r.columns = r.copies * channels / r.kn;
  const long long chunks = r.numbers / r.kn;
  r.full = static_cast<int>(chunks / r.columns);
  r.last = static_cast<int>(chunks % r.columns);
  r.rest = static_cast<int>(r.numbers % r.kn);
  r.tiles = (r.columns + kRowsWidth - 1) / kRowsWidth;
  r.width = (r.columns + r.tiles - 1) / r.tiles;
  r.tall = kRowsThreads / r.width;
  const int most = blocks / r.tiles > 1 ? blocks / r.tiles : 1;
  const int wanted = (r.rows() + r.tall * least - 1) / (r.tall * least);
  const int splits = wanted < 1 ? 1 : wanted < most ? wanted : most;
  r.walk = r.rows() == 0 ? 1 : (r.rows() + splits - 1) / splits;
  r.splits = r.rows() == 0 ? 1 : (r.rows() + r.walk - 1) / r.walk;
  return r;
}

}  // namespace resnet_fast
