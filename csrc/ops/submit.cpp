// Submit the launches of a planned pass in one call.
//
//   program(launches) -> program      launches: a tuple of them
//   submit(program, addresses, numbers, device, stream) -> bool
//   sink(on) -> None                  keep launches instead of submitting them, for tests and for counting
//   sunk() -> list                    those kept since the last call: (name, grid, threads, shared, arguments as bytes)
//
//   stand_in(launch, encode=0) -> None  submit to these functions, of the signatures of cuLaunchKernelEx and of
//                                     cuTensorMapEncodeTiled, and not to the driver; 0 and 0: to the driver
//
// program.h says what a launch and an argument are. `addresses` is a list with the address of each buffer, and 0 where
// there is none; `numbers` is a list of the call's numbers. Kernels were compiled for pointers divisible by 16, so
// `submit` launches nothing and returns False if an address is not.
//
// These are plain Python functions and not ops: a dispatcher call with lists costs more than all the rest here. The
// driver is found in the process by name, which needs no CUDA toolkit to build.

#include "submit.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "program.h"

#if defined(__unix__)
#include <dlfcn.h>
#endif

namespace resnet_fast::ops {
namespace {

constexpr const char* kCapsule = "resnet_fast.program";
constexpr std::uint64_t kAlignment = 16;

// ------------------------------------------------------------------------------------------------------ the driver

// CUlaunchConfig.
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned num_attributes;
};

using LaunchFunction = int (*)(const LaunchConfig*, void*, void**, void**);
using EncodeFunction = int (*)(void*, int, std::uint32_t, void*, const std::uint64_t*, const std::uint64_t*,
                               const std::uint32_t*, const std::uint32_t*, int, int, int, int);

// The driver's functions, by the signatures of cuda.h; handles are pointers, enumerations are int.
struct Driver {
  LaunchFunction launch;
  int (*error_string)(int, const char**);
  int (*version)(int*);
  int (*current)(void**);
  int (*push)(void*);
  int (*pop)(void**);
  int (*retain)(void**, int);
  EncodeFunction encode;
};

#if defined(__unix__)
template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("expected ") + name + " in libcuda.so.1, got none");
  static_assert(sizeof(found) == sizeof(function), "a function's address is a pointer");
  std::memcpy(&function, &found, sizeof(found));
}

Driver load_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("expected the CUDA driver libcuda.so.1, got none");
  Driver d{};
  find(library, "cuLaunchKernelEx", d.launch);
  find(library, "cuGetErrorString", d.error_string);
  find(library, "cuDriverGetVersion", d.version);
  find(library, "cuCtxGetCurrent", d.current);
  find(library, "cuCtxPushCurrent_v2", d.push);
  find(library, "cuCtxPopCurrent_v2", d.pop);
  find(library, "cuDevicePrimaryCtxRetain", d.retain);
  find(library, "cuTensorMapEncodeTiled", d.encode);
  return d;
}
#else
Driver load_driver() {
  throw std::runtime_error("expected Linux, got another system");
}
#endif

const Driver& driver() {
  static const Driver loaded = load_driver();
  return loaded;
}

std::atomic<LaunchFunction> stand_in{nullptr};
std::atomic<EncodeFunction> encode_stand_in{nullptr};

std::string error_text(int code) {
  const char* text = nullptr;
  if (stand_in != nullptr || driver().error_string(code, &text) != 0 || text == nullptr)
    return "CUDA error " + std::to_string(code);
  return text;
}

void check(int code, const std::string& what) {
  if (code != 0) throw std::runtime_error(what + ": " + error_text(code));
}

// The primary context of a device, which torch and Triton use. It is kept for the life of the process.
void* context_of(int device) {
  static std::mutex lock;
  static std::vector<void*> kept;
  const std::lock_guard<std::mutex> held(lock);
  if (kept.size() <= static_cast<std::size_t>(device)) kept.resize(device + 1, nullptr);
  if (kept[device] == nullptr) check(driver().retain(&kept[device], device), "entering the GPU");
  return kept[device];
}

