// Statements to instructions: names become places in the register file, opcodes become functions, called functions are
// written out where they are called.

#include <algorithm>
#include <cstring>

#include "families.h"
#include "instruction.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr uint32_t kAlign = 64;  // of a register, so that vector instructions load it whole
constexpr int kDeepest = 32;     // calls within calls

uint32_t bytes_of_register(Type type) {
  return type == Type::kPred ? 4 : static_cast<uint32_t>(lane_bytes(type)) * kWarp;
}

int64_t round_up(int64_t value, int64_t align) {
  return (value + align - 1) / align * align;
}

const std::map<std::string, Type>& special_registers() {
  static const std::map<std::string, Type> kAll = [] {
    std::map<std::string, Type> all = {
        {"%laneid", Type::kU32},      {"%warpid", Type::kU32},         {"%nwarpid", Type::kU32},
        {"%smid", Type::kU32},        {"%nsmid", Type::kU32},          {"%lanemask_eq", Type::kU32},
        {"%lanemask_le", Type::kU32}, {"%lanemask_lt", Type::kU32},    {"%lanemask_ge", Type::kU32},
        {"%lanemask_gt", Type::kU32}, {"%clock", Type::kU32},          {"%clock_hi", Type::kU32},
        {"%clock64", Type::kU64},     {"%globaltimer", Type::kU64},    {"%dynamic_smem_size", Type::kU32},
        {"%gridid", Type::kU64},      {"%total_smem_size", Type::kU32}};
    for (const char* name :
         {"%tid", "%ntid", "%ctaid", "%nctaid", "%cluster_ctaid", "%cluster_nctaid", "%clusterid", "%nclusterid"})
      for (const char* axis : {".x", ".y", ".z"}) all[std::string(name) + axis] = Type::kU32;
    for (const char* name : {"%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster"}) all[name] = Type::kU32;
    return all;
  }();
  return kAll;
}

// A function that is being written out: the kernel, or one that it calls.
struct Frame {
  const Function* function = nullptr;
  std::map<std::pair<int, std::string>, Slot> registers;  // by scope and name
  std::map<std::pair<int, std::string>, int64_t> places;  // of .local and .param variables, in a lane's local memory
  std::map<std::string, int64_t> bound;                   // parameters and results, in a lane's local memory
  std::vector<int32_t> starts;                            // by statement: its first instruction
  struct Jump {
    int32_t instruction;
    int scope;
    std::string label;
    bool listed;  // one of brx.idx
  };
  std::vector<Jump> jumps;
  std::vector<int32_t> returns;  // jumps to the end of the function
};

class Decoder {
 public:
  Decoder(const Text& text, const Function& kernel) : text_(text), kernel_(kernel) {
  }

  Program run() {
    Program& p = out_;
    p.name = kernel_.name;
    p.module = text_.name;
    p.text = &text_;
    std::copy(kernel_.maximum_threads, kernel_.maximum_threads + 3, p.maximum_threads);
    std::copy(kernel_.required_threads, kernel_.required_threads + 3, p.required_threads);
    p.registers.push_back("a constant");
    lay_out_parameters();
    lay_out_variables();
    Frame frame;
    frame.function = &kernel_;
    write_out(frame, 0);
    Instruction end;
    end.run = run_exit;
    end.opcode = opcode("ret");
    end.line = p.instructions.empty() ? kernel_.line : p.instructions.back().line;
    p.instructions.push_back(end);
    place_registers();
    find_meeting_points(p.instructions);
    return std::move(out_);
  }

 private:
  [[noreturn]] void fail(int line, const std::string& what) const {
    throw Error(kernel_.name, line, what);
  }

  void lay_out_parameters() {
    int64_t at = 0;
    for (const Variable& v : kernel_.parameters) {
      at = round_up(at, v.align);
      out_.parameters.push_back({v.name, v.type, static_cast<int>(v.bytes), v.align, static_cast<int>(at)});
      at += v.bytes;
    }
    out_.parameter_bytes = static_cast<int>(at);
  }

