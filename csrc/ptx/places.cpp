// The layout of a kernel's registers, constants and variables.

#include "places.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr int64_t kMostParameterBytes = 32764, kMostLocalBytes = 512 << 10;  // of CUDA: of a kernel, and of a thread
constexpr uint32_t kAlign = 64;  // of a register, so that vector instructions load it whole

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

uint64_t bits_of_float(double value, Type type) {
  uint64_t bits = 0;
  if (type == Type::kF32 || type == Type::kB32) {
    const auto narrow = static_cast<float>(value);
    std::memcpy(&bits, &narrow, sizeof(narrow));
  } else {
    std::memcpy(&bits, &value, sizeof(value));
  }
  return bits;
}

}  // namespace

uint64_t bits_of(const Written& w, Type type) {
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

Places::Places(const Text& text, const Function& kernel, Program& out) : text_(text), kernel_(kernel), out_(out) {
  out_.registers.push_back("a constant");
  lay_out_parameters();
  lay_out_variables();
}

void Places::fail(int line, const std::string& what) const {
  throw Error(kernel_.name, line, what);
}

const Type* Places::special_type(const std::string& name) const {
  const auto found = special_registers().find(name);
  return found == special_registers().end() ? nullptr : &found->second;
}

void Places::lay_out_parameters() {
  int64_t at = 0;
  for (const Variable& v : kernel_.parameters) {
    if (v.bytes < 1 || v.bytes > kMostParameterBytes)
      fail(kernel_.line,
           "expected a parameter " + v.name + " of 1 to " + std::to_string(kMostParameterBytes) + " bytes");
    at = round_up(at, v.align);
    out_.parameters.push_back({v.name, v.type, static_cast<int>(v.bytes), v.align, static_cast<int>(at)});
    at += v.bytes;
  }
  out_.parameter_bytes = static_cast<int>(at);
}

void Places::lay_out_variables() {
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

int64_t Places::place_shared(const Variable& v) {
  out_.static_shared = round_up(out_.static_shared, v.align);
  out_.shared_align = std::max(out_.shared_align, v.align);
  const int64_t at = out_.static_shared;
  out_.static_shared += v.bytes;
  return at;
}

void Places::initialise(const Variable& v, int64_t at) {
  auto* bytes = reinterpret_cast<uint8_t*>(out_.variables.data()) + at;
  for (const Written& w : v.initial) {
    if (w.kind != Written::kInteger && w.kind != Written::kFloat)
      fail(0, "not understood: variable " + v.name + " is initialised with an address");
    const uint64_t bits = bits_of(w, v.type);
    std::memcpy(bytes, &bits, bytes_of(v.type));
    bytes += bytes_of(v.type);
  }
}

bool Places::find_local(Frame& frame, int scope, const std::string& name, int64_t& at) {
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
      if (v->second.bytes < 0 || out_.local_bytes > kMostLocalBytes)
        fail(kernel_.line,
             "expected at most " + std::to_string(kMostLocalBytes) + " bytes of local memory, with " + name);
    }
    at = place->second;
    return true;
  }
  const auto bound = frame.bound.find(name);
  if (bound == frame.bound.end()) return false;
  at = bound->second;
  return true;
}

Slot Places::constant(Type type, uint64_t bits) {
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

uint32_t Places::place_constant(Type type) {
  const auto at = static_cast<uint32_t>(round_up(static_cast<int64_t>(out_.initial.size()), kAlign));
  out_.initial.resize(at + bytes_of_register(type));
  return at;
}

Slot Places::special_register(const std::string& name, Type type) {
  const auto [at, fresh] = out_.special.emplace(name, Slot{});
  if (fresh) {
    at->second.type = type;
    at->second.at = place_constant(type);
  }
  return at->second;
}

bool Places::find_symbol(Frame& frame, const Statement& s, const std::string& name, int64_t& address) {
  int64_t at = 0;
  for (int scope = s.scope; scope >= 0; scope = frame.function->scopes[scope].parent) {
    const auto& variables = frame.function->scopes[scope].variables;
    const auto v = variables.find(name);
    if (v == variables.end()) continue;
    if (v->second.space == "reg") return false;
    if (v->second.space == "shared") {
      address = shared_.at(&v->second);
    } else if (find_local(frame, s.scope, name, at)) {
      // Arguments of functions are in local memory: ld.param tells them by the window from a kernel's parameters.
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
        address = p.offset;
        return true;
      }
  const auto v = text_.variables.find(name);
  if (v == text_.variables.end()) return false;
  const auto found = variables_.find(name);
  if (found == variables_.end()) fail(s.line, "not understood: extern variable " + name);
  address = found->second;
  if (v->second.space != "shared") address += static_cast<int64_t>(reinterpret_cast<uintptr_t>(out_.variables.data()));
  return true;
}

Slot Places::register_named(Frame& frame, const Statement& s, const std::string& name) {
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

uint32_t Places::finish() {
  const auto base = static_cast<uint32_t>(round_up(static_cast<int64_t>(out_.initial.size()), kAlign));
  out_.initial.resize(base);
  out_.file_bytes = base + registers_bytes_;
  return base;
}

}  // namespace ptx
