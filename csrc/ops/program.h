// A program: the launches of a planned pass, as submit.cpp submits them, and how they are read from Python's tuples.
//
// A launch is a tuple (name, function, (gx, gy, gz), threads, shared, arguments).
// An argument is `bytes` (a value as the kernel reads it), (place,) for an fp32 number of the call, (buffer, offset)
// for a pointer, or (buffer, offset, type, swizzle, shape, strides in bytes, box, fill, bytes of an element) for a
// tensor map.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace resnet_fast::ops {

constexpr std::size_t kMapBytes = 128;  // sizeof(CUtensorMap)
constexpr int kMaxRank = 5;

// Python's exception is set; unwinds to the function that Python called.
struct PythonError {};

// A tensor map without its address: arguments of cuTensorMapEncodeTiled, innermost dimension first.
struct Map {
  int type = 0, swizzle = 0, fill = 0, rank = 0;
  std::uint64_t item_bytes = 0;
  std::uint64_t shape[kMaxRank] = {}, strides[kMaxRank] = {};
  std::uint32_t box[kMaxRank] = {};
};

// An argument's `size` bytes at `at` in a launch's block of arguments. With a buffer it is a pointer, or a map of one;
// with a number it is the call's number of that place.
struct Argument {
  std::size_t at = 0, size = 0;
  int buffer = -1, map = -1, number = -1;
  std::uint64_t offset = 0;
};

struct Launch {
  std::string name;
  void* function = nullptr;
  unsigned grid[3] = {1, 1, 1}, threads = 0, shared = 0;
  std::vector<Argument> arguments;
  std::vector<Map> maps;
  std::vector<unsigned char> values;  // the block of arguments, with zeros where addresses and numbers go
};

struct Program {
  std::vector<Launch> launches;
  std::size_t most_arguments = 0, most_bytes = 0, buffers = 0, numbers = 0;
};

// Returns the value of a Python number.
inline std::uint64_t word_of(PyObject* number) {
  const std::uint64_t value = PyLong_AsUnsignedLongLong(number);
  if (PyErr_Occurred()) throw PythonError();
  return value;
}

// Returns an entry of a Python tuple, borrowed.
inline PyObject* item(PyObject* tuple, Py_ssize_t i) {
  PyObject* found = PyTuple_GetItem(tuple, i);
  if (found == nullptr) throw PythonError();
  return found;
}

// Reads a tuple of launches; throws std::runtime_error for a tensor map whose dimensions disagree or are too many.
std::unique_ptr<Program> program_of(PyObject* launches);

}  // namespace resnet_fast::ops