  void lay_out_variables() {
    int64_t at = 0;
    std::vector<const Variable*> dynamic;
    for (const auto& [name, v] : text_.variables) {
      if (v.space == "shared") {
        out_.shared_align = std::max(out_.shared_align, v.align);
        if (v.bytes < 0) {
          dynamic.push_back(&v);
        } else {
          variables_[name] = place_shared(v);
        }
      } else if (v.bytes >= 0) {
        at = round_up(at, v.align);
        variables_[name] = at;
        at += v.bytes;
      }
    }
    for (const Scope& scope : kernel_.scopes)
      for (const auto& [name, v] : scope.variables)
        if (v.space == "shared") shared_[&v] = place_shared(v);
    for (const auto& [name, f] : text_.functions)
      for (const Scope& scope : f.scopes)
        for (const auto& [unused, v] : scope.variables)
          if (v.space == "shared" && &f != &kernel_ && !f.entry) shared_[&v] = place_shared(v);
    for (const Variable* v : dynamic) {  // all of them begin where the static ones end
      out_.static_shared = round_up(out_.static_shared, v->align);
    }
    for (const Variable* v : dynamic) variables_[v->name] = out_.static_shared;
    out_.variable_bytes = at;
    out_.variables.resize(static_cast<size_t>(round_up(at, 8) / 8) + 2);
    for (const auto& [name, v] : text_.variables)
      if (v.space != "shared" && v.bytes >= 0) initialise(v, variables_[name]);
  }

  int64_t place_shared(const Variable& v) {
    out_.static_shared = round_up(out_.static_shared, v.align);
    out_.shared_align = std::max(out_.shared_align, v.align);
    const int64_t at = out_.static_shared;
    out_.static_shared += v.bytes;
    return at;
  }

  void initialise(const Variable& v, int64_t at) {
    auto* bytes = reinterpret_cast<uint8_t*>(out_.variables.data()) + at;
    for (const Written& w : v.initial) {
      if (w.kind != Written::kInteger && w.kind != Written::kFloat)
        fail(0, "not understood: variable " + v.name + " is initialised with an address");
      const uint64_t bits = bits_of(w, v.type);
      std::memcpy(bytes, &bits, bytes_of(v.type));
      bytes += bytes_of(v.type);
    }
  }

  // ---- functions ----

  void write_out(Frame& frame, int depth) {
    const Function& f = *frame.function;
    frame.starts.assign(f.statements.size() + 1, 0);
    for (size_t n = 0; n < f.statements.size(); ++n) {
      const Statement& s = f.statements[n];
      frame.starts[n] = next();
      if (s.opcode.empty()) continue;
      if (s.opcode == "call" || s.opcode.rfind("call.", 0) == 0) {
        call(frame, s, depth);
      } else if (depth > 0 && (s.opcode == "ret" || s.opcode == "ret.uni")) {
        frame.returns.push_back(jump(frame, s, s.guard, s.guard_negated));
      } else {
        instruction(frame, s);
      }
    }
    frame.starts[f.statements.size()] = next();
    for (const Frame::Jump& j : frame.jumps) {
      const int32_t target = find_label(frame, j);
      Instruction& i = out_.instructions[j.instruction];
      if (j.listed) {
        i.targets.push_back(target);
      } else {
        i.target = target;
      }
    }
    for (int32_t r : frame.returns) out_.instructions[r].target = next();
  }

  int32_t next() const {
    return static_cast<int32_t>(out_.instructions.size());
  }

  int32_t find_label(const Frame& frame, const Frame::Jump& j) {
    for (int scope = j.scope; scope >= 0; scope = frame.function->scopes[scope].parent) {
      const auto& labels = frame.function->scopes[scope].labels;
      if (const auto found = labels.find(j.label); found != labels.end()) return frame.starts[found->second];
    }
    fail(out_.instructions[j.instruction].line, "expected a label, got " + j.label);
  }