// Makes a device's context current in this thread while it lives. A thread of autograd's may have none.
class Entered {
 public:
  explicit Entered(int device) {
    void* wanted = context_of(device);
    void* now = nullptr;
    check(driver().current(&now), "asking for the current GPU");
    if (now == wanted) return;
    check(driver().push(wanted), "entering the GPU");
    pushed_ = true;
  }
  ~Entered() {
    void* popped = nullptr;
    if (pushed_) driver().pop(&popped);
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  bool pushed_ = false;
};

// -------------------------------------------------------------------------------------------------- what a run has

// What a run of a program is given: the address of each buffer, and the numbers of the call.
struct Given {
  std::vector<std::uint64_t> addresses;
  std::vector<float> numbers;
};

// A launch as it would have been submitted; instead of a tensor map it has the address that the map is made of.
struct Sunk {
  std::string name;
  unsigned grid[3], threads, shared;
  std::vector<std::string> arguments;
};

std::mutex sink_lock;
std::atomic<bool> sink_on{false};
std::vector<Sunk> sunk_launches;

// ------------------------------------------------------------------------------------------------------ submission

// Writes the map of `address` as Triton does. Drivers up to 13.1 misread maps of less than 128 KiB with bit 21 set.
void encode(const Map& map, std::uint64_t address, unsigned char* out, const std::string& name) {
  constexpr std::uint32_t kOnes[kMaxRank] = {1, 1, 1, 1, 1};
  constexpr int kNoInterleave = 0, kPromote128Bytes = 2, kLastMisreading = 13010;
  constexpr std::uint64_t kBit = std::uint64_t{1} << 21, kSmall = 128 * 1024;
  const EncodeFunction other = encode_stand_in;
  const EncodeFunction function = other == nullptr ? driver().encode : other;
  check(function(out, map.type, map.rank, reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)), map.shape,
                 map.strides, map.box, kOnes, kNoInterleave, map.swizzle, kPromote128Bytes, map.fill),
        "describing a tensor of " + name);
  if (other != nullptr) return;
  static const int version = [] {
    int found = 0;
    check(driver().version(&found), "asking for the driver's version");
    return found;
  }();
  std::uint64_t last = (map.shape[0] - 1) * map.item_bytes;
  for (int i = 1; i < map.rank; ++i) last += (map.shape[i] - 1) * map.strides[i - 1];
  if (version > kLastMisreading || last + 1 >= kSmall) return;
  std::uint64_t word = 0;
  std::memcpy(&word, out + sizeof(word), sizeof(word));
  word &= ~kBit;
  std::memcpy(out + sizeof(word), &word, sizeof(word));
}

// The arguments of a launch with the addresses of one run.
class Block {
 public:
  explicit Block(const Program& program)
      : values_(program.most_bytes + kMapBytes),
        pointers_(program.most_arguments),
        mapless_(sink_on || (stand_in != nullptr && encode_stand_in == nullptr)) {
    const std::size_t past = reinterpret_cast<std::uintptr_t>(values_.data()) % kMapBytes;
    start_ = values_.data() + (past == 0 ? 0 : kMapBytes - past);
  }

  void fill(const Launch& launch, const Given& given) {
    if (!launch.values.empty()) std::memcpy(start_, launch.values.data(), launch.values.size());
    for (std::size_t i = 0; i < launch.arguments.size(); ++i) {
      const Argument& argument = launch.arguments[i];
      unsigned char* at = start_ + argument.at;
      pointers_[i] = at;
      if (argument.number >= 0) std::memcpy(at, &given.numbers[argument.number], sizeof(float));
      if (argument.buffer < 0) continue;
      const std::uint64_t address = given.addresses[argument.buffer] + argument.offset;
      if (argument.map < 0 || mapless_) {
        std::memcpy(at, &address, sizeof(address));
      } else {
        encode(launch.maps[argument.map], address, at, launch.name);
      }
    }
  }

  void submit(const Launch& launch, void* stream, LaunchFunction function) {
    const unsigned* grid = launch.grid;
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return;
    const LaunchConfig config{{grid[0], grid[1], grid[2]}, {launch.threads, 1, 1}, launch.shared, stream, nullptr, 0};
    const int code = function(&config, launch.function, pointers_.data(), nullptr);
    if (code != 0) throw std::runtime_error("launching " + launch.name + ": " + error_text(code));
  }

  void sink(const Launch& launch) const {
    Sunk sunk{launch.name, {launch.grid[0], launch.grid[1], launch.grid[2]}, launch.threads, launch.shared, {}};
    for (const Argument& argument : launch.arguments) {
      sunk.arguments.emplace_back(reinterpret_cast<const char*>(start_ + argument.at), argument.size);
    }
    const std::lock_guard<std::mutex> held(sink_lock);
    sunk_launches.push_back(std::move(sunk));
  }

 private:
  std::vector<unsigned char> values_;
  std::vector<void*> pointers_;
  unsigned char* start_ = nullptr;
  bool mapless_;  // nothing can make a tensor map; its address stands for it
};

void submit_all(const Program& program, const Given& given, int device, void* stream) {
  Block block(program);
  if (sink_on) {
    for (const Launch& launch : program.launches) {
      block.fill(launch, given);
      block.sink(launch);
    }
    return;
  }
  const LaunchFunction other = stand_in;
  std::optional<Entered> entered;
  if (other == nullptr) entered.emplace(device);
  const LaunchFunction function = other == nullptr ? driver().launch : other;
  for (const Launch& launch : program.launches) {
    block.fill(launch, given);
    block.submit(launch, stream, function);
  }
}

// ------------------------------------------------------------------------------------------------ Python's functions

// Runs `body`; turns its exceptions into Python's.
template <typename Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

