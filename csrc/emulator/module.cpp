// The Python module of the emulator: its table of kernels, settings, counters, and layouts.
//
//   kernels_address()   address of the table that csrc/ops calls; resnet_fast/native.py passes it to csrc/ops
//   configure(...)      sets the emulated device, and the seed of the order of threads
//   divert(function)    has a Python function execute launches in the emulator's place, None: the emulator again
//   take_counters()     returns the counts of the launches since the last call, one dictionary each
//   fragments(), probe_ldmatrix()   layouts, which tests compare with CuTe's; for Hopper's see hopper_bindings.cpp

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <emulator/runtime.h>
#include <resnet_fast/device.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/kernels.h>

// The build may name the module, so that several builds (sanitized, broken on purpose) can live in one process.
#ifndef EMULATOR_MODULE
#define EMULATOR_MODULE _emulator
#endif

namespace py = pybind11;

// hopper_bindings.cpp
void bind_hopper(py::module_& m);

namespace resnet_fast {

Status current_device(Device* device) {
  *device = emulator::settings().device;
  return nullptr;
}

}  // namespace resnet_fast

namespace {

const char* name_of(emulator::Kind kind) {
  switch (kind) {
    case emulator::Kind::kGlobalRead:
      return "global read";
    case emulator::Kind::kGlobalCopy:
      return "global copy";
    case emulator::Kind::kGlobalWrite:
      return "global write";
    case emulator::Kind::kSharedRead:
      return "shared read";
    case emulator::Kind::kSharedWrite:
      return "shared write";
    case emulator::Kind::kLdmatrix:
      return "ldmatrix";
    case emulator::Kind::kBulkRead:
      return "global bulk read";
    case emulator::Kind::kWgmma:
      return "wgmma";
  }
  return "?";
}

py::dict to_dict(const emulator::Counters& c) {
  py::dict buffers, out;
  for (const auto& [name, b] : c.buffers) {
    py::dict one;
    one["size"] = b.size;
    one["bytes_read"] = b.bytes_read;
    one["sectors_read"] = b.sectors_read;
    one["unique_sectors_read"] = b.unique_sectors_read;
    one["l2_sectors_read"] = b.l2_sectors_read;
    one["bytes_written"] = b.bytes_written;
    one["sectors_written"] = b.sectors_written;
    one["unique_sectors_written"] = b.unique_sectors_written;
    buffers[py::str(name)] = one;
  }
  py::list sites;
  for (const auto& [key, s] : c.sites) {
    py::dict one;
    one["where"] = key.first;
    one["kind"] = name_of(key.second);
    one["instructions"] = s.instructions;
    one["units"] = s.units;
    one["least"] = s.least;
    one["narrowest"] = s.narrowest;
    sites.append(one);
  }
  out["kernel"] = c.kernel;
  out["blocks"] = c.grid.blocks;
  out["threads"] = c.grid.threads;
  out["shared"] = c.grid.shared;
  out["buffers"] = buffers;
  out["sites"] = sites;
  out["mma"] = c.mma;
  out["wgmma"] = c.wgmma;
  out["wgmma_multiply_adds"] = c.wgmma_multiply_adds;
  out["bulk_copies"] = c.bulk_copies;
  out["bulk_bytes"] = c.bulk_bytes;
  out["barriers"] = c.barriers;
  return out;
}

void configure(uint64_t seed, int arch, int sms, int shared) {
  emulator::settings() = {{arch, sms, shared, 0, nullptr}, seed, emulator::settings().executor};
}

// What executes launches in the emulator's place. Never destroyed: Python may have ended before.
py::object& executor() {
  static py::object& kept = *new py::object(py::none());
  return kept;
}

resnet_fast::Status call_executor(const emulator::Diverted& launch) {
  static thread_local std::string report;
  const py::gil_scoped_acquire held;
  py::list tensors;
  for (int i = 0; i < launch.count; ++i) {
    const emulator::Tensor& t = launch.tensors[i];
    tensors.append(
        py::make_tuple(t.name, reinterpret_cast<uintptr_t>(t.start), t.bytes, t.access == resnet_fast::Access::kWrite));
  }
  try {
    const py::object found =
        executor()(launch.kernel, py::make_tuple(launch.blocks, launch.threads, launch.shared),
                   py::bytes(static_cast<const char*>(launch.params), launch.params_bytes), tensors);
    if (found.is_none()) return nullptr;
    report = py::cast<std::string>(found);
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}

void divert(const py::object& function) {
  executor() = function;
  emulator::settings().executor = function.is_none() ? nullptr : call_executor;
}

// Coordinates by lane and register: (row, column) for the accumulator, (row or column, k) for operands.
py::dict fragments() {
  using namespace resnet_fast;
  using Coordinates = std::vector<std::vector<std::pair<int, int>>>;
  Coordinates a(kWarp), b(kWarp), d(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int word = 0; word < 4; ++word)
      for (int i = 0; i < 2; ++i) a[lane].emplace_back(a_row(lane, word), a_k(lane, word) + i);
    for (int word = 0; word < 2; ++word)
      for (int i = 0; i < 2; ++i) b[lane].emplace_back(b_column(lane), b_k(lane, word) + i);
    for (int i = 0; i < 4; ++i) d[lane].emplace_back(d_row(lane, i), d_column(lane, i));
  }
  py::dict out;
  out["a"] = a;
  out["b"] = b;
  out["d"] = d;
  return out;
}

// What each lane gets from ldmatrix if lane l passes the address of word 4 l, and word i of shared memory is i.
struct Probe {
  uint32_t* out;
  int matrices;

