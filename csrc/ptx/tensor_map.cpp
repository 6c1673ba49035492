// Tensor maps for launches on this machine: emulator/box.h has their encoding.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include <emulator/box.h>

namespace py = pybind11;

namespace {

std::string text_of(const std::vector<uint64_t>& values) {
  std::string text;
  for (uint64_t v : values) text += (text.empty() ? "" : ", ") + std::to_string(v);
  return "(" + text + ")";
}

py::bytes encode(uint64_t address, const std::string& dtype, const std::vector<uint64_t>& shape,
                 const std::vector<uint64_t>& strides, const std::vector<uint64_t>& box, int swizzle,
                 const std::string& fill) {
  static const std::map<std::string, uint8_t> kBytes = {{"u8", 1},  {"u16", 2}, {"f16", 2}, {"bf16", 2},
                                                        {"u32", 4}, {"s32", 4}, {"f32", 4}, {"tf32", 4},
                                                        {"u64", 8}, {"s64", 8}, {"f64", 8}};
  const auto element = kBytes.find(dtype);
  if (element == kBytes.end()) throw py::value_error("expected a dtype of a tensor map, got " + dtype);
  if (fill != "zero" && fill != "nan") throw py::value_error("expected fill to be zero or nan, got " + fill);
  if (shape.empty() || shape.size() > emulator::TiledTensor::kMaxRank || strides.size() + 1 != shape.size() ||
      box.size() != shape.size())
    throw py::value_error("expected 1 to 5 sizes, one stride fewer and as many sides of the box, got " +
                          text_of(shape) + ", " + text_of(strides) + " and " + text_of(box));
  emulator::TiledTensor t;
  t.start = address;
  t.rank = static_cast<uint8_t>(shape.size());
  t.element = element->second;
  t.pitch = swizzle == 0 ? emulator::kChunkBytes : static_cast<uint8_t>(swizzle);
  t.fill = fill == "nan" ? emulator::Fill::kNaN : emulator::Fill::kZero;
  t.stride[0] = t.element;
  for (size_t d = 0; d < shape.size(); ++d) {
    t.size[d] = shape[d];
    t.box[d] = static_cast<uint32_t>(box[d]);
    if (d > 0) t.stride[d] = strides[d - 1];
  }
  if (const char* why = emulator::refused(t))
    throw py::value_error(std::string(why) + ": " + dtype + " at " + std::to_string(address) + ", sizes " +
                          text_of(shape) + ", strides " + text_of(strides) + ", box " + text_of(box) + ", swizzle " +
                          std::to_string(swizzle));
  unsigned char bytes[emulator::kTensorMapBytes];
  emulator::encode(t, bytes);
  return py::bytes(reinterpret_cast<const char*>(bytes), sizeof(bytes));
}

}  // namespace

void bind_tensor_map(py::module_& m) {
  m.def("tensor_map", &encode, py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
        py::arg("box"), py::arg("swizzle") = 0, py::arg("fill") = "zero",
        "A tensor map as 128 bytes, for a kernel's parameter: sizes, strides in bytes (one fewer) and the box's sides, "
        "innermost first.");
}