  int32_t jump(Frame& frame, const Statement& s, const std::string& guard, bool negated) {
    Instruction i = begin(s);
    i.run = run_branch;
    i.opcode = opcode("bra");
    if (!guard.empty()) set_guard(frame, s, i, guard, negated);
    out_.instructions.push_back(i);
    return next() - 1;
  }

  void call(Frame& frame, const Statement& s, int depth) {
    if (depth == kDeepest) fail(s.line, "not understood: calls more than " + std::to_string(kDeepest) + " deep");
    const std::vector<Written>& w = s.operands;
    const size_t name = !w.empty() && w[0].kind == Written::kList ? 1 : 0;
    if (name >= w.size() || w[name].kind != Written::kName) fail(s.line, "expected a function to call");
    const auto found = text_.functions.find(w[name].name);
    if (found == text_.functions.end() || !found->second.defined)
      fail(s.line, "not understood: " + s.opcode + " of " + w[name].name + ", which the text does not define");
    const Function& callee = found->second;
    int32_t around = -1;
    if (!s.guard.empty()) around = jump(frame, s, s.guard, !s.guard_negated);
    Frame inner;
    inner.function = &callee;
    if (name == 1) bind(frame, s, callee.results, w[0].parts, inner);
    if (name + 1 < w.size()) bind(frame, s, callee.parameters, w[name + 1].parts, inner);
    write_out(inner, depth + 1);
    if (around >= 0) out_.instructions[around].target = next();
  }

  void bind(Frame& frame, const Statement& s, const std::vector<Variable>& formal, const std::vector<Written>& actual,
            Frame& inner) {
    if (formal.size() != actual.size())
      fail(s.line, "expected " + std::to_string(formal.size()) + " arguments, got " + std::to_string(actual.size()));
    for (size_t i = 0; i < formal.size(); ++i) {
      int64_t at = 0;
      if (formal[i].space != "param" || !find_place(frame, s.scope, actual[i].name, at))
        fail(s.line, "not understood: argument " + actual[i].name + " of a call is not a .param variable");
      inner.bound[formal[i].name] = at;
    }
  }

  // Where a .local or .param variable of a function is in a lane's local memory.
  bool find_place(Frame& frame, int scope, const std::string& name, int64_t& at) {
    for (; scope >= 0; scope = frame.function->scopes[scope].parent) {
      const auto& variables = frame.function->scopes[scope].variables;
      const auto v = variables.find(name);
      if (v == variables.end()) continue;
      if (v->second.space != "param" && v->second.space != "local") return false;
      const auto [place, fresh] = frame.places.emplace(std::pair(scope, name), 0);
      if (fresh) {
        out_.local_bytes = round_up(out_.local_bytes, std::max(v->second.align, 1));
        place->second = out_.local_bytes;
        out_.local_bytes += v->second.bytes;
      }
      at = place->second;
      return true;
    }
    const auto bound = frame.bound.find(name);
    if (bound == frame.bound.end()) return false;
    at = bound->second;
    return true;
  }

  // ---- instructions ----

  Instruction begin(const Statement& s) {
    Instruction i;
    i.line = s.line;
    i.source = s.source;
    return i;
  }

  int32_t opcode(const std::string& name) {
    const auto [at, fresh] = opcodes_.emplace(name, static_cast<int32_t>(out_.opcodes.size()));
    if (fresh) out_.opcodes.push_back(name);
    return at->second;
  }

  void set_guard(Frame& frame, const Statement& s, Instruction& i, const std::string& name, bool negated) {
    const Slot slot = find_register(frame, s, name);
    if (slot.type != Type::kPred) fail(s.line, "expected a predicate as guard, got " + name);
    i.guarded = true;
    i.guard_negated = negated;
    i.guard_at = slot.at;
    i.guard_reg = slot.reg;
  }