  template <typename F>
  void tensors(F f) const {
    f("out", out, static_cast<size_t>(resnet_fast::kWarp) * matrices * 4, resnet_fast::Access::kWrite);
  }
};

void probe_kernel(const Probe p) {
  using namespace resnet_fast;
  const int lane = lane_index();
  Vec16 row;
  for (int i = 0; i < 4; ++i) row.word[i] = 4 * lane + i;
  store_shared(lane * 16, row);
  sync_warp();
  uint32_t two[2] = {}, four[4] = {};
  if (p.matrices == 2) ldmatrix_x2(two, lane * 16);
  if (p.matrices == 4) ldmatrix_x4(four, lane * 16);
  for (int i = 0; i < p.matrices; ++i) store_global(p.out + lane * p.matrices + i, p.matrices == 2 ? two[i] : four[i]);
}

std::vector<std::vector<uint32_t>> probe_ldmatrix(int matrices) {
  std::vector<uint32_t> out(resnet_fast::kWarp * matrices);
  const resnet_fast::Status failed =
      emulator::launch<probe_kernel>({1, resnet_fast::kWarp, resnet_fast::kWarp * 16}, Probe{out.data(), matrices});
  if (failed) throw std::runtime_error(failed);
  std::vector<std::vector<uint32_t>> lanes;
  for (int lane = 0; lane < resnet_fast::kWarp; ++lane)
    lanes.emplace_back(out.begin() + lane * matrices, out.begin() + (lane + 1) * matrices);
  return lanes;
}

}  // namespace

PYBIND11_MODULE(EMULATOR_MODULE, m) {
  m.doc() = "The CUDA kernels on the CPU: every access checked and counted.";
  m.def(
      "kernels_address", [] { return reinterpret_cast<uintptr_t>(&resnet_fast::kernels()); },
      "Address of the table of kernels.");
  m.def("configure", &configure, py::arg("seed") = 0, py::arg("arch") = 90, py::arg("sms") = 132,
        py::arg("shared") = 227 * 1024, "Set the emulated device and the seed of the order of threads and blocks.");
  m.def("divert", &divert, py::arg("function"),
        "Have function(kernel, (blocks, threads, shared), parameters, [(tensor, address, bytes, written)]) execute "
        "launches, which returns None or a report; None: the emulator.");
  m.def(
      "take_counters",
      [] {
        py::list all;
        for (const auto& c : emulator::take_counters()) all.append(to_dict(c));
        return all;
      },
      "Return the counts of the launches since the last call.");
  m.def("probe_ldmatrix", &probe_ldmatrix, py::arg("matrices"), "The words that each lane gets from ldmatrix.");
  bind_hopper(m);
  m.def("fragments", &fragments, "Layouts of the tensor-core fragments: coordinates by lane.");
}
