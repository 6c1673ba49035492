// Where registers, constants and variables are: in a warp's register file, in shared, local and global memory.
#pragma once

#include <utility>

#include "instruction.h"

namespace ptx {

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

// The places of one kernel's program, given out as its text asks for them.
class Places {
 public:
  // Lays out the parameters, and the variables of the module.
  Places(const Text& text, const Function& kernel, Program& out);

  Slot constant(Type type, uint64_t bits);
  // Null if it is none.
  const Type* special_type(const std::string& name) const;
  Slot special_register(const std::string& name, Type type);
  Slot register_named(Frame& frame, const Statement& s, const std::string& name);
  // The address of a variable or parameter. Returns false if the name is none of them.
  bool find_symbol(Frame& frame, const Statement& s, const std::string& name, int64_t& address);
  // Where a .local or .param variable of a function is in a lane's local memory.
  bool find_local(Frame& frame, int scope, const std::string& name, int64_t& at);
  // Registers come after the constants, whose number is known only at the end. Returns where they begin.
  uint32_t finish();

 private:
  [[noreturn]] void fail(int line, const std::string& what) const;
  void lay_out_parameters();
  void lay_out_variables();
  int64_t place_shared(const Variable& v);
  void initialise(const Variable& v, int64_t at);
  uint32_t place_constant(Type type);

  const Text& text_;
  const Function& kernel_;
  Program& out_;
  std::map<std::string, int64_t> variables_;
  std::map<const Variable*, int64_t> shared_;
  std::map<std::pair<int, uint64_t>, uint32_t> constants_;
  uint32_t registers_bytes_ = 0;
};

// The bits of a constant as an operand of this type.
uint64_t bits_of(const Written& w, Type type);

}  // namespace ptx
