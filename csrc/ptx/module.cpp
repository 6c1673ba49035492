// The Python module of the PTX machine.
//
//   Module(text, name)     PTX, parsed; .kernels, .opcodes(), .launch(...)
//   Memory()               the allocations that launches may use
//   PtxError, Fault        what is not PTX that this machine understands; what a kernel does wrong

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "families.h"
#include "machine.h"

namespace py = pybind11;

namespace {

const char* name_of(ptx::Type type) {
  switch (type) {
    case ptx::Type::kB8:
      return "b8";
    case ptx::Type::kU8:
      return "u8";
    case ptx::Type::kS8:
      return "s8";
    case ptx::Type::kB16:
      return "b16";
    case ptx::Type::kU16:
      return "u16";
    case ptx::Type::kS16:
      return "s16";
    case ptx::Type::kF16:
      return "f16";
    case ptx::Type::kB32:
      return "b32";
    case ptx::Type::kU32:
      return "u32";
    case ptx::Type::kS32:
      return "s32";
    case ptx::Type::kF32:
      return "f32";
    case ptx::Type::kB64:
      return "b64";
    case ptx::Type::kU64:
      return "u64";
    case ptx::Type::kS64:
      return "s64";
    case ptx::Type::kF64:
      return "f64";
    default:
      return "?";
  }
}

py::dict to_dict(const ptx::Finding& f) {
  py::dict out;
  out["kernel"] = f.kernel;
  out["line"] = f.line;
  out["source"] = f.source;
  out["opcode"] = f.opcode;
  out["block"] = py::make_tuple(f.block[0], f.block[1], f.block[2]);
  out["warp"] = f.warp;
  out["lane"] = f.lane;
  out["what"] = f.what;
  return out;
}

struct Report {
  py::dict counters;
  py::list findings;
  bool stopped = false;
};

py::dict to_dict(const ptx::Launch& l, bool with_variables) {
  py::dict allocations, lines, opcodes, events, out;
  for (const ptx::Allocation& a : l.memory->allocations()) {
    if (with_variables && a.address == reinterpret_cast<uintptr_t>(l.program->variables.data())) continue;
    py::dict one;
    one["bytes"] = a.bytes;
    one["bytes_read"] = a.bytes_read;
    one["bytes_written"] = a.bytes_written;
    one["sectors_read"] = a.sectors_read;
    one["sectors_written"] = a.sectors_written;
    one["unique_sectors_read"] = a.unique_sectors_read;
    one["unique_sectors_written"] = a.unique_sectors_written;
    allocations[py::str(a.name)] = one;
  }
  std::map<int, ptx::LineCount> by_line;  // a function that is called twice has two instructions for a line
  for (size_t n = 0; n < l.counters.accesses.size(); ++n) {
    const ptx::LineCount& one = l.counters.accesses[n];
    if (one.instructions == 0) continue;
    ptx::LineCount& sum = by_line[l.program->instructions[n].line];
    sum.instructions += one.instructions;
    sum.wavefronts += one.wavefronts;
    sum.ideal += one.ideal;
    sum.sectors += one.sectors;
    sum.ideal_sectors += one.ideal_sectors;
  }
  for (const auto& [line, count] : by_line) {
    py::dict one;
    one["instructions"] = count.instructions;
    one["wavefronts"] = count.wavefronts;
    one["conflicts"] = count.wavefronts - count.ideal;
    one["sectors"] = count.sectors;
    one["ideal_sectors"] = count.ideal_sectors;
    lines[py::int_(line)] = one;
  }
  std::map<std::string, int64_t> executed;
  for (size_t n = 0; n < l.counters.executed.size(); ++n)
    executed[l.program->opcodes[l.program->instructions[n].opcode]] += l.counters.executed[n];
  for (const auto& [name, count] : executed)
    if (count > 0) opcodes[py::str(name)] = count;
  for (const auto& [name, count] : l.counters.events.all()) events[py::str(name)] = count;
  out["instructions"] = l.counters.instructions;
  out["allocations"] = allocations;
  out["lines"] = lines;
  out["opcodes"] = opcodes;
  out["events"] = events;
  return out;
}

class Module {
 public:
  Module(const std::string& text, const std::string& name) : text_(ptx::parse(text, name)) {
  }

  const std::string& target() const {
    return text_.target;
  }
  std::string version() const {
    return std::to_string(text_.version / 10) + "." + std::to_string(text_.version % 10);
  }

  py::dict kernels() {
    py::dict all;
    for (const auto& [name, f] : text_.functions) {
      if (!f.entry || !f.defined) continue;
      py::dict one;
      py::list parameters;
      for (const ptx::Variable& v : f.parameters)
        parameters.append(py::make_tuple(v.name, name_of(v.type), v.bytes, v.align));
      one["params"] = parameters;
      one["reqntid"] = py::make_tuple(f.required_threads[0], f.required_threads[1], f.required_threads[2]);
      one["maxntid"] = py::make_tuple(f.maximum_threads[0], f.maximum_threads[1], f.maximum_threads[2]);
      all[py::str(name)] = one;
    }
    return all;
  }

