// Small kernels that the bindings call, one for each group of Hopper's device functions. They are apart from the
// bindings so that a kernel that a test breaks compiles in a second.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include <resnet_fast/hopper.h>

constexpr int kProductGroups = 2, kProductRows = 64, kProductDepth = 64;

// d (2, 64, columns) = a (64, 64) . b (columns, 64)^T by wgmma: with a from shared memory, and from registers.
resnet_fast::Status run_product(const void* a, const void* b, float* d, int columns, bool bfloat16);

// A box of a tensor of `tensor_bytes`, in the layout of shared memory; corner with c first. An Im2colBox is read at a
// tap.
resnet_fast::Status run_box(const resnet_fast::TensorBox& box, size_t tensor_bytes, std::array<int, 4> corner,
                            void* out);
resnet_fast::Status run_im2col(const resnet_fast::Im2colBox& box, size_t tensor_bytes, std::array<int, 4> first,
                               std::array<int, 2> tap, void* out);

// y = 2 * x by bulk copies through a ring.
constexpr int kRingPieceBytes = 512;
resnet_fast::Status run_ring(const uint32_t* x, uint32_t* y, int pieces);
