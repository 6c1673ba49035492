// The schemas of the native library's ops. Each op is implemented in csrc/ops/<name>.cpp.
//
// Backends call these ops. They have a namespace of their own because `resnet_fast` belongs to the public ops, which
// Python registers with their fake, autograd and autocast rules.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "ops/submit.h"

STABLE_TORCH_LIBRARY(resnet_fast_native, m) {
  m.def("build_info() -> str");
  m.def("emulator(int kernels_address) -> ()");
  m.def("bottleneck_fwd_shared(int ci, int cmid, int co, bool projection) -> int");
  m.def(
      "bottleneck_fwd(Tensor x, Tensor weights, Tensor bias1, Tensor bias2, Tensor bias3, bool projection) -> Tensor");
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int stride_h, int stride_w, int padding_h, "
      "int padding_w, int dilation_h, int dilation_w, bool relu) -> Tensor");
  m.def(
      "conv_bn_act_1x1(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int stride_h, int stride_w, bool relu) "
      "-> Tensor");
  m.def("stem_fwd(Tensor x, Tensor weights, Tensor bias) -> Tensor");
}

// Importing resnet_fast._C registers the ops; the module object has the functions of csrc/ops/submit.cpp.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C",
                               nullptr,
                               -1,
                               resnet_fast::ops::submission_methods(),
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
