// Python bindings of the probes in hopper_probes.h, and of Hopper's layouts, for test_hopper.py and test_layouts.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "hopper_probes.h"

namespace py = pybind11;

namespace {

using namespace resnet_fast;
using Numbers = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

void raise(Status failed) {
  if (failed) throw std::runtime_error(failed);
}

py::array_t<float> probe_wgmma(const Numbers& a, const Numbers& b, bool bfloat16) {
  const int columns = static_cast<int>(b.shape(0));
  py::array_t<float> d({kProductGroups, kProductRows, columns});
  raise(run_product(a.data(), b.data(), d.mutable_data(), columns, bfloat16));
  return d;
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

// corner and box with c first.
Numbers probe_tensor_load(const Numbers& x, std::array<int, 4> corner, std::array<uint32_t, 4> box, bool swizzle) {
  Numbers out(box[0] * box[1] * box[2] * box[3]);
  raise(run_box(box_of(x, box, swizzle), static_cast<size_t>(x.nbytes()), corner, out.mutable_data()));
  return out;
}

// Sides in the order w, h. `box`: channels and pixels.
Numbers probe_im2col_load(const Numbers& x, std::array<int, 4> first, std::array<uint32_t, 2> box,
                          std::array<int, 2> tap, std::array<int, 2> filter, std::array<uint32_t, 2> stride,
                          std::array<int, 2> padding, std::array<int, 2> dilation, bool swizzle) {
  Im2colBox windows{box_of(x, {box[0], box[1], 1, 1}, swizzle), {}, {}, {stride[0], stride[1]}};
  for (int i = 0; i < 2; ++i) {
    windows.lower[i] = im2col_lower(padding[i]);
    windows.upper[i] = im2col_upper(padding[i], filter[i], dilation[i]);
  }
  Numbers out(box[0] * box[1]);
  const std::array<int, 2> offset{tap[0] * dilation[0], tap[1] * dilation[1]};
  raise(run_im2col(windows, static_cast<size_t>(x.nbytes()), first, offset, out.mutable_data()));
  return out;
}

py::array_t<uint32_t> probe_ring(const py::array_t<uint32_t>& x) {
  py::array_t<uint32_t> y(x.size());
  raise(run_ring(x.data(), y.mutable_data(), static_cast<int>(x.nbytes()) / kRingPieceBytes));
  return y;
}

// The indices of each thread's values: row + 64 * column of d (64 x 64), row + 64 * k of a in registers; and the
// positions of the values of eight swizzled rows of 64.
py::dict layouts() {
  std::vector<std::vector<int>> d(kWarpgroup), a(kWarpgroup), rows(kSwizzleRows);
  for (int t = 0; t < kWarpgroup; ++t) {
    for (int n = 0; n < 8; ++n)
      for (int j = 0; j < 4; ++j) d[t].push_back(wgmma_row(t, j) + kProductRows * wgmma_column(t, n, j));
    for (int i = 0; i < 8; ++i)
      a[t].push_back(t / kWarp * 16 + a_row(t % kWarp, i / 2) + kProductRows * (a_k(t % kWarp, i / 2) + i % 2));
  }
  for (int row = 0; row < kSwizzleRows; ++row)
    for (int k = 0; k < kProductDepth; ++k) rows[row].push_back(static_cast<int>(swizzled128(row, k / 8)) / 2 + k % 8);
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
        "A box of x (n, h, w, c) in the layout of shared memory.");
  m.def("probe_im2col_load", &probe_im2col_load, py::arg("x"), py::arg("first"), py::arg("box"), py::arg("tap"),
        py::arg("filter"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("swizzle"),
        "One tap of a convolution's windows on x (n, h, w, c), in the layout of shared memory.");
  m.def("im2col_lower", &im2col_lower, py::arg("padding"), "An Im2colBox's lower corner.");
  m.def("im2col_upper", &im2col_upper, py::arg("padding"), py::arg("filter"), py::arg("dilation"),
        "An Im2colBox's upper corner.");
  m.def("probe_ring", &probe_ring, py::arg("x"), "2 * x, by bulk copies through a ring.");
  m.def("hopper_layouts", &layouts, "Layouts of wgmma's fragments and of the swizzle.");
  m.def(
      "wgmma_descriptor", [](uint32_t at, int stride) { return wgmma_descriptor(at, stride); }, py::arg("at"),
      py::arg("stride"), "The descriptor of an operand in shared memory.");
}
