// See engine.h. The op emulator(int) installs a table of emulated kernels for CPU tensors.

#include "engine.h"

#include <atomic>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

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

template <typename Sizes>
std::string listed(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  bool first = true;
  for (const int64_t size : sizes) {
    text << (first ? "" : ", ") << size;
    first = false;
  }
  text << ")";
  return text.str();
}

bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

}  // namespace

std::string shape_text(const Tensor& t) {
  return listed(t.sizes()) + " " + name_of(t.scalar_type());
}

Call::Call(const char* op, const Tensor& x) : op_(op), cuda_(x.is_cuda()), index_(x.get_device()) {
  if (cuda_) {
#ifdef RESNET_FAST_WITH_CUDA
    guard_.emplace(index_);
    kernels_ = &resnet_fast::kernels();
    check(kernels_->device(&device_), "asking for the device's properties");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &device_.stream));
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
  if (t.is_cuda() != cuda_ || t.get_device() != index_) {
    expect(false, (std::string(what) + " on the device of x").c_str(), "move it", "one on another");
  }
}

void Call::expect_nhwc(const Tensor& t, const char* what) const {
  expect_here(t, what);
  expect(t.dim() == 4, (std::string(what) + " of shape (N, C, H, W)").c_str(), "reshape it", shape_text(t));
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t dense[4] = {h * w * c, 1, w * c, c};
  bool nhwc = true;
  for (int i = 0; i < 4; ++i) nhwc &= t.size(i) <= 1 || t.stride(i) == dense[i];
  expect(nhwc || t.numel() == 0, (std::string(what) + " dense in NHWC").c_str(),
         "call .contiguous(memory_format=torch.channels_last)", "strides ", listed(t.strides()));
  expect(is_aligned(t), (std::string(what) + " on a 16-byte boundary").c_str(), "clone it", "an unaligned address");
}

void Call::expect_dense(const Tensor& t, const char* what, ScalarType dtype,
                        std::initializer_list<int64_t> sizes) const {
  expect_here(t, what);
  bool same = t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous();
  int64_t i = 0;
  for (const int64_t size : sizes) same = same && t.size(i++) == size;
  expect(same, (std::string("contiguous ") + what + " " + listed(sizes) + " " + name_of(dtype)).c_str(),
         "pack the parameters for this problem", shape_text(t), t.is_contiguous() ? "" : " with gaps");
  expect(is_aligned(t), (std::string(what) + " on a 16-byte boundary").c_str(), "clone it", "an unaligned address");
}

bool Call::is_bfloat16(const Tensor& t) const {
  const ScalarType dtype = t.scalar_type();
  expect(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "float16 or bfloat16", "convert the model",
         name_of(dtype));
  return dtype == ScalarType::BFloat16;
}

void Call::check(Status status, const std::string& problem) const {
  if (status == nullptr) return;
  throw std::runtime_error(std::string(op_) + " failed on " + problem + ": " + status);
}

const Kernels& any_kernels(const char* op) {
  if (const Kernels* table = emulated.load()) return *table;
#ifdef RESNET_FAST_WITH_CUDA
  (void)op;
  return resnet_fast::kernels();
#else
  throw std::runtime_error(std::string(op) +
                           ": expected a library with CUDA kernels, got one built without them; build "
                           "it where nvcc is, or set RESNET_FAST_EMULATE=1");
#endif
}

Tensor empty_nhwc(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[4] = {n, c, h, w};
  return torch::stable::empty({sizes, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
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