  void instruction(Frame& frame, const Statement& s) {
    Modifiers m(s.opcode);
    const Family family = family_named(m.name());
    Form form;
    if (family != nullptr) form = family(m);
    if (form.run == nullptr || !m.empty()) fail(s.line, "not understood: " + s.opcode);
    Instruction i = begin(s);
    const bool vectors =
        std::any_of(s.operands.begin(), s.operands.end(), [](const Written& w) { return w.kind == Written::kVector; });
    i.run = form.plain != nullptr && !vectors ? form.plain : form.run;
    i.type = form.type;
    i.other_type = form.other_type;
    i.flags = form.flags;
    i.number = form.number;
    i.opcode = opcode(s.opcode);
    i.collective = s.opcode.find(".sync") != std::string::npos || s.opcode.find(".aligned") != std::string::npos ||
                   s.opcode.rfind("bar", 0) == 0;
    if (!s.guard.empty()) set_guard(frame, s, i, s.guard, s.guard_negated);
    firsts_.push_back(out_.slots.size());
    size_t n = 0;
    for (const Want& want : form.wants) {
      if (n == s.operands.size()) {
        if (!want.optional) fail(s.line, "expected more operands of " + s.opcode);
        break;
      }
      Part& part = i.part[i.parts++];
      part.first = static_cast<uint16_t>(out_.slots.size() - firsts_.back());
      operand(frame, s, want, s.operands[n++]);
      part.count = static_cast<uint16_t>(out_.slots.size() - firsts_.back() - part.first);
    }
    if (form.exact != nullptr && as_wide_as_wanted(i, form)) i.run = form.exact;
    if (n < s.operands.size())
      fail(s.line,
           "expected " + std::to_string(n) + " operands of " + s.opcode + ", got " + std::to_string(s.operands.size()));
    first_of_[next()] = firsts_.back();
    out_.instructions.push_back(std::move(i));
  }

  bool as_wide_as_wanted(const Instruction& i, const Form& form) const {
    for (int n = 0; n < i.parts; ++n) {
      const Slot& slot = out_.slots[firsts_.back() + i.part[n].first];
      if (lane_bytes(slot.type) != lane_bytes(form.wants[n].type)) return false;
    }
    return true;
  }

  void operand(Frame& frame, const Statement& s, const Want& want, const Written& w) {
    switch (want.kind) {
      case Want::kRead:
      case Want::kWrite:
        return add(value(frame, s, want, w, want.kind == Want::kWrite));
      case Want::kReadMany:
      case Want::kWriteMany: {
        const size_t elements = w.kind == Written::kVector ? w.parts.size() : 1;
        if (want.count != 0 && elements != want.count)
          fail(s.line, "expected " + std::to_string(want.count) + " registers in an operand of " + s.opcode + ", got " +
                           std::to_string(elements));
        if (w.kind != Written::kVector) return add(value(frame, s, want, w, want.kind == Want::kWriteMany));
        Want element = want;
        if (want.split) element.type = share_of(s, want.type, w.parts.size());
        for (const Written& part : w.parts) add(value(frame, s, element, part, want.kind == Want::kWriteMany));
        return;
      }
      case Want::kPair:
        if (w.kind == Written::kPair) {
          Want second = want;
          if (second.type != Type::kPred && second.type != Type::kNone) second.type = Type::kPred;
          add(value(frame, s, want, w.parts[0], true));
          return add(value(frame, s, second, w.parts[1], true));
        }
        add(value(frame, s, want, w, true));
        return add(absent());
      case Want::kConstant: {
        if (w.kind != Written::kInteger) fail(s.line, "expected an integer in " + s.opcode + ", got " + w.name);
        Slot slot;
        slot.plus = w.value;
        return add(slot);
      }
      case Want::kLabel:
        return label(frame, s, w);
      case Want::kMemory:
        return memory(frame, s, want, w);
    }
  }

