// Statements to instructions: names become places in the register file, opcodes become functions, called functions are
// written out where they are called.

#include <algorithm>
#include <cstring>

#include "families.h"
#include "instruction.h"
#include "places.h"

namespace ptx {
namespace {

constexpr int kDeepest = 32;  // calls within calls

class Decoder {
 public:
  Decoder(const Text& text, const Function& kernel) : text_(text), kernel_(kernel), places_(text, kernel, out_) {
  }

  Program run() {
    Program& p = out_;
    p.name = kernel_.name;
    p.module = text_.name;
    p.text = &text_;
    std::copy(kernel_.maximum_threads, kernel_.maximum_threads + 3, p.maximum_threads);
    std::copy(kernel_.required_threads, kernel_.required_threads + 3, p.required_threads);
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
    const bool defined = found != text_.functions.end() && found->second.defined;
    if (!defined && w[name].name == kAssertion) {
      Statement fails = s;
      fails.opcode = kAssertion;
      fails.operands.clear();
      return instruction(frame, fails);
    }
    if (!defined)
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
      if (formal[i].space != "param" || !places_.find_local(frame, s.scope, actual[i].name, at))
        fail(s.line, "not understood: argument " + actual[i].name + " of a call is not a .param variable");
      inner.bound[formal[i].name] = at;
    }
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
    const Slot slot = places_.register_named(frame, s, name);
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
    i.order = form.order;
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
      return places_.constant(type, bits_of(w, type));
    }
    if (w.kind != Written::kName) fail(s.line, "expected one register in " + s.opcode);
    if (w.name == "_") return absent();
    if (const Type* special = places_.special_type(w.name); special != nullptr) {
      if (written) fail(s.line, "expected a register to write, got " + w.name);
      return places_.special_register(w.name, *special);
    }
    int64_t address = 0;
    if (!written && places_.find_symbol(frame, s, w.name, address))
      return places_.constant(want.type == Type::kNone ? Type::kB64 : want.type,
                              static_cast<uint64_t>(address + w.value));
    Slot slot = places_.register_named(frame, s, w.name);
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

  void place_registers() {
    const uint32_t base = places_.finish();
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
  Places places_;
  std::map<std::string, int32_t> opcodes_;
  std::vector<size_t> firsts_;
  std::map<int32_t, size_t> first_of_;
};

}  // namespace

Program decode(const Text& text, const Function& kernel) {
  return Decoder(text, kernel).run();
}

}  // namespace ptx
