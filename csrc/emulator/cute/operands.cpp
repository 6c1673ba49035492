// Prints CuTe's layouts of wgmma's operands in shared memory: every swizzle, k along the rows and across them, and
// tiles of several atoms. A line each: "SWIZZLE-BYTES major bits rows depth", the descriptor of the tile at address 0,
// then the positions of its values in elements, row by row. Then the fragments of 32-bit operands, as layouts.cpp
// prints them. tests/ptx/test_layouts.py compiles this file for the host and compares.

#include <cstdio>

#include <cute/swizzle_layout.hpp>  // before its use in the headers below

#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

template <typename Layout>
void print(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int lane = 0; lane < size<0>(layout); ++lane)
    for (int value = 0; value < size<1>(layout); ++value) std::printf(" %d", static_cast<int>(layout(lane, value)));
  std::printf("\n");
}

template <typename T, GMMA::Major kMajor, int kRows, typename Atom>
void print_operand(int pitch, Atom) {
  using Depth = Int<256 / sizeof_bits<T>::value>;
  // The dimension that the rows of the pattern lie along is at least one pattern long.
  constexpr bool kAlong = kMajor == GMMA::Major::K;
  using Columns = Int<kAlong && size<1>(Atom{}) >= Depth::value ? int(size<1>(Atom{})) : Depth::value>;
  const auto tile = tile_to_shape(Atom{}, Shape<Int<kRows>, Columns>{});
  const auto layout = as_position_independent_swizzle_layout(tile);
  const auto whole = make_tensor(make_smem_ptr(static_cast<T*>(nullptr)), tile);
  const auto desc = GMMA::make_gmma_desc<kMajor>(local_tile(whole, Shape<Int<kRows>, Depth>{}, make_coord(0, 0)));
  std::printf("%d-%s-%d-%d-%d %llu", pitch, kAlong ? "k" : "mn", int(sizeof_bits<T>::value), kRows, Depth::value,
              static_cast<unsigned long long>(desc.desc_));
  for (int row = 0; row < kRows; ++row)
    for (int k = 0; k < Depth::value; ++k) std::printf(" %d", static_cast<int>(layout(row, k)));
  std::printf("\n");
}

template <typename T, int kRows>
void print_along() {
  print_operand<T, GMMA::Major::K, kRows>(16, GMMA::Layout_K_INTER_Atom<T>{});
  print_operand<T, GMMA::Major::K, kRows>(32, GMMA::Layout_K_SW32_Atom<T>{});
  print_operand<T, GMMA::Major::K, kRows>(64, GMMA::Layout_K_SW64_Atom<T>{});
  print_operand<T, GMMA::Major::K, kRows>(128, GMMA::Layout_K_SW128_Atom<T>{});
}

template <typename T, int kRows>
void print_across() {
  print_operand<T, GMMA::Major::MN, kRows>(16, GMMA::Layout_MN_INTER_Atom<T>{});
  print_operand<T, GMMA::Major::MN, kRows>(32, GMMA::Layout_MN_SW32_Atom<T>{});
  print_operand<T, GMMA::Major::MN, kRows>(64, GMMA::Layout_MN_SW64_Atom<T>{});
  print_operand<T, GMMA::Major::MN, kRows>(128, GMMA::Layout_MN_SW128_Atom<T>{});
}

int main() {
  print_along<bfloat16_t, 64>();
  print_along<tfloat32_t, 64>();
  print_across<bfloat16_t, 64>();
  print_across<bfloat16_t, 128>();

  using Narrow = MMA_Traits<SM80_16x8x8_F32BF16BF16F32_TN>;
  using Wide = MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>;
  print("mma-a-8-16", Narrow::ALayout{});
  print("mma-b-8-16", Narrow::BLayout{});
  print("mma-a-8-32", Wide::ALayout{});
  print("mma-b-8-32", Wide::BLayout{});
  print("mma-d", Wide::CLayout{});
  print("wgmma-a-32", MMA_Traits<SM90::GMMA::MMA_64x64x8_F32TF32TF32_RS_TN<>>::ALayout{});
}