  Type share_of(const Statement& s, Type type, size_t elements) const {
    const size_t bytes = bytes_of(type) / elements;
    if (bytes * elements != static_cast<size_t>(bytes_of(type)) || bytes == 0)
      fail(s.line, "expected a vector that fills the type of " + s.opcode);
    return bytes == 1 ? Type::kB8 : bytes == 2 ? Type::kB16 : bytes == 4 ? Type::kB32 : Type::kB64;
  }

  void add(const Slot& slot) {
    out_.slots.push_back(slot);
  }

  static Slot absent() {
    Slot slot;
    slot.absent = true;
    return slot;
  }

  void label(Frame& frame, const Statement& s, const Written& w) {
    const auto list = frame.function->branch_targets.find(w.name);
    if (list == frame.function->branch_targets.end()) {
      frame.jumps.push_back({next(), s.scope, w.name, false});
    } else {
      for (const std::string& target : list->second) frame.jumps.push_back({next(), s.scope, target, true});
    }
  }

  void memory(Frame& frame, const Statement& s, const Want& want, const Written& w) {
    if (w.kind != Written::kMemory) fail(s.line, "expected an address in [] in " + s.opcode);
    const size_t first = out_.slots.size();
    Want address;
    Slot base = value(frame, s, address, w.parts[0], false);
    if (base.type == Type::kPred || (bytes_of(base.type) != 4 && bytes_of(base.type) != 8))
      fail(s.line, "expected an address of 32 or 64 bits in " + s.opcode);
    base.plus = w.value;
    add(base);
    Want further;
    further.type = want.type;
    for (size_t i = 1; i < w.parts.size(); ++i) {
      if (w.parts[i].kind != Written::kVector) {
        add(value(frame, s, further, w.parts[i], false));
      } else {
        for (const Written& part : w.parts[i].parts) add(value(frame, s, further, part, false));
      }
    }
    const size_t elements = out_.slots.size() - first;
    if (want.count != 0 && elements != want.count)
      fail(s.line, "expected " + std::to_string(want.count) + " registers in [] of " + s.opcode + ", got " +
                       std::to_string(elements));
  }

  Slot value(Frame& frame, const Statement& s, const Want& want, const Written& w, bool written) {
    if (w.kind == Written::kInteger || w.kind == Written::kFloat) {
      if (written) fail(s.line, "expected a register to write in " + s.opcode + ", got a constant");
      Type type = want.type;
      if (type == Type::kNone) type = w.kind == Written::kFloat && w.single ? Type::kB32 : Type::kB64;
      return constant(type, bits_of(w, type));
    }
    if (w.kind != Written::kName) fail(s.line, "expected one register in " + s.opcode);
    if (w.name == "_") return absent();
    if (const auto special = special_registers().find(w.name); special != special_registers().end()) {
      if (written) fail(s.line, "expected a register to write, got " + w.name);
      return special_register(w.name, special->second);
    }
    int64_t address = 0;
    if (!written && find_symbol(frame, s, w.name, address))
      return constant(want.type == Type::kNone ? Type::kB64 : want.type, static_cast<uint64_t>(address + w.value));
    Slot slot = find_register(frame, s, w.name);
    slot.negated = w.negated;
    check(s, want, slot, w.name);
    return slot;
  }

  void check(const Statement& s, const Want& want, const Slot& slot, const std::string& name) {
    if (want.type == Type::kNone) return;
    const bool same = (slot.type == Type::kPred) == (want.type == Type::kPred);
    const int have = lane_bytes(slot.type), need = lane_bytes(want.type);
    if (!same || (want.any_width ? have < need : have != need))
      fail(s.line, "operand " + name + " of " + s.opcode + " has another size than the instruction's type");
  }