void release(PyObject* capsule) {
  delete static_cast<Program*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* make_program(PyObject*, PyObject* launches) {
  return guarded([&]() -> PyObject* {
    std::unique_ptr<Program> program = program_of(launches);
    PyObject* capsule = PyCapsule_New(program.get(), kCapsule, &release);
    if (capsule == nullptr) throw PythonError();
    program.release();  // the capsule owns it
    return capsule;
  });
}

// Returns the length of a list of which a program reads the first `least`.
Py_ssize_t length_of(PyObject* list, std::size_t least, const char* what) {
  const Py_ssize_t count = PyList_Size(list);
  if (count < 0) throw PythonError();
  if (static_cast<std::size_t>(count) < least) {
    throw std::runtime_error("expected " + std::string(what) + " " + std::to_string(least) + ", got " +
                             std::to_string(count));
  }
  return count;
}

PyObject* submit(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    auto* program = static_cast<Program*>(PyCapsule_GetPointer(item(arguments, 0), kCapsule));
    if (program == nullptr) throw PythonError();
    PyObject* addresses = item(arguments, 1);
    PyObject* numbers = item(arguments, 2);
    const int device = static_cast<int>(word_of(item(arguments, 3)));
    void* stream = reinterpret_cast<void*>(static_cast<std::uintptr_t>(word_of(item(arguments, 4))));
    Given given;
    given.addresses.resize(length_of(addresses, program->buffers, "the address of each buffer:"));
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < given.addresses.size(); ++i) {
      bits |= given.addresses[i] = word_of(PyList_GetItem(addresses, static_cast<Py_ssize_t>(i)));
    }
    if (bits % kAlignment != 0) Py_RETURN_FALSE;
    given.numbers.resize(length_of(numbers, program->numbers, "the numbers of the call:"));
    for (std::size_t i = 0; i < given.numbers.size(); ++i) {
      const double value = PyFloat_AsDouble(PyList_GetItem(numbers, static_cast<Py_ssize_t>(i)));
      if (PyErr_Occurred()) throw PythonError();
      given.numbers[i] = static_cast<float>(value);
    }
    std::string failure;
    PyThreadState* thread = PyEval_SaveThread();
    try {
      submit_all(*program, given, device, stream);
    } catch (const std::exception& error) {
      failure = error.what();
    }
    PyEval_RestoreThread(thread);
    if (!failure.empty()) throw std::runtime_error(failure);
    Py_RETURN_TRUE;
  });
}

PyObject* set_sink(PyObject*, PyObject* on) {
  sink_on = PyObject_IsTrue(on) == 1;
  Py_RETURN_NONE;
}

PyObject* set_stand_in(PyObject*, PyObject* addresses) {
  return guarded([&]() -> PyObject* {
    const Py_ssize_t count = PyTuple_Size(addresses);
    if (count != 1 && count != 2) throw std::runtime_error("expected stand_in(launch) or stand_in(launch, encode)");
    const std::uint64_t encoder = count == 2 ? word_of(item(addresses, 1)) : 0;
    stand_in = reinterpret_cast<LaunchFunction>(static_cast<std::uintptr_t>(word_of(item(addresses, 0))));
    encode_stand_in = reinterpret_cast<EncodeFunction>(static_cast<std::uintptr_t>(encoder));
    Py_RETURN_NONE;
  });
}

PyObject* take_sunk(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    std::vector<Sunk> taken;
    {
      const std::lock_guard<std::mutex> held(sink_lock);
      taken.swap(sunk_launches);
    }
    PyObject* list = PyList_New(0);
    for (const Sunk& sunk : taken) {
      PyObject* arguments = PyList_New(0);
      for (const std::string& bytes : sunk.arguments) {
        PyObject* one = PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()));
        if (one == nullptr || PyList_Append(arguments, one) < 0) throw PythonError();
        Py_DECREF(one);
      }
      PyObject* row = Py_BuildValue("(s(III)IIN)", sunk.name.c_str(), sunk.grid[0], sunk.grid[1], sunk.grid[2],
                                    sunk.threads, sunk.shared, arguments);
      if (row == nullptr || PyList_Append(list, row) < 0) throw PythonError();
      Py_DECREF(row);
    }
    return list;
  });
}

}  // namespace

PyMethodDef* submission_methods() {
  static PyMethodDef methods[] = {
      {"program", make_program, METH_O, "program(launches) -> the launches of a pass, ready to submit"},
      {"submit", submit, METH_VARARGS,
       "submit(program, addresses, numbers, device, stream) -> bool: launch all of it; False if an address is not "
       "divisible by 16"},
      {"sink", set_sink, METH_O, "sink(on): keep launches instead of submitting them"},
      {"sunk", take_sunk, METH_NOARGS, "sunk() -> the launches kept since the last call"},
      {"stand_in", set_stand_in, METH_VARARGS,
       "stand_in(launch, encode=0): submit to these functions instead of the driver; 0: to the driver"},
      {nullptr, nullptr, 0, nullptr},
  };
  return methods;
}

}  // namespace resnet_fast::ops