  py::dict opcodes() const {
    std::map<std::string, int64_t> counts;
    for (const auto& [name, f] : text_.functions)
      for (const ptx::Statement& s : f.statements)
        if (!s.opcode.empty()) counts[s.opcode] += 1;
    py::dict all;
    for (const auto& [name, count] : counts) all[py::str(name)] = count;
    return all;
  }

  const ptx::Program& program(const std::string& kernel) {
    if (const auto known = programs_.find(kernel); known != programs_.end()) return *known->second;
    const auto found = text_.functions.find(kernel);
    if (found == text_.functions.end() || !found->second.entry || !found->second.defined) {
      std::string names;
      for (const auto& [name, f] : text_.functions)
        if (f.entry) names += (names.empty() ? "" : ", ") + name;
      throw ptx::Error(text_.name, 0, "expected one of the kernels " + names + ", got " + kernel);
    }
    return *(programs_[kernel] = std::make_unique<ptx::Program>(ptx::decode(text_, found->second)));
  }

  int64_t static_shared(const std::string& kernel) {
    return program(kernel).static_shared;
  }

  Report launch(const std::string& kernel, std::array<int, 3> grid, std::array<int, 3> threads, int64_t shared_bytes,
                const std::vector<py::bytes>& parameters, ptx::GlobalMemory& memory, uint64_t seed,
                std::array<int, 3> cluster, int64_t limit, bool strict, bool pedantic) {
    const ptx::Program& p = program(kernel);
    ptx::Launch l;
    l.program = &p;
    l.grid = grid;
    l.threads = threads;
    l.dynamic_shared = shared_bytes;
    l.memory = &memory;
    l.random = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    l.limit = limit;
    l.strict = strict;
    l.pedantic = pedantic;
    l.tick = [] {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
    if (cluster != std::array<int, 3>{1, 1, 1})
      throw ptx::Error(kernel, 0, "cannot be launched: clusters of more than one block are not understood");
    const ptx::Function& f = text_.functions.at(kernel);
    if (std::any_of(f.required_cluster, f.required_cluster + 3, [](int blocks) { return blocks > 1; }))
      throw ptx::Error(
          kernel, f.line,
          "cannot be launched: clusters of more than one block, which .reqnctapercluster asks for, are not "
          "understood");
    pack(p, parameters, l.parameters);
    memory.start_launch();
    const auto variables = reinterpret_cast<uintptr_t>(p.variables.data());
    if (p.variable_bytes > 0) memory.add(variables, p.variable_bytes, "variables of the module", true, true, variables);
    Report report;
    const auto finish = [&] {
      report.counters = to_dict(l, p.variable_bytes > 0);
      if (p.variable_bytes > 0) memory.remove(variables);
    };
    try {
      ptx::run(l);
    } catch (const ptx::Fault& fault) {
      if (strict) {
        finish();
        throw;
      }
      l.findings.push_back(fault.finding);
    } catch (...) {
      finish();
      throw;
    }
    for (const ptx::Finding& f : l.findings) report.findings.append(to_dict(f));
    report.stopped = l.stopped;
    finish();
    return report;
  }

 private:
  static void pack(const ptx::Program& p, const std::vector<py::bytes>& given, std::vector<uint8_t>& out) {
    if (given.size() != p.parameters.size())
      throw ptx::Error(p.name, 0,
                       "cannot be launched: expected " + std::to_string(p.parameters.size()) + " parameters, got " +
                           std::to_string(given.size()));
    out.assign(p.parameter_bytes, 0);
    for (size_t n = 0; n < given.size(); ++n) {
      const std::string bytes = given[n];
      const ptx::Parameter& parameter = p.parameters[n];
      if (bytes.size() != static_cast<size_t>(parameter.bytes))
        throw ptx::Error(p.name, 0,
                         "cannot be launched: expected " + std::to_string(parameter.bytes) + " bytes of parameter " +
                             parameter.name + ", got " + std::to_string(bytes.size()));
      std::copy(bytes.begin(), bytes.end(), out.begin() + parameter.offset);
    }
  }

  ptx::Text text_;
  std::map<std::string, std::unique_ptr<ptx::Program>> programs_;
};

// Raised errors carry what they are about as attributes. They quote damaged text, which need not be UTF-8.
void raise(py::handle type, const std::string& text, const py::dict& attributes) {
  const auto words = py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace"));
  py::object error = py::reinterpret_borrow<py::object>(type)(words);
  for (const auto& [name, value] : attributes) error.attr(name) = value;
  PyErr_SetObject(type.ptr(), error.ptr());
}

py::handle make_error(py::module_& m, const char* name, const char* doc) {
  const std::string full = std::string("resnet_fast._ptx.") + name;
  py::handle type = PyErr_NewExceptionWithDoc(full.c_str(), doc, PyExc_RuntimeError, nullptr);
  m.add_object(name, type);
  return type;
}

py::handle ptx_error, ptx_fault;

}  // namespace

// tensor_map.cpp
void bind_tensor_map(pybind11::module_& m);

PYBIND11_MODULE(_ptx, m) {
#if defined(PTX_NEEDS_AVX2)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    throw py::import_error("resnet_fast._ptx was built on a CPU with AVX2, and this one has none: build it here");
#endif
  bind_tensor_map(m);
  m.doc() = "Compiled kernels, as PTX text, on the CPU: every access checked and counted.";
  ptx_error = make_error(m, "PtxError", "Text or a launch that this machine does not accept: .kernel, .line.");
  ptx_fault = make_error(m, "Fault",
                         "What a kernel does wrong: .kernel, .line, .source, .opcode, .block, .warp, .lane, .what.");
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const ptx::Error& e) {
      py::dict attributes;
      attributes["kernel"] = e.kernel;
      attributes["line"] = e.line;
      raise(ptx_error, e.what(), attributes);
    } catch (const ptx::Fault& e) {
      raise(ptx_fault, e.what(), to_dict(e.finding));
    }
  });
  py::class_<ptx::GlobalMemory>(m, "Memory", "The allocations of global memory that launches may use.")
      .def(py::init<>())
      .def(
          "add",
          [](ptx::GlobalMemory& memory, uint64_t address, uint64_t bytes, std::string name, bool written, bool writable,
             std::optional<uint64_t> host) {
            memory.add(address, bytes, std::move(name), written, writable, host.value_or(address));
          },
          py::arg("address"), py::arg("bytes"), py::arg("name"), py::arg("written") = true, py::arg("writable") = true,
          py::arg("host") = py::none(),
          "Add memory that kernels reach at `address`, and that is at `host` here (by default the same). Bytes that "
          "are "
          "not `written` yet may not be read before a kernel writes them.")
      .def(
          "write",
          [](ptx::GlobalMemory& memory, uint64_t address, uint64_t bytes) {
            ptx::Allocation* a = memory.find(address, bytes);
            if (a == nullptr) throw py::value_error("expected bytes of one allocation");
            ptx::GlobalMemory::mark_written(*a, address, bytes);
          },
          py::arg("address"), py::arg("bytes"), "Note that the host has written these bytes.")
      .def("remove", &ptx::GlobalMemory::remove, py::arg("address"), "Take the allocation at this address away.")
      .def(
          "unwritten",
          [](ptx::GlobalMemory& memory) {
            py::dict all;
            for (const ptx::Allocation& a : memory.allocations()) {
              const auto missing = std::count(a.written.begin(), a.written.end(), 0);
              if (missing > 0) all[py::str(a.name)] = missing;
            }
            return all;
          },
          "Return how many bytes of each allocation nobody has written, of those that have such bytes.");
  m.def(
      "understands",
      [](const std::string& opcode) {
        ptx::Modifiers modifiers(opcode);
        const ptx::Family family = ptx::family_named(modifiers.name());
        return opcode == "call" || opcode == "call.uni" ||
               (family != nullptr && family(modifiers).run != nullptr && modifiers.empty());
      },
      py::arg("opcode"), "Return whether an opcode with its modifiers, such as cvt.rn.bf16.f32, is understood.");
  py::class_<Report>(m, "Report", "What a launch counted and found.")
      .def_readonly("counters", &Report::counters)
      .def_readonly("findings", &Report::findings)
      .def_readonly("stopped", &Report::stopped);
  py::class_<Module>(m, "Module", "Parsed PTX text.")
      .def(py::init<const std::string&, const std::string&>(), py::arg("text"), py::arg("name") = "ptx")
      .def_property_readonly("target", &Module::target)
      .def_property_readonly("version", &Module::version)
      .def_property_readonly("kernels", &Module::kernels)
      .def("opcodes", &Module::opcodes, "Return how often each opcode with its modifiers stands in the text.")
      .def(
          "check", [](Module& self, const std::string& kernel) { self.program(kernel); }, py::arg("kernel"),
          "Raise PtxError if the kernel has anything that is not understood.")
      .def("static_shared", &Module::static_shared, py::arg("kernel"),
           "Return the bytes of shared memory that the kernel has itself.")
      .def("launch", &Module::launch, py::arg("kernel"), py::arg("grid"), py::arg("block"), py::arg("shared_bytes"),
           py::arg("params"), py::arg("memory"), py::arg("seed") = 0, py::arg("cluster") = std::array<int, 3>{1, 1, 1},
           py::arg("limit") = int64_t{1} << 33, py::arg("strict") = true, py::arg("pedantic") = false,
           "Run a kernel and return a Report. Raises Fault at the first finding, or collects them if not `strict`. "
           "`pedantic`: also report mbarriers whose initialisation no fence follows.");
}
