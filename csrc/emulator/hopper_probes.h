// Small kernels, one for each part of Hopper's vocabulary: what the bindings call. Kept apart from them, so that a
// kernel that a test breaks compiles in a second.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include <resnet_fast/hopper.h>

constexpr int kProductGroups = 2, kProductRows = 64, kProductDepth = 64;

// d (2, 64, columns) = a (64, 64) . b (columns, 64)^T by wgmma: with a from shared memory, and from registers.
resnet_fast::Status run_product(const void* a, const void* b, float* d, int columns, bool bfloat16);

// A box of a tensor of so many bytes, as it lies in shared memory; corner with c first. Of an Im2colBox at a tap.
resnet_fast::Status run_box(const resnet_fast::TensorBox& box, size_t tensor_bytes, std::array<int, 4> corner,
                            void* out);
resnet_fast::Status run_im2col(const resnet_fast::Im2colBox& box, size_t tensor_bytes, std::array<int, 4> first,
                               std::array<int, 2> tap, void* out);

// y = 2 * x by bulk copies through a ring.
constexpr int kRingPieceBytes = 512;
resnet_fast::Status run_ring(const uint32_t* x, uint32_t* y, int pieces);
