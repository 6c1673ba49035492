// Python functions that submit planned launches of Triton's kernels to the CUDA driver; see submit.cpp.
#pragma once

#include <Python.h>

namespace resnet_fast::ops {

// The functions `program`, `submit`, `sink`, `sunk` and `stand_in`, ended by an empty entry.
PyMethodDef* submission_methods();

}  // namespace resnet_fast::ops
