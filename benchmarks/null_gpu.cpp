// A device of type "cuda" without a GPU: its memory has addresses but no bytes, and its kernels do nothing.
//
// A net on it runs all of PyTorch's Python, dispatcher and autograd, and no arithmetic. Loading this library replaces
// the CUDA kernels of the operators below, and CUDA's device guard and hooks, for the rest of the process. An operator
// that is not below would read memory that is not there, and crashes. See null_gpu.py.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

namespace {

using at::IntArrayRef;
using at::OptionalIntArrayRef;
using at::Scalar;
using at::SymInt;
using at::SymIntArrayRef;
using at::Tensor;
using std::optional;

// ------------------------------------------------------------------------------------------------------- memory

// Hands out rising addresses that nobody may read, 512 bytes apart, as CUDA's caching allocator aligns.
struct NoMemory final : c10::Allocator {
  std::atomic<uintptr_t> next{uintptr_t{1} << 44};
  c10::DataPtr allocate(size_t nbytes) override {
    void* at = reinterpret_cast<void*>(next.fetch_add((nbytes + 1023) / 512 * 512));
    return {at, at, [](void*) {}, c10::Device(c10::kCUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void*) {};
  }
  void copy_data(void*, const void*, size_t) const override {
  }
};

NoMemory memory;

constexpr c10::DispatchKeySet CUDA(c10::DispatchKey::CUDA);

Tensor empty(IntArrayRef size, optional<c10::ScalarType> dtype, optional<c10::Layout>, optional<c10::Device>,
             optional<bool>, optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, CUDA, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<c10::ScalarType> dtype, optional<c10::Layout>,
                     optional<c10::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, CUDA, c10::dtype_or_default(dtype));
}

Tensor like(const Tensor& x) {
  return at::empty_like(x);
}

Tensor like(const Tensor& x, IntArrayRef size, c10::MemoryFormat format = c10::MemoryFormat::Contiguous) {
  return at::empty(size, x.options(), format);
}

// ------------------------------------------------------------------------------------------------------ kernels

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

Tensor convolution(const Tensor& x, const Tensor& w, const optional<Tensor>&, IntArrayRef stride, IntArrayRef padding,
                   IntArrayRef dilation, bool, IntArrayRef, int64_t) {
  return like(x,
              {x.size(0), w.size(0), pooled(x.size(2), w.size(2), stride[0], padding[0], dilation[0]),
               pooled(x.size(3), w.size(3), stride[1], padding[1], dilation[1])},
              x.suggest_memory_format());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& dy, const Tensor& x, const Tensor& w,
                                                        OptionalIntArrayRef bias, IntArrayRef, IntArrayRef, IntArrayRef,
                                                        bool, IntArrayRef, int64_t, std::array<bool, 3> mask) {
  return {mask[0] ? like(x) : Tensor(), mask[1] ? like(w) : Tensor(), mask[2] ? like(dy, *bias) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cudnn_batch_norm(const Tensor& x, const Tensor& w, const optional<Tensor>&,
                                                            const optional<Tensor>&, const optional<Tensor>&, bool,
                                                            double, double) {
  return {like(x), like(w), like(w), at::empty({0}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor, Tensor> cudnn_batch_norm_backward(const Tensor& x, const Tensor&, const Tensor& w,
                                                             const optional<Tensor>&, const optional<Tensor>&,
                                                             const optional<Tensor>&, const optional<Tensor>&, double,
                                                             const Tensor&) {
  return {like(x), like(w), like(w)};
}

std::tuple<Tensor, Tensor, Tensor> native_batch_norm(const Tensor& x, const optional<Tensor>& w,
                                                     const optional<Tensor>&, const optional<Tensor>&,
                                                     const optional<Tensor>&, bool, double, double) {
  const auto stats = at::empty({x.size(1)}, x.options().dtype(at::kFloat));
  return {like(x), stats, like(stats)};
}

std::tuple<Tensor, Tensor, Tensor> native_batch_norm_backward(const Tensor&, const Tensor& x, const optional<Tensor>& w,
                                                              const optional<Tensor>&, const optional<Tensor>&,
                                                              const optional<Tensor>&, const optional<Tensor>&, bool,
                                                              double, std::array<bool, 3>) {
  return {like(x), like(*w), like(*w)};
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& x, IntArrayRef kernel, IntArrayRef stride,
                                                   IntArrayRef padding, IntArrayRef dilation, bool) {
  const auto along = [&](int d) {
    const auto at = [d](IntArrayRef v) { return v[v.size() == 1 ? 0 : d]; };
    return pooled(x.size(2 + d), at(kernel), at(stride), at(padding), at(dilation));
  };
  const auto y = like(x, {x.size(0), x.size(1), along(0), along(1)}, x.suggest_memory_format());
  return {y, at::empty_like(y, y.options().dtype(at::kLong))};
}

Tensor max_pool2d_backward(const Tensor&, const Tensor& x, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool,
                           const Tensor&) {
  return like(x);
}

Tensor mean_dims(const Tensor& x, OptionalIntArrayRef dims, bool keepdim, optional<c10::ScalarType>) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  for (int64_t d : *dims) size[d < 0 ? d + x.dim() : d] = 1;
  const auto y = like(x, size);
  return keepdim ? y : y.flatten(1).select(1, 0);
}

Tensor sum(const Tensor& x, OptionalIntArrayRef dims, bool keepdim, optional<c10::ScalarType> dtype) {
  return mean_dims(x, dims, keepdim, dtype);
}

Tensor addmm(const Tensor&, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  return like(a, {a.size(0), b.size(1)});
}

Tensor mm(const Tensor& a, const Tensor& b) {
  return like(a, {a.size(0), b.size(1)});
}

Tensor log_softmax(const Tensor& x, int64_t, bool) {
  return like(x);
}

Tensor log_softmax_backward(const Tensor& dy, const Tensor&, int64_t, c10::ScalarType) {
  return like(dy);
}

std::tuple<Tensor, Tensor> nll_loss(const Tensor& x, const Tensor&, const optional<Tensor>&, int64_t, int64_t) {
  return {like(x, {}), like(x, {})};
}

Tensor nll_loss_backward(const Tensor&, const Tensor& x, const Tensor&, const optional<Tensor>&, int64_t, int64_t,
                         const Tensor&) {
  return like(x);
}

Tensor relu(const Tensor& x) {
  return like(x);
}
Tensor& relu_(Tensor& x) {
  return x;
}
Tensor threshold_backward(const Tensor& dy, const Tensor&, const Scalar&) {
  return like(dy);
}
Tensor binary(const Tensor& a, const Tensor&, const Scalar&) {
  return like(a);
}
Tensor& binary_(Tensor& a, const Tensor&, const Scalar&) {
  return a;
}
Tensor unary(const Tensor& x) {
  return like(x);
}
Tensor scalar_binary(const Tensor& x, const Scalar&, const Scalar&) {
  return like(x);
}
Tensor by_scalar(const Tensor& x, const Scalar&) {
  return like(x);
}
Tensor cat(const at::ITensorListRef& tensors, int64_t d) {
  const auto parts = tensors.materialize();
  const Tensor& first = parts[0];
  std::vector<int64_t> size(first.sizes().begin(), first.sizes().end());
  const auto along = d < 0 ? d + first.dim() : d;
  size[along] = 0;
  for (const Tensor& t : parts) size[along] += t.size(along);
  return like(first, size);
}
Tensor plain_binary(const Tensor& a, const Tensor&) {
  return like(a);
}
Tensor& plain_binary_(Tensor& a, const Tensor&) {
  return a;
}
Tensor& copy_(Tensor& to, const Tensor&, bool) {
  return to;
}
Tensor copy_from(const Tensor&, const Tensor& to, bool) {
  return to;
}
Tensor& fill_(Tensor& x, const Scalar&) {
  return x;
}
Tensor& zero_(Tensor& x) {
  return x;
}
void foreach_add_(at::TensorList, const Scalar&) {
}
void foreach_copy_(at::TensorList, at::TensorList, bool) {
}

Tensor& normal_(Tensor& x, double, double, optional<at::Generator>) {
  return x;
}

Tensor view(const Tensor& x, IntArrayRef size) {
  return at::native::view(x, size);
}

Tensor as_strided(const Tensor& x, IntArrayRef size, IntArrayRef stride, optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(x, size, stride, offset);
}

Tensor reshape_alias(const Tensor& x, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(x, size, stride);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
  m.impl("cudnn_batch_norm", cudnn_batch_norm);
  m.impl("cudnn_batch_norm_backward", cudnn_batch_norm_backward);
  m.impl("native_batch_norm", native_batch_norm);
  m.impl("native_batch_norm_backward", native_batch_norm_backward);
  m.impl("max_pool2d_with_indices", max_pool2d_with_indices);
  m.impl("max_pool2d_with_indices_backward", max_pool2d_backward);
  m.impl("mean.dim", mean_dims);
  m.impl("sum.dim_IntList", sum);
  m.impl("addmm", addmm);
  m.impl("mm", mm);
  m.impl("_log_softmax", log_softmax);
  m.impl("_log_softmax_backward_data", log_softmax_backward);
  m.impl("nll_loss_forward", nll_loss);
  m.impl("nll_loss_backward", nll_loss_backward);
  m.impl("relu", relu);
  m.impl("relu_", relu_);
  m.impl("threshold_backward", threshold_backward);
  m.impl("add.Tensor", binary);
  m.impl("add_.Tensor", binary_);
  m.impl("sub.Tensor", binary);
  m.impl("mul.Tensor", plain_binary);
  m.impl("mul_.Tensor", plain_binary_);
  m.impl("div.Tensor", plain_binary);
  m.impl("div_.Tensor", plain_binary_);
  m.impl("add.Scalar", scalar_binary);
  m.impl("rsub.Scalar", scalar_binary);
  m.impl("mul.Scalar", by_scalar);
  m.impl("div.Scalar", by_scalar);
  m.impl("neg", unary);
  m.impl("sqrt", unary);
  m.impl("rsqrt", unary);
  m.impl("reciprocal", unary);
  m.impl("cat", cat);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("fill_.Scalar", fill_);
  m.impl("zero_", zero_);
  m.impl("_foreach_add_.Scalar", foreach_add_);
  m.impl("_foreach_copy_", foreach_copy_);
  m.impl("normal_", normal_);
}

// One device, one stream, and events that have always happened.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::Device getDevice() const override {
    return device();
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return device();
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return stream();
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return stream();
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return stream();
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
  }
  void block(void*, const c10::Stream&) const override {
  }
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {
  }

 private:
  static c10::Device device() {
    return c10::Device(c10::kCUDA, 0);
  }
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, device());
  }
};

// Autograd asks these whether a device has a context.
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {
  }
  bool hasCUDA() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  void init() const override {
  }
};

// PyTorch makes its own hooks at import and has no function to exchange them, so their table of methods is exchanged.
const bool hooked = [] {
  static Hooks hooks{at::CUDAHooksArgs{}};
  auto& installed = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(&installed), static_cast<void*>(&hooks), sizeof(void*));
  return true;
}();

const c10::impl::DeviceGuardImplRegistrar guard(c10::kCUDA, new Guard());

// ----------------------------------------------------------------------------------------------------- launches

constexpr uintptr_t kFunctions = 1 << 16;
std::atomic<int64_t> launches[kFunctions];

}  // namespace

// Stands for cuLaunchKernelEx: counts a launch of the function with this handle, which null_gpu.py hands out.
extern "C" int null_gpu_launch(const void*, void* function, void**, void**) {
  launches[reinterpret_cast<uintptr_t>(function) % kFunctions]++;
  return 0;
}

// Returns the launches of the function with this handle since the last call, and counts from zero again.
extern "C" int64_t null_gpu_take_launches(void* function) {
  return launches[reinterpret_cast<uintptr_t>(function) % kFunctions].exchange(0);
}
