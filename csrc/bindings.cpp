// The native library's ops, schemas only. Each is implemented in csrc/ops/<name>.cpp.
//
// The namespace is not `resnet_fast`: that one belongs to the public ops, which Python registers with their fake,
// autograd and autocast rules. What is registered here is what backends call.

#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(resnet_fast_native, m) {
  m.def("build_info() -> str");
}

// Importing resnet_fast._C registers the ops; the module object itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
