// See engine.h. The op emulator(int) installs a table of emulated kernels for CPU tensors.

#include "engine.h"

#include <atomic>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Raise what a call into libtorch returned as an error. The headers of newer versions pass on its text (out of memory,
// say); those of the oldest supported one name the call alone.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define RF_TORCH_CALL(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define RF_TORCH_CALL(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace resnet_fast::ops {
namespace {

std::atomic<const Kernels*> emulated{nullptr};

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  const auto sizes = shape.t.sizes();
  return out << Listed<decltype(sizes)>{sizes} << " " << Dtype{shape.t.scalar_type()};
}
std::ostream& operator<<(std::ostream& out, const Strides& strides) {
  const auto all = strides.t.strides();
  return out << Listed<decltype(all)>{all};
}
std::ostream& operator<<(std::ostream& out, const Dtype& dtype) {
  return out << name_of(dtype.type);
}

Call::Call(const char* op, const Tensor& x) : op_(op), cuda_(x.is_cuda()), index_(x.get_device()) {
  if (cuda_) {
#ifdef RESNET_FAST_WITH_CUDA
    if (torch::stable::accelerator::getCurrentDeviceIndex() != index_) guard_.emplace(index_);
    kernels_ = &resnet_fast::kernels();
    check(kernels_->device(&device_), "asking for the device's properties");
    RF_TORCH_CALL(aoti_torch_get_current_cuda_stream(index_, &device_.stream));
    expect(device_.arch >= 80, "a GPU of compute capability 8.0 or later", "use another backend", device_.arch / 10,
           ".", device_.arch % 10);
#else
    expect(false, "a library with CUDA kernels", "build it where nvcc is, with RESNET_FAST_BUILD_CUDA=1",
           "one built without them");
#endif
    return;
  }
  kernels_ = emulated.load();
  expect(x.is_cpu(), "a tensor on a GPU", "move it", "one on another kind of device");
  expect(kernels_ != nullptr, "a tensor on a GPU", "move it, or set RESNET_FAST_EMULATE=1 to run kernels on the CPU",
         "one on the CPU");
  check(kernels_->device(&device_), "asking for the emulated device");
}

void Call::expect_here(const Tensor& t, const char* what) const {
  expect(t.is_cuda() == cuda_ && t.get_device() == index_, Words(what, " on the device of x"), "move it",
         "one on another");
}

void Call::expect_nhwc(const Tensor& t, const char* what) const {
  expect_here(t, what);
  expect(t.dim() == 4, Words(what, " of shape (N, C, H, W)"), "reshape it", Shape{t});
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t dense[4] = {h * w * c, 1, w * c, c};
  bool nhwc = true;
  for (int i = 0; i < 4; ++i) nhwc &= t.size(i) <= 1 || t.stride(i) == dense[i];
  expect(nhwc || t.numel() == 0, Words(what, " dense in NHWC"), "call .contiguous(memory_format=torch.channels_last)",
         "strides ", Strides{t});
  expect(is_aligned(t), Words(what, " on a 16-byte boundary"), "clone it", "an unaligned address");
}

void Call::expect_dense(const Tensor& t, const char* what, ScalarType dtype,
                        std::initializer_list<int64_t> sizes) const {
  expect_here(t, what);
  const bool contiguous = t.is_contiguous();
  bool same = t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(sizes.size()) && contiguous;
  int64_t i = 0;
  for (const int64_t size : sizes) same = same && t.size(i++) == size;
  expect(same, Words("contiguous ", what, " ", Listed<decltype(sizes)>{sizes}, " ", Dtype{dtype}),
         "pack the parameters for this problem", Shape{t}, contiguous ? "" : " with gaps");
  expect(is_aligned(t), Words(what, " on a 16-byte boundary"), "clone it", "an unaligned address");
}

bool Call::is_bfloat16(const Tensor& t) const {
  const ScalarType dtype = t.scalar_type();
  expect(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "float16 or bfloat16", "convert the model",
         Dtype{dtype});
  return dtype == ScalarType::BFloat16;
}

const Kernels& any_kernels(const char* op) {
  if (const Kernels* table = emulated.load()) return *table;
#ifdef RESNET_FAST_WITH_CUDA
  (void)op;
  return resnet_fast::kernels();
#else
  raise(op,
        ": expected a library with CUDA kernels, got one built without them; build it where nvcc is, or set "
        "RESNET_FAST_EMULATE=1");
#endif
}

Tensor empty_nhwc(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[4] = {n, c, h, w}, strides[4] = {h * w * c, 1, w * c, c};
  int32_t dtype = 0, kind = 0;
  RF_TORCH_CALL(aoti_torch_get_dtype(x.get(), &dtype));
  RF_TORCH_CALL(aoti_torch_get_device_type(x.get(), &kind));
  AtenTensorHandle made = nullptr;  // torch::stable::empty looks the operator up by its name at every call
  RF_TORCH_CALL(aoti_torch_empty_strided(4, sizes, strides, dtype, kind, x.get_device(), &made));
  return Tensor(made);
}

namespace {

void install_emulator(int64_t address) {
  emulated.store(reinterpret_cast<const Kernels*>(static_cast<intptr_t>(address)));
}

}  // namespace
}  // namespace resnet_fast::ops

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CompositeExplicitAutograd, m) {
  m.impl("emulator", TORCH_BOX(&resnet_fast::ops::install_emulator));
}
