// Small kernels, one for each part of Hopper's vocabulary, and its layouts: test_hopper.py compares what they give with
// NumPy and breaks them on purpose, test_layouts.py asks CuTe.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include <emulator/runtime.h>
#include <resnet_fast/hopper.h>

namespace py = pybind11;

namespace {

using namespace resnet_fast;
using Numbers = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

void raise(Status failed) {
  if (failed) throw std::runtime_error(failed);
}

constexpr int kWarpgroups = 2, kThreads = kWarpgroups * kWarpgroup;
constexpr int kRows = 64, kDepth = 64, kSteps = kDepth / 16;

// d (64 x columns) = a (64 x 64) . b (columns x 64)^T, twice over: the first warpgroup takes a from shared memory, the
// second from registers. Threads write a, the copy engine brings b.
struct Product {
  const void* a;
  const void* b;
  float* d;  // (2, 64, columns)
  TensorMap map;
  int columns;

  template <typename F>
  void tensors(F f) const {
    f("a", a, kRows * kDepth * 2, Access::kRead);
    f("b", b, static_cast<size_t>(columns) * kDepth * 2, Access::kRead);
    f("d", d, static_cast<size_t>(kWarpgroups) * kRows * columns * 4, Access::kWrite);
  }
};

template <typename T, int kColumns>
void product_kernel(const RF_GRID_CONSTANT Product p) {
  const uint32_t barrier = 0, a_at = kSwizzleBytes, b_at = a_at + kRows * kRowBytes;
  const int thread = thread_index();
  if (thread == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, kColumns * kRowBytes);
    tensor_load(b_at, p.map, 0, 0, 0, 0, barrier);
  }
  for (int i = thread; i < kRows * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    store_shared(a_at + swizzled128(row, chunk), load_global<Vec16>(static_cast<const char*>(p.a) + i * 16));
  }
  fence_async();
  sync_block();
  mbarrier_wait(barrier, 0);

  float d[kColumns / 8][4] = {};
  const int of_group = thread % kWarpgroup, lane = lane_index();
  if (thread < kWarpgroup) {
    wgmma_fence(d);
    for (int k = 0; k < kSteps; ++k) wgmma<T>(d, wgmma_operand(a_at + k * 32), wgmma_operand(b_at + k * 32), k > 0);
  } else {
    uint32_t a[kSteps][4];
    for (int k = 0; k < kSteps; ++k)
      ldmatrix_x4(a[k], a_at + swizzled128(of_group / kWarp * 16 + a_address_row(lane), k * 2 + a_address_chunk(lane)));
    wgmma_fence(d);
    for (int k = 0; k < kSteps; ++k) wgmma<T>(d, a[k], wgmma_operand(b_at + k * 32), true);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int n = 0; n < kColumns / 8; ++n)
    for (int j = 0; j < 4; ++j) {
      const int row = thread / kWarpgroup * kRows + wgmma_row(of_group, j);
      store_global(p.d + row * kColumns + wgmma_column(of_group, n, j), d[n][j]);
    }
}

template <typename T>
Status launch_product(const Product& p, const Grid& grid) {
  if (p.columns == 32) return emulator::launch<product_kernel<T, 32>>(grid, p);
  if (p.columns == 64) return emulator::launch<product_kernel<T, 64>>(grid, p);
  if (p.columns == 128) return emulator::launch<product_kernel<T, 128>>(grid, p);
  return emulator::launch<product_kernel<T, 256>>(grid, p);
}

py::array_t<float> probe_wgmma(const Numbers& a, const Numbers& b, bool bfloat16) {
  const int columns = static_cast<int>(b.shape(0));
  py::array_t<float> d({kWarpgroups, kRows, columns});
  Product p{a.data(), b.data(), d.mutable_data(), {}, columns};
  TensorBox box{b.data(),
                {kDepth, static_cast<uint64_t>(columns), 1, 1},
                {2, kRowBytes, static_cast<uint64_t>(columns) * kRowBytes, static_cast<uint64_t>(columns) * kRowBytes},
                {kDepth, static_cast<uint32_t>(columns), 1, 1},
                true};
  raise(encode(&p.map, box));
  const Grid grid{1, kThreads, kSwizzleBytes + (kRows + columns) * kRowBytes};
  raise(bfloat16 ? launch_product<Bfloat16>(p, grid) : launch_product<Half>(p, grid));
  return d;
}

