// What every op does around a launch: find the kernels for its tensors, check the tensors, report failure.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <resnet_fast/kernels.h>

namespace resnet_fast::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Parts of a message. They refer to what they show, and are turned into text where a check has failed: an op runs in
// microseconds, of which building the texts of checks that hold would take half.
struct Shape {
  const Tensor& t;
};
struct Strides {
  const Tensor& t;
};
template <typename Sizes>
struct Listed {
  const Sizes& sizes;
};
struct Dtype {
  ScalarType type;
};
template <typename... Parts>
struct Words {
  std::tuple<const Parts&...> parts;
  explicit Words(const Parts&... all) : parts(all...) {
  }
};

std::ostream& operator<<(std::ostream& out, const Shape& shape);
std::ostream& operator<<(std::ostream& out, const Strides& strides);
std::ostream& operator<<(std::ostream& out, const Dtype& dtype);
template <typename Sizes>
std::ostream& operator<<(std::ostream& out, const Listed<Sizes>& listed) {
  out << "(";
  bool first = true;
  for (const int64_t size : listed.sizes) {
    out << (first ? "" : ", ") << size;
    first = false;
  }
  return out << ")";
}
template <typename... Parts>
std::ostream& operator<<(std::ostream& out, const Words<Parts...>& words) {
  std::apply([&](const Parts&... part) { (out << ... << part); }, words.parts);
  return out;
}

template <typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void raise(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// One call of an op. CUDA tensors run on the current stream of their device, which stays the current device for the
// lifetime of this object. CPU tensors run on the emulator, if one is installed. Messages start with the op's name.
class Call {
 public:
  Call(const char* op, const Tensor& x);

  // Throws "op: expected ..., got ...; todo" unless `holds`. The arguments are parts of a message, or print themselves.
  template <typename Expected, typename... Got>
  void expect(bool holds, const Expected& expected, const char* todo, const Got&... got) const {
    if (!holds) raise(op_, ": expected ", expected, ", got ", Words(got...), "; ", todo);
  }

  // Throws unless t is (N, C, H, W), dense NHWC, 16-byte aligned and on the device of x. `what` names t in messages.
  void expect_nhwc(const Tensor& t, const char* what) const;
  // Throws unless t is contiguous, 16-byte aligned, of this dtype and these sizes, and on the device of x.
  void expect_dense(const Tensor& t, const char* what, ScalarType dtype, std::initializer_list<int64_t> sizes) const;
  // Returns whether t is bfloat16; throws if it is neither half nor bfloat16.
  bool is_bfloat16(const Tensor& t) const;

  const Kernels& kernels() const {
    return *kernels_;
  }
  const Device& device() const {
    return device_;
  }
  // Throws if the launch failed; the message includes `problem`, which is given in parts.
  template <typename... Problem>
  void check(Status status, const Problem&... problem) const {
    if (status != nullptr) raise(op_, " failed on ", Words(problem...), ": ", status);
  }

 private:
  void expect_here(const Tensor& t, const char* what) const;

  const char* op_;
  bool cuda_;
  int32_t index_;
  const Kernels* kernels_ = nullptr;
  Device device_{};
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The table of kernels for ops without tensors: the emulator's if one is installed, else the library's own.
const Kernels& any_kernels(const char* op);

// Returns an uninitialized tensor (n, c, h, w), dense NHWC, with the dtype and device of x.
Tensor empty_nhwc(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w);

}  // namespace resnet_fast::ops
