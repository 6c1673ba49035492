// build_info() -> str: how this library was built, one `key=value` per line.
//
// Every value comes from the compiler that built the code, not from the build script, so the report describes this
// binary. resnet_fast/native.py parses it, and `resnet-fast env` prints it.

#include <Python.h>

#include <cstdint>
#include <sstream>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#ifdef RESNET_FAST_WITH_CUDA
#include <resnet_fast/device_build.h>
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// TORCH_TARGET_VERSION keeps major and minor in its two highest bytes.
std::string torch_target() {
  constexpr std::uint64_t kTarget = TORCH_TARGET_VERSION;
  return std::to_string(kTarget >> 56) + "." + std::to_string((kTarget >> 48) & 0xff);
}

std::string python_api() {
  return std::to_string((Py_LIMITED_API >> 24) & 0xff) + "." + std::to_string((Py_LIMITED_API >> 16) & 0xff);
}

void write_cuda(std::ostream& out) {
#ifdef RESNET_FAST_WITH_CUDA
  const resnet_fast::DeviceBuild device = resnet_fast::device_build();
  out << "cuda_toolkit=" << device.toolkit / 1000 << '.' << device.toolkit % 1000 / 10 << "\ncuda_archs=";
  for (int i = 0; i < device.num_archs; ++i) out << (i ? " " : "") << "sm_" << device.archs[i] / 10;
  out << '\n';
#else
  out << "cuda_toolkit=none\ncuda_archs=none\n";
#endif
}

std::string build_info() {
  std::ostringstream out;
  out << "compiler=" << compiler() << "\ncxx_standard=" << __cplusplus << "\ntorch_headers=" << TORCH_VERSION
      << "\ntorch_target=" << torch_target() << "\npython_api=" << python_api() << '\n';
  write_cuda(out);
  return out.str();
}

}  // namespace

// An op without tensor arguments is not dispatched by device; such a call reaches this key.
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