// A box as it lies in shared memory; of an Im2colBox at a tap.
struct Box {
  TensorMap map;
  int corner[4], tap[2];
  size_t tensor_bytes;
  int bytes;
  void* out;

  template <typename F>
  void tensors(F f) const {
    f("x", map.box.x.start, tensor_bytes, Access::kRead);
    f("out", out, static_cast<size_t>(bytes), Access::kWrite);
  }
};

template <bool kIm2col>
void box_kernel(const RF_GRID_CONSTANT Box p) {
  const uint32_t barrier = 0, at = kSwizzleBytes;
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, p.bytes);
    const int *c = p.corner, *tap = p.tap;
    if (kIm2col) im2col_load(at, p.map, c[0], c[1], c[2], c[3], tap[0], tap[1], barrier);
    if (!kIm2col) tensor_load(at, p.map, c[0], c[1], c[2], c[3], barrier);
  }
  sync_block();
  mbarrier_wait(barrier, 0);
  for (int i = thread_index() * 16; i < p.bytes; i += kThreads * 16)
    store_global(static_cast<char*>(p.out) + i, load_shared<Vec16>(at + i));
}

// All of x (n, h, w, c); box with c first.
TensorBox box_of(const Numbers& x, std::array<uint32_t, 4> box, bool swizzle) {
  TensorBox b{x.data(), {}, {}, {}, swizzle};
  uint64_t stride = 2;
  for (int i = 0; i < TensorBox::kRank; ++i) {
    b.size[i] = static_cast<uint64_t>(x.shape(3 - i)), b.stride[i] = stride, b.box[i] = box[i];
    stride *= b.size[i];
  }
  return b;
}

template <bool kIm2col, typename AnyBox>
Numbers box_in_shared(const Numbers& x, const AnyBox& box, std::array<uint32_t, 4> sizes, std::array<int, 4> corner,
                      std::array<int, 2> tap) {
  const int numbers = static_cast<int>(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
  Numbers out(numbers);
  Box p{{}, {}, {}, static_cast<size_t>(x.nbytes()), numbers * 2, out.mutable_data()};
  std::copy(corner.begin(), corner.end(), p.corner);
  std::copy(tap.begin(), tap.end(), p.tap);
  raise(encode(&p.map, box));
  raise(emulator::launch<box_kernel<kIm2col>>({1, kThreads, kSwizzleBytes + (p.bytes + 15) / 16 * 16}, p));
  return out;
}

// corner and box with c first.
Numbers probe_tensor_load(const Numbers& x, std::array<int, 4> corner, std::array<uint32_t, 4> box, bool swizzle) {
  return box_in_shared<false>(x, box_of(x, box, swizzle), box, corner, {});
}

// Sides in the order w, h. `box`: channels and pixels.
Numbers probe_im2col_load(const Numbers& x, std::array<int, 4> first, std::array<uint32_t, 2> box,
                          std::array<int, 2> tap, std::array<int, 2> filter, std::array<uint32_t, 2> stride,
                          std::array<int, 2> padding, std::array<int, 2> dilation, bool swizzle) {
  const std::array<uint32_t, 4> sizes{box[0], box[1], 1, 1};
  Im2colBox windows{box_of(x, sizes, swizzle), {}, {}, {stride[0], stride[1]}};
  for (int i = 0; i < 2; ++i) {
    windows.lower[i] = im2col_lower(padding[i]);
    windows.upper[i] = im2col_upper(padding[i], filter[i], dilation[i]);
  }
  return box_in_shared<true>(x, windows, sizes, first, {tap[0] * dilation[0], tap[1] * dilation[1]});
}

// Words of x, doubled: one warp copies them through a ring of places, the others take them out.
struct Ring {
  static constexpr int kPlaces = 3, kPieceBytes = 512, kTakers = 4;
  const uint32_t* x;
  uint32_t* y;
  int pieces;

  template <typename F>
  void tensors(F f) const {
    f("x", x, static_cast<size_t>(pieces) * kPieceBytes, Access::kRead);
    f("y", y, static_cast<size_t>(pieces) * kPieceBytes, Access::kWrite);
  }
};

void ring_kernel(const Ring p) {
  const auto full = [](int place) { return static_cast<uint32_t>(place * kBarrierBytes); };
  const auto empty = [&](int place) { return full(Ring::kPlaces + place); };
  const auto data = [](int place) { return static_cast<uint32_t>(256 + place * Ring::kPieceBytes); };
  if (thread_index() == 0) {
    for (int i = 0; i < Ring::kPlaces; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), Ring::kTakers * kWarp);
    }
    mbarrier_init_fence();
  }
  sync_block();
  if (warp_index() == Ring::kTakers) {
    for (int i = 0; i < p.pieces && lane_index() == 0; ++i) {
      const int place = i % Ring::kPlaces, round = i / Ring::kPlaces;
      mbarrier_wait(empty(place), (round + 1) % 2);
      mbarrier_expect(full(place), Ring::kPieceBytes);
      bulk_load(data(place), p.x + i * Ring::kPieceBytes / 4, Ring::kPieceBytes, full(place));
    }
    return;
  }
  for (int i = 0; i < p.pieces; ++i) {
    const int place = i % Ring::kPlaces, round = i / Ring::kPlaces;
    mbarrier_wait(full(place), round % 2);
    const uint32_t word = load_shared<uint32_t>(data(place) + thread_index() * 4);
    mbarrier_arrive(empty(place));
    store_global(p.y + i * Ring::kPieceBytes / 4 + thread_index(), 2 * word);
  }
}