  static uint64_t bits_of(const Written& w, Type type) {
    if (w.kind == Written::kInteger) {
      if (type == Type::kF32 || type == Type::kF64) {
        if (w.value != 0) {
          const double value = static_cast<double>(w.value);
          return bits_of_float(value, type);
        }
      }
      return static_cast<uint64_t>(w.value);
    }
    if (w.single) {
      if (type != Type::kF64) return static_cast<uint64_t>(w.value);
      float narrow = 0;
      const auto bits = static_cast<uint32_t>(w.value);
      std::memcpy(&narrow, &bits, sizeof(narrow));
      return bits_of_float(narrow, type);
    }
    double value = 0;
    std::memcpy(&value, &w.value, sizeof(value));
    return bits_of_float(value, type);
  }

  static uint64_t bits_of_float(double value, Type type) {
    uint64_t bits = 0;
    if (type == Type::kF32 || type == Type::kB32) {
      const auto narrow = static_cast<float>(value);
      std::memcpy(&bits, &narrow, sizeof(narrow));
    } else {
      std::memcpy(&bits, &value, sizeof(value));
    }
    return bits;
  }

  // ---- places ----

  Slot constant(Type type, uint64_t bits) {
    Slot slot;
    slot.type = type;
    const int width = lane_bytes(type);
    if (type == Type::kPred) bits = bits != 0 ? kAllLanes : 0;
    if (width > 0 && width < 8) bits &= (uint64_t{1} << 8 * width) - 1;
    const auto [at, fresh] = constants_.emplace(std::pair(width, bits), 0);
    if (fresh) {
      at->second = place_constant(type);
      uint8_t* to = out_.initial.data() + at->second;
      if (width == 0) std::memcpy(to, &bits, 4);
      for (int lane = 0; lane < kWarp && width > 0; ++lane) std::memcpy(to + lane * width, &bits, std::min(width, 8));
    }
    slot.at = at->second;
    return slot;
  }

  uint32_t place_constant(Type type) {
    const auto at = static_cast<uint32_t>(round_up(static_cast<int64_t>(out_.initial.size()), kAlign));
    out_.initial.resize(at + bytes_of_register(type));
    return at;
  }

  Slot special_register(const std::string& name, Type type) {
    const auto [at, fresh] = out_.special.emplace(name, Slot{});
    if (fresh) {
      at->second.type = type;
      at->second.at = place_constant(type);
    }
    return at->second;
  }

  // The address of a variable or parameter.
  bool find_symbol(Frame& frame, const Statement& s, const std::string& name, int64_t& address) {
    int64_t at = 0;
    for (int scope = s.scope; scope >= 0; scope = frame.function->scopes[scope].parent) {
      const auto& variables = frame.function->scopes[scope].variables;
      const auto v = variables.find(name);
      if (v == variables.end()) continue;
      if (v->second.space == "reg") return false;
      if (v->second.space == "shared") {
        address = shared_.at(&v->second);
      } else if (find_place(frame, s.scope, name, at)) {
        // A .param variable is reached by its generic address, so that ld.param finds arguments of kernels too.
        address = v->second.space == "param" ? static_cast<int64_t>(kLocalWindow) + at : at;
      } else {
        fail(s.line, "not understood: ." + v->second.space + " variable " + name + " within a function");
      }
      return true;
    }
    if (const auto bound = frame.bound.find(name); bound != frame.bound.end()) {
      address = static_cast<int64_t>(kLocalWindow) + bound->second;
      return true;
    }
    if (frame.function == &kernel_)
      for (const Parameter& p : out_.parameters)
        if (p.name == name) {
          address = static_cast<int64_t>(kParameterWindow) + p.offset;
          return true;
        }
    const auto v = text_.variables.find(name);
    if (v == text_.variables.end()) return false;
    const auto found = variables_.find(name);
    if (found == variables_.end()) fail(s.line, "not understood: extern variable " + name);
    address = found->second;
    if (v->second.space != "shared")
      address += static_cast<int64_t>(reinterpret_cast<uintptr_t>(out_.variables.data()));
    return true;
  }

