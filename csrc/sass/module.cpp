// The Python module of the walker: walk(code, launch) -> what each warp of some blocks executes.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "warp.h"

namespace py = pybind11;

namespace {

using namespace sass;

Kind kind_of(const std::string& name) {
  static const std::map<std::string, Kind> kKinds = {{"R", Kind::kR},
                                                     {"UR", Kind::kUR},
                                                     {"P", Kind::kP},
                                                     {"UP", Kind::kUP},
                                                     {"B", Kind::kB},
                                                     {"immediate", Kind::kImmediate},
                                                     {"float", Kind::kImmediate},
                                                     {"constant", Kind::kConstant},
                                                     {"memory", Kind::kMemory}};
  const auto found = kKinds.find(name);
  return found == kKinds.end() ? Kind::kOther : found->second;
}

Operand operand_of(const py::handle& from) {
  Operand o;
  const auto kind = from.attr("kind").cast<std::string>();
  o.kind = kind_of(kind);
  o.text = from.attr("text").cast<std::string>();
  o.negated = from.attr("negated").cast<bool>();
  o.absolute = from.attr("absolute").cast<bool>();
  o.inverted = from.attr("inverted").cast<bool>();
  o.wide = from.attr("wide").cast<bool>();
  o.modifiers = from.attr("modifiers").cast<std::vector<std::string>>();
  const auto number = from.attr("number").cast<int64_t>();
  o.number = static_cast<int>(number);
  o.offset = number;
  o.bank = from.attr("bank").cast<int>();
  const auto optional = [&](const char* name) {
    const py::object value = from.attr(name);
    return value.is_none() ? -1 : value.cast<int>();
  };
  o.base = optional("base");
  o.uniform = optional("uniform");
  o.descriptor = optional("descriptor");
  if (o.kind == Kind::kImmediate) {
    o.value[0] = Vec::of(static_cast<uint32_t>(number));
    o.value[1] = Vec::of(number < 0 ? kAll : 0);
  }
  return o;
}

Instruction instruction_of(const py::handle& from, int results) {
  Instruction i;
  i.address = from.attr("address").cast<uint32_t>();
  i.opcode = from.attr("opcode").cast<std::string>();
  i.name = from.attr("name").cast<std::string>();
  i.results = results;
  auto guard = from.attr("predicate").cast<std::string>();
  i.text = (guard.empty() ? "" : "@" + guard + " ") + i.opcode + " " + from.attr("operands").cast<std::string>();
  for (size_t at = i.opcode.find('.'); at != std::string::npos;) {
    const size_t next = i.opcode.find('.', at + 1);
    i.modifiers.push_back(i.opcode.substr(at + 1, next == std::string::npos ? next : next - at - 1));
    at = next;
  }
  if (!guard.empty()) {
    i.guard_negated = guard[0] == '!';
    if (i.guard_negated) guard.erase(0, 1);
    i.uniform_guard = guard[0] == 'U';
    i.guard = guard.back() == 'T' ? kPT : guard.back() - '0';
  }
  for (const py::handle& one : from.attr("parsed")) i.operands.push_back(operand_of(one));
  for (const py::handle& one : from.attr("writes"))
    i.writes.push_back(
        {kind_of(one.attr("file").cast<std::string>()), one.attr("first").cast<int>(), one.attr("count").cast<int>()});
  i.word = from.attr("words").cast<std::pair<uint64_t, uint64_t>>().first;
  const py::object target = from.attr("last_number");
  i.number = target.is_none() ? -1 : target.cast<int64_t>();
  return i;
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict walk(const py::list& code, const std::vector<int>& results, const std::vector<int>& slow,
              std::array<int, 3> grid, std::array<int, 3> threads, int64_t shared_bytes,
              const std::map<int, std::pair<std::string, std::string>>& constants, const std::string& parameters,
              const std::vector<std::tuple<uint64_t, uint64_t, std::string, py::object>>& memory,
              const std::vector<int64_t>& blocks, bool record, int64_t limit) {
  Launch l;
  for (size_t n = 0; n < results.size(); ++n) {
    l.code.push_back(instruction_of(code[n], results[n]));
    l.code.back().slow_if_taken = slow[n] == 1;
    l.code.back().slow_if_not = slow[n] == 2;
  }
  std::copy(grid.begin(), grid.end(), l.grid);
  std::copy(threads.begin(), threads.end(), l.threads);
  l.shared_bytes = shared_bytes;
  for (const auto& [bank, content] : constants) {
    l.constants[bank].assign(content.first.begin(), content.first.end());
    l.constants_known[bank].assign(content.second.begin(), content.second.end());
  }
  l.parameters.assign(parameters.begin(), parameters.end());
  for (const auto& [address, bytes, name, content] : memory)
    l.memory.add(address, bytes, name, !content.is_none(), content.is_none() ? "" : content.cast<std::string>());
  l.record = record;
  l.limit = limit;
  l.tick = [] {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
  bind(l);
  run(l, blocks);

  py::list paths, walked;
  for (const auto& path : l.paths) paths.append(array_of(path));
  for (const BlockRecord& block : l.blocks) {
    py::list warps;
    for (const WarpRecord& w : block.warps) warps.append(py::make_tuple(w.path, array_of(w.events)));
    walked.append(py::make_tuple(block.index, warps, array_of(block.reads), array_of(block.writes)));
  }
  py::dict out;
  out["paths"] = paths;
  out["blocks"] = walked;
  out["sectors"] = array_of(l.sectors);
  out["instructions"] = l.instructions;
  out["assumed"] = l.assumed;
  std::vector<int64_t> executed;
  for (const Instruction& i : l.code) executed.push_back(i.executed);
  out["executed"] = array_of(executed);
  return out;
}

}  // namespace

PYBIND11_MODULE(_sass, m) {
  m.doc() = "Machine code on the CPU, as far as it decides branches and addresses.";
  PYBIND11_NUMPY_DTYPE(Step, instruction, lanes);
  PYBIND11_NUMPY_DTYPE(Event, address, value, step, bytes, first, sectors, wavefronts, least);
  py::register_exception<Error>(m, "WalkError");
  m.attr("PARAMETERS") = kParameterWindow;
  m.def("walk", &walk, py::arg("code"), py::arg("results"), py::arg("slow"), py::arg("grid"), py::arg("threads"),
        py::arg("shared_bytes"), py::arg("constants"), py::arg("parameters"), py::arg("memory"), py::arg("blocks"),
        py::arg("record"), py::arg("limit"),
        "Execute the blocks and return the paths of their warps, the records of their accesses and the sectors.");
}
