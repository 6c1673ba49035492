// Prints what CuTe's traits say of the instructions that the vocabulary has: one line each, name and then the indices
// of all lanes' values. An mma operand's index is row + rows * column (of a: row, k; of b: column of the product, k);
// ldmatrix's is a bit of the 32 rows of 128 bits that the lanes name. Compiled for the host by test_layouts.py.

#include <cstdio>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

template <typename Layout>
void print(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int lane = 0; lane < 32; ++lane)
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

int main() {
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16.a", "bfloat16.b", "bfloat16.d");
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("half.a", "half.b", "half.d");
  print("ldmatrix_x2", cute::Copy_Traits<cute::SM75_U32x2_LDSM_N>::DstLayout{});
  print("ldmatrix_x4", cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{});
}
