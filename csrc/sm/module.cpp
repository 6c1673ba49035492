// The Python module of the cycle model's multiprocessor.
//
//   run(...)        one SM with its blocks of a launch
//   Footprint()     which sectors a launch touches
//   actions, pipes, reasons, constants    the names that resnet_fast/simulation uses

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
T* column(py::array_t<T>& array) {
  return array.mutable_data();
}

py::dict run(const sm::Constants& constants, double clock, const Array<sm::Row>& code,
             const std::vector<Array<sm::Step>>& paths, const py::list& blocks, const Array<uint64_t>& sectors,
             const sm::Footprint& footprint, double shared_in_use, double launch_bytes, int resident, double active,
             double active_last, double first_block, double between_blocks, int watched) {
  for (const std::string& name : sm::Machine::names()) {
    if (!constants.count(name)) throw py::value_error("expected the constant " + name + ", it is missing");
  }
  if (constants.size() != sm::Machine::names().size()) {
    for (const auto& [name, value] : constants) {
      bool known = false;
      for (const std::string& other : sm::Machine::names()) known |= other == name;
      if (!known) throw py::value_error("expected only constants that the machine knows, got " + name);
    }
  }
  std::vector<sm::Row> rows(code.data(), code.data() + code.size());
  for (const auto& path : paths) {
    for (py::ssize_t i = 0; i < path.size(); ++i) {
      if (path.data()[i].instruction >= rows.size())
        throw py::value_error("expected steps within the code, got one past its end");
    }
  }
  std::vector<sm::BlockTrace> traces;
  std::vector<Array<sm::Event>> kept;
  for (py::handle item : blocks) {
    auto block = item.cast<py::tuple>();
    sm::BlockTrace trace;
    trace.round = block[0].cast<int>();
    trace.index = block[1].cast<int64_t>();
    for (py::handle one : block[2].cast<py::list>()) {
      auto warp = one.cast<py::tuple>();
      const auto& path = paths.at(warp[0].cast<size_t>());
      kept.push_back(warp[1].cast<Array<sm::Event>>());
      sm::WarpTrace w;
      w.steps = path.data();
      w.count = static_cast<size_t>(path.size());
      w.events = kept.back().data();
      w.event_count = static_cast<size_t>(kept.back().size());
      trace.warps.push_back(w);
    }
    traces.push_back(std::move(trace));
  }
  sm::LaunchShape shape;
  shape.resident = resident;
  shape.active = active;
  shape.active_last = active_last;
  shape.first_block = first_block;
  shape.between_blocks = between_blocks;
  shape.watched = watched;
  sm::Result r;
  {
    py::gil_scoped_release release;
    sm::Machine machine(constants, clock, rows, footprint, sectors.data(), static_cast<size_t>(sectors.size()),
                        shared_in_use, launch_bytes);
    r = machine.run(traces, shape);
  }
  py::dict out, waits, pipes;
  out["cycles"] = r.cycles;
  out["drained"] = r.drained;
  out["starts"] = r.starts;
  out["ends"] = r.ends;
  out["issued"] = r.issued;
  for (int i = 0; i < sm::kReasons; ++i) waits[sm::name(static_cast<sm::Reason>(i))] = r.waits[i];
  for (int i = 0; i < sm::kPipes; ++i) pipes[sm::name(static_cast<sm::Pipe>(i))] = r.pipes[i];
  out["waits"] = waits;
  out["pipes"] = pipes;
  py::array_t<int64_t> by({static_cast<py::ssize_t>(r.by_instruction.size()), static_cast<py::ssize_t>(sm::kReasons)});
  for (size_t i = 0; i < r.by_instruction.size(); ++i) {
    for (int j = 0; j < sm::kReasons; ++j) by.mutable_at(i, j) = r.by_instruction[i][j];
  }
  out["by_instruction"] = by;
  out["executed"] = py::array_t<int64_t>(static_cast<py::ssize_t>(r.executed.size()), r.executed.data());
  out["tensor"] = r.tensor;
  out["shared"] = r.shared;
  out["port"] = r.port;
  out["outward"] = r.outward;
  out["dram"] = r.dram;
  out["dram_read"] = r.dram_read;
  out["dram_write"] = r.dram_write;
  out["l2_read"] = r.l2_read;
  out["l2_write"] = r.l2_write;
  out["l1_hit"] = r.l1_hit;
  out["timeline"] = py::array_t<sm::Segment>(static_cast<py::ssize_t>(r.timeline.size()), r.timeline.data());
  return out;
}

template <class E>
py::dict numbers() {
  py::dict out;
  for (int i = 0; i < static_cast<int>(E::kCount); ++i) out[sm::name(static_cast<E>(i))] = i;
  return out;
}

}  // namespace

PYBIND11_MODULE(_sm, m) {
  PYBIND11_NUMPY_DTYPE(sm::Row, action, pipe, stall, yields, write, read, wait, commits, bypass, even, odd, registers,
                       immediate, scoreboard, interval, latency, release, tensor, operands);
  PYBIND11_NUMPY_DTYPE(sm::Step, instruction, lanes);
  PYBIND11_NUMPY_DTYPE(sm::Event, address, value, step, bytes, first, sectors, wavefronts, least);
  PYBIND11_NUMPY_DTYPE(sm::Segment, start, end, warp, instruction, reason, unused);
  m.doc() = "One multiprocessor of the cycle model (resnet_fast/simulation).";
  m.attr("ROW") = py::dtype::of<sm::Row>();
  m.attr("STEP") = py::dtype::of<sm::Step>();
  m.attr("EVENT") = py::dtype::of<sm::Event>();
  m.attr("actions") = numbers<sm::Action>();
  m.attr("pipes") = numbers<sm::Pipe>();
  m.attr("reasons") = numbers<sm::Reason>();
  m.attr("constants") = sm::Machine::names();
  py::class_<sm::Footprint>(m, "Footprint")
      .def(py::init<>())
      .def(
          "add",
          [](sm::Footprint& f, int round, int64_t block, const Array<uint64_t>& sectors) {
            f.add(round, block, sectors.data(), static_cast<size_t>(sectors.size()));
          },
          py::arg("round"), py::arg("block"), py::arg("sectors"))
      .def("add_resident", &sm::Footprint::add_resident, py::arg("first"), py::arg("last"))
      .def_property_readonly("sectors", &sm::Footprint::sectors)
      .def_property_readonly("rounds", &sm::Footprint::rounds);
  m.def("run", &run, py::kw_only(), py::arg("constants"), py::arg("clock"), py::arg("code"), py::arg("paths"),
        py::arg("blocks"), py::arg("sectors"), py::arg("footprint"), py::arg("shared_in_use"), py::arg("launch_bytes"),
        py::arg("resident"), py::arg("active"), py::arg("active_last"), py::arg("first_block"),
        py::arg("between_blocks"), py::arg("watched"));
}