  Slot find_register(Frame& frame, const Statement& s, const std::string& name) {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (int scope = s.scope; scope >= 0; scope = frame.function->scopes[scope].parent) {
      const auto key = std::pair(scope, name);
      if (const auto known = frame.registers.find(key); known != frame.registers.end()) return known->second;
      const auto& variables = frame.function->scopes[scope].variables;
      auto v = variables.find(name);
      if (v == variables.end() || v->second.count >= 0) {
        v = digits < name.size() ? variables.find(name.substr(0, digits)) : variables.end();
        if (v == variables.end() || v->second.count <= std::atoll(name.c_str() + digits)) continue;
      }
      if (v->second.space != "reg") continue;
      Slot slot;
      slot.type = v->second.type;
      slot.at = registers_bytes_;
      slot.reg = static_cast<int32_t>(out_.registers.size());
      registers_bytes_ += static_cast<uint32_t>(round_up(bytes_of_register(slot.type), kAlign));
      out_.registers.push_back(name);
      frame.registers.emplace(key, slot);
      return slot;
    }
    fail(s.line, "expected a register, variable or parameter, got " + name + ", which is not declared");
  }

  // Registers come after the constants, whose number is known only now.
  void place_registers() {
    const auto base = static_cast<uint32_t>(round_up(static_cast<int64_t>(out_.initial.size()), kAlign));
    out_.initial.resize(base);
    out_.file_bytes = base + registers_bytes_;
    for (Slot& slot : out_.slots)
      if (slot.reg != kConstantRegister) slot.at += base;
    for (int32_t n = 0; n < next(); ++n) {
      Instruction& i = out_.instructions[n];
      if (i.guarded) i.guard_at += base;
      if (const auto first = first_of_.find(n); first != first_of_.end()) i.slot = out_.slots.data() + first->second;
    }
  }

  const Text& text_;
  const Function& kernel_;
  Program out_;
  std::map<std::string, int64_t> variables_;
  std::map<const Variable*, int64_t> shared_;
  std::map<std::pair<int, uint64_t>, uint32_t> constants_;
  std::map<std::string, int32_t> opcodes_;
  std::vector<size_t> firsts_;
  std::map<int32_t, size_t> first_of_;
  uint32_t registers_bytes_ = 0;
};

}  // namespace

Program decode(const Text& text, const Function& kernel) {
  return Decoder(text, kernel).run();
}

std::string Program::source(const Instruction& i) const {
  if (i.source < 0 || i.source >= static_cast<int32_t>(text->sources.size())) return "";
  const Source& s = text->sources[i.source];
  const auto name = [&](int file, int line) {
    const auto found = text->files.find(file);
    const std::string path = found == text->files.end() ? "file " + std::to_string(file) : found->second;
    return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  };
  std::string out = name(s.file, s.line);
  if (s.inlined_file != 0) out += ", inlined at " + name(s.inlined_file, s.inlined_line);
  return out;
}

Modifiers::Modifiers(const std::string& opcode) {
  size_t from = 0;
  for (size_t dot; (dot = opcode.find('.', from)) != std::string::npos; from = dot + 1)
    words_.push_back(opcode.substr(from, dot - from));
  words_.push_back(opcode.substr(from));
}

bool Modifiers::take(const char* word) {
  for (size_t i = 1; i < words_.size(); ++i) {
    if (words_[i] == word) {
      words_[i].clear();
      return true;
    }
  }
  return false;
}

const char* Modifiers::take_one(std::initializer_list<const char*> words) {
  for (const char* word : words)
    if (take(word)) return word;
  return "";
}

Type Modifiers::take_type() {
  for (size_t i = 1; i < words_.size(); ++i) {
    const Type type = type_named(words_[i]);
    if (type == Type::kNone) continue;
    words_[i].clear();
    return type;
  }
  return Type::kNone;
}

bool Modifiers::empty() const {
  return std::all_of(words_.begin() + 1, words_.end(), [](const std::string& word) { return word.empty(); });
}

}  // namespace ptx
