// Prints CuTe's layouts of the instructions among the device functions, one line each: a name, then the indices of the
// values of all lanes. The index of an mma operand is row + rows * column (for a: row, k; for b: column of the product,
// k). That of ldmatrix is a bit of the 32 rows of 128 bits that the lanes address. wgmma has 128 threads. The line of
// the 128-byte swizzle has the positions of the values of eight rows. A matrix descriptor follows, and the corners
// (lower W, H, upper W, H) of im2col for the filters, paddings and dilations (W, H) in test_layouts.py, which compiles
// this file for the host.

#include <cstdio>

#include <cute/swizzle_layout.hpp>  // before its use in the headers below

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include <cute/arch/copy_sm100_tma.hpp>  // these three too: the last header does not include what it uses
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/detail/dependent_false.hpp>

#include <cutlass/conv/collective/detail.hpp>

template <typename Layout>
void print(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int lane = 0; lane < cute::size<0>(layout); ++lane)
    for (int value = 0; value < cute::size<1>(layout); ++value)
      std::printf(" %d", static_cast<int>(layout(lane, value)));
  std::printf("\n");
}

template <typename Mma>
void print_mma(const char* a, const char* b, const char* d) {
  using Traits = cute::MMA_Traits<Mma>;
  print(a, typename Traits::ALayout{});
  print(b, typename Traits::BLayout{});
  print(d, typename Traits::CLayout{});
}

void print_corners(int filter_w, int filter_h, int padding_w, int padding_h, int dilation_w, int dilation_h) {
  cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2> shape;
  shape.shape_B = {64, filter_h, filter_w, 64};
  shape.lower_padding = shape.upper_padding = {padding_h, padding_w};
  shape.dilation = {dilation_h, dilation_w};
  for (const auto& corner : {cutlass::conv::collective::detail::compute_lower_corner_whd(shape),
                             cutlass::conv::collective::detail::compute_upper_corner_whd(shape)})
    std::printf(" %d %d", corner[0], corner[1]);
}

int main() {
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16.a", "bfloat16.b", "bfloat16.d");
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("half.a", "half.b", "half.d");
  print("ldmatrix_x2", cute::Copy_Traits<cute::SM75_U32x2_LDSM_N>::DstLayout{});
  print("ldmatrix_x4", cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{});

  constexpr auto kMajor = cute::GMMA::Major::K;
  using Wgmma = cute::MMA_Traits<cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<kMajor, kMajor>>;
  print("wgmma.a", Wgmma::ALayout{});
  print("wgmma.d", Wgmma::CLayout{});
  print("swizzle", cute::as_position_independent_swizzle_layout(cute::GMMA::Layout_K_SW128_Atom<cute::bfloat16_t>{}));
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = (0x2c00 + 32) >> 4;
  descriptor.bitfield.stride_byte_offset_ = 2048 >> 4;
  descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  std::printf("descriptor %llu\n", static_cast<unsigned long long>(descriptor.desc_));

  std::printf("corners");
  print_corners(3, 3, 1, 1, 1, 1);
  print_corners(7, 5, 3, 2, 1, 1);
  print_corners(3, 1, 4, 0, 4, 1);
  std::printf("\n");
}