py::array_t<uint32_t> probe_ring(const py::array_t<uint32_t>& x) {
  const int words = Ring::kPieceBytes / 4;
  py::array_t<uint32_t> y(x.size());
  const Ring p{x.data(), y.mutable_data(), static_cast<int>(x.size()) / words};
  raise(emulator::launch<ring_kernel>({1, (Ring::kTakers + 1) * kWarp, 256 + Ring::kPlaces * Ring::kPieceBytes}, p));
  return y;
}

// By thread, the indices of its values: of d (64 x 64) and of a in registers, row + 64 * column or k; and where eight
// rows of 64 numbers lie.
py::dict layouts() {
  std::vector<std::vector<int>> d(kWarpgroup), a(kWarpgroup), rows(kSwizzleRows);
  for (int t = 0; t < kWarpgroup; ++t) {
    for (int n = 0; n < 8; ++n)
      for (int j = 0; j < 4; ++j) d[t].push_back(wgmma_row(t, j) + kRows * wgmma_column(t, n, j));
    for (int i = 0; i < 8; ++i)
      a[t].push_back(t / kWarp * 16 + a_row(t % kWarp, i / 2) + kRows * (a_k(t % kWarp, i / 2) + i % 2));
  }
  for (int row = 0; row < kSwizzleRows; ++row)
    for (int k = 0; k < kDepth; ++k) rows[row].push_back(static_cast<int>(swizzled128(row, k / 8)) / 2 + k % 8);
  py::dict out;
  out["wgmma.d"] = d;
  out["wgmma.a"] = a;
  out["swizzle"] = rows;
  return out;
}

}  // namespace

void bind_hopper(py::module_& m) {
  m.def("probe_wgmma", &probe_wgmma, py::arg("a"), py::arg("b"), py::arg("bfloat16"),
        "a (64, 64) . b (columns, 64)^T by wgmma: with a from shared memory, and from registers.");
  m.def("probe_tensor_load", &probe_tensor_load, py::arg("x"), py::arg("corner"), py::arg("box"), py::arg("swizzle"),
        "A box of x (n, h, w, c) as it lies in shared memory.");
  m.def("probe_im2col_load", &probe_im2col_load, py::arg("x"), py::arg("first"), py::arg("box"), py::arg("tap"),
        py::arg("filter"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("swizzle"),
        "One tap of a convolution's windows on x (n, h, w, c), as they lie in shared memory.");
  m.def("im2col_lower", &im2col_lower, py::arg("padding"), "An Im2colBox's lower corner.");
  m.def("im2col_upper", &im2col_upper, py::arg("padding"), py::arg("filter"), py::arg("dilation"),
        "An Im2colBox's upper corner.");
  m.def("probe_ring", &probe_ring, py::arg("x"), "2 * x, by bulk copies through a ring.");
  m.def("hopper_layouts", &layouts, "Layouts of wgmma's fragments and of the swizzle.");
  m.def(
      "wgmma_descriptor", [](uint32_t at, int stride) { return wgmma_descriptor(at, stride); }, py::arg("at"),
      py::arg("stride"), "Of an operand in shared memory.");
}
