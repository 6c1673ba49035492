// What every op does around a launch: find the kernels for its tensors, check the tensors, report failure.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <resnet_fast/kernels.h>

namespace resnet_fast::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One call of an op. CUDA tensors run on the current stream of their device, which stays the current device for the
// lifetime of this object. CPU tensors run on the emulator, if one is installed. Messages start with the op's name.
class Call {
 public:
  Call(const char* op, const Tensor& x);

  // Throws "op: expected ..., got ...; todo" unless `holds`.
  template <typename... Got>
  void expect(bool holds, const char* expected, const char* todo, const Got&... got) const {
    if (holds) return;
    std::ostringstream text;
    text << op_ << ": expected " << expected << ", got ";
    (text << ... << got);
    text << "; " << todo;
    throw std::runtime_error(text.str());
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
  // Throws if the launch failed; the message includes `problem`.
  void check(Status status, const std::string& problem) const;

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

std::string shape_text(const Tensor& t);

}  // namespace resnet_fast::ops
