// What the passes over whole tensors do with chunks: find them, load them, take them apart, and combine what the
// threads of a block have summed. rows.h says what a column, a walk and a slot are.
#pragma once

#include <resnet_fast/device.h>
#include <resnet_fast/rows.h>

namespace resnet_fast {

// Where a thread stands: its column, its first row, and the row before which it stops (0: it has no column).
struct Place {
  int split, column, slot, row, end;
  bool has_column;
};

RF_DEVICE Place place_of(const Rows& r) {
  Place at;
  at.split = block_index() / r.tiles;
  at.column = block_index() % r.tiles * r.width + thread_index() % r.width;
  at.slot = thread_index() / r.width;
  at.has_column = at.slot < r.tall && at.column < r.columns;
  const int first = at.split * r.walk;
  at.row = first + at.slot;
  at.end = at.has_column ? first + r.count(at.split, at.column) : 0;
  return at;
}

template <typename T>
constexpr int kChunk = kChunkBytes / T::kBytes;

// The address of a chunk. What to load from it is left to the kernel, so that its line is the one that is counted.
RF_DEVICE const char* chunk_of(const void* tensor, const Rows& r, int row, int column) {
  return static_cast<const char*>(tensor) + (static_cast<size_t>(row) * r.columns + column) * kChunkBytes;
}
RF_DEVICE char* chunk_of(void* tensor, const Rows& r, int row, int column) {
  return static_cast<char*>(tensor) + (static_cast<size_t>(row) * r.columns + column) * kChunkBytes;
}

template <typename T>
RF_DEVICE void unpack(const Vec16& v, float (&out)[kChunk<T>]) {
  if constexpr (T::kBytes == 4) {
    __builtin_memcpy(out, &v, kChunkBytes);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack2<T>(v.word[i], out[2 * i], out[2 * i + 1]);
  }
}
template <typename T>
RF_DEVICE Vec16 pack(const float (&in)[kChunk<T>]) {
  Vec16 v;
  if constexpr (T::kBytes == 4) {
    __builtin_memcpy(&v, in, kChunkBytes);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
  }
  return v;
}

// What `value` is after it was stored.
template <typename T>
RF_DEVICE float rounded(float value) {
  if constexpr (T::kBytes == 4) {
    return value;
  } else {
    float first, second;
    unpack2<T>(pack2<T>(value, 0.0f), first, second);
    return first;
  }
}

// One number of a tensor.
template <typename T>
RF_DEVICE float load_number(const void* tensor, long long at, bool inside) {
  if constexpr (T::kBytes == 4) {
    return load_global<float>(static_cast<const float*>(tensor) + at, inside);
  } else {
    float first, second;
    unpack2<T>(load_global<uint16_t>(static_cast<const uint16_t*>(tensor) + at, inside), first, second);
    return first;
  }
}
template <typename T>
RF_DEVICE void store_number(void* tensor, long long at, float value, bool inside) {
  if constexpr (T::kBytes == 4) {
    store_global(static_cast<float*>(tensor) + at, value, inside);
  } else {
    store_global(static_cast<uint16_t*>(tensor) + at, static_cast<uint16_t>(pack2<T>(value, 0.0f)), inside);
  }
}

// The numbers of the tensor's first row, of the channels of a column: of each channel the same one for every thread.
template <typename T>
RF_DEVICE void load_first_row(float (&out)[kChunk<T>], const void* tensor, const Rows& r, int column, bool inside) {
  if (r.copies == 1) {
    unpack<T>(load_global<Vec16>(chunk_of(tensor, r, 0, column), inside), out);
  } else {
    int c = column * kChunk<T> % r.channels;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      out[i] = load_number<T>(tensor, c, inside);
      c = c + 1 == r.channels ? 0 : c + 1;
    }
  }
}

// Of a vector (C) fp32 what belongs to a column; 16 bytes at a time where chunks begin at channels.
template <int kN>
RF_DEVICE void load_channels(float (&out)[kN], const float* vector, const Rows& r, int column, bool inside) {
  if (r.copies == 1) {
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const Vec16 four = load_global<Vec16>(vector + column * kN + i, inside);
      __builtin_memcpy(out + i, &four, kChunkBytes);
    }
  } else {
    int c = column * kN % r.channels;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      out[i] = load_global<float>(vector + c, inside);
      c = c + 1 == r.channels ? 0 : c + 1;
    }
  }
}
template <int kN>
RF_DEVICE void store_floats(float* to, const float* from, bool inside) {
#pragma unroll
  for (int i = 0; i < kN; i += 4) {
    Vec16 four;
    __builtin_memcpy(&four, from + i, kChunkBytes);
    store_global(to + i, four, inside);
  }
}

// Bytes of shared memory for fold_slots.
template <int kFloats>
constexpr int kFoldBytes = kFloats * kRowsThreads * 4;

// Combines the states of the threads that stand under each other, thread slot * width + i for every slot < tall, into
// the one of slot 0, as a tree: `combine(mine, other)`, mine the one further up. The order is always the same. Threads
// store 16 bytes each, next to each other: no bank conflicts for any width.
template <int kFloats, typename Combine>
RF_DEVICE void fold_slots(float (&state)[kFloats], int width, int tall, Combine combine) {
  constexpr int kQuads = kFloats / 4, kSingles = kFloats % 4;
  const int t = thread_index(), slot = t / width;
  const auto quad = [](int i, int thread) { return static_cast<uint32_t>((i * kRowsThreads + thread) * kChunkBytes); };
  const auto single = [](int i, int thread) {
    return static_cast<uint32_t>((kQuads * 4 + i) * kRowsThreads * 4 + thread * 4);
  };
  int reach = 1;
  while (reach < tall) reach *= 2;
  // Who is read at a distance stores before; nobody is written to after he was read.
  for (int below = reach / 2; below > 0; below /= 2) {
    const bool gives = slot >= below && slot < 2 * below && slot < tall;
    const bool takes = slot < below && slot + below < tall;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      Vec16 four;
      __builtin_memcpy(&four, state + 4 * i, kChunkBytes);
      store_shared(quad(i, t), four, gives);
    }
#pragma unroll
    for (int i = 0; i < kSingles; ++i) store_shared(single(i, t), state[4 * kQuads + i], gives);
    sync_block();
    float other[kFloats];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const Vec16 four = load_shared<Vec16>(quad(i, t + below * width), takes);
      __builtin_memcpy(other + 4 * i, &four, kChunkBytes);
    }
#pragma unroll
    for (int i = 0; i < kSingles; ++i) other[4 * kQuads + i] = load_shared<float>(single(i, t + below * width), takes);
    if (takes) combine(state, other);
  }
}

}  // namespace resnet_fast
