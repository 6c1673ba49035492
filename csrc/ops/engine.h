// What every op does before and after a launch: find the kernels for its tensors, check them, report failure.
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

// One call of an op. CUDA tensors run on the current stream of their device, which is current as long as this lives;
// CPU tensors on the emulator, if one is installed. Messages begin with the op's name.
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

  // (N, C, H, W), dense NHWC, 16-byte aligned, on the device of x; `what` names the tensor in messages.
  void expect_nhwc(const Tensor& t, const char* what) const;
  // Contiguous, 16-byte aligned, of this dtype and these sizes, on the device of x.
  void expect_dense(const Tensor& t, const char* what, ScalarType dtype, std::initializer_list<int64_t> sizes) const;
  // Half or bfloat16, and which.
  bool is_bfloat16(const Tensor& t) const;

  const Kernels& kernels() const {
    return *kernels_;
  }
  const Device& device() const {
    return device_;
  }
  // Throws with the problem if the launch failed.
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

// The table for questions that no tensor is needed for: the emulator's if there is one, else the library's own.
const Kernels& any_kernels(const char* op);

// An uninitialised (n, c, h, w) like x, dense NHWC.
Tensor empty_nhwc(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w);

std::string shape_text(const Tensor& t);

}  // namespace resnet_fast::ops
