// Read a program from Python's tuples; see program.h.

#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace resnet_fast::ops {

namespace {

// Copies a tuple of numbers, last first.
template <typename Number>
int reversed(PyObject* tuple, Number* out) {
  const Py_ssize_t count = PyTuple_Size(tuple);
  if (count < 0) throw PythonError();
  if (count > kMaxRank) throw std::runtime_error("expected a tensor map of at most 5 dimensions, got more");
  for (Py_ssize_t i = 0; i < count; ++i) out[count - 1 - i] = static_cast<Number>(word_of(item(tuple, i)));
  return static_cast<int>(count);
}

Map map_of(PyObject* given) {
  Map map;
  map.type = static_cast<int>(word_of(item(given, 2)));
  map.swizzle = static_cast<int>(word_of(item(given, 3)));
  map.rank = reversed(item(given, 4), map.shape);
  if (reversed(item(given, 5), map.strides) != map.rank - 1 || reversed(item(given, 6), map.box) != map.rank) {
    throw std::runtime_error("expected a stride for all dimensions but the last and a box for each, got others");
  }
  map.fill = static_cast<int>(word_of(item(given, 7)));
  map.item_bytes = word_of(item(given, 8));
  return map;
}

void append(Launch& launch, PyObject* given) {
  Argument argument;
  const char* bytes = nullptr;
  std::size_t boundary = 8;
  if (PyBytes_Check(given)) {
    char* start = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(given, &start, &size) < 0) throw PythonError();
    bytes = start;
    argument.size = static_cast<std::size_t>(size);
  } else if (PyTuple_Size(given) == 1) {
    argument.number = static_cast<int>(word_of(item(given, 0)));
    argument.size = boundary = sizeof(float);
  } else {
    argument.buffer = static_cast<int>(word_of(item(given, 0)));
    argument.offset = word_of(item(given, 1));
    argument.size = sizeof(std::uint64_t);
    if (PyTuple_Size(given) > 2) {
      argument.map = static_cast<int>(launch.maps.size());
      launch.maps.push_back(map_of(given));
      argument.size = boundary = kMapBytes;
    }
  }
  argument.at = (launch.values.size() + boundary - 1) / boundary * boundary;
  launch.values.resize(argument.at + argument.size, 0);
  if (bytes != nullptr) std::memcpy(launch.values.data() + argument.at, bytes, argument.size);
  launch.arguments.push_back(argument);
}

Launch launch_of(PyObject* given) {
  Launch launch;
  PyObject* name = PyUnicode_AsUTF8String(item(given, 0));
  if (name == nullptr) throw PythonError();
  launch.name = PyBytes_AsString(name);
  Py_DECREF(name);
  launch.function = reinterpret_cast<void*>(static_cast<std::uintptr_t>(word_of(item(given, 1))));
  for (int i = 0; i < 3; ++i) launch.grid[i] = static_cast<unsigned>(word_of(item(item(given, 2), i)));
  launch.threads = static_cast<unsigned>(word_of(item(given, 3)));
  launch.shared = static_cast<unsigned>(word_of(item(given, 4)));
  PyObject* arguments = item(given, 5);
  for (Py_ssize_t i = 0; i < PyTuple_Size(arguments); ++i) append(launch, item(arguments, i));
  return launch;
}

}  // namespace

std::unique_ptr<Program> program_of(PyObject* launches) {
  auto program = std::make_unique<Program>();
  const Py_ssize_t count = PyTuple_Size(launches);
  if (count < 0) throw PythonError();
  for (Py_ssize_t i = 0; i < count; ++i) {
    Launch launch = launch_of(item(launches, i));
    program->most_arguments = std::max(program->most_arguments, launch.arguments.size());
    program->most_bytes = std::max(program->most_bytes, launch.values.size());
    for (const Argument& a : launch.arguments) {
      program->buffers = std::max(program->buffers, static_cast<std::size_t>(a.buffer + 1));
      program->numbers = std::max(program->numbers, static_cast<std::size_t>(a.number + 1));
    }
    program->launches.push_back(std::move(launch));
  }
  return program;
}

}  // namespace resnet_fast::ops
