// PTX as written: what the parser makes of the text, before any opcode is understood.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

namespace ptx {

// Text that this machine does not accept: malformed, of another version, or not understood.
struct Error : std::runtime_error {
  Error(std::string kernel, int line, const std::string& what);
  std::string kernel;
  int line;
};

// One operand of an instruction as written.
struct Written {
  enum Kind {
    kName,     // a register, symbol, label or function
    kInteger,  // value
    kFloat,    // number, whose bits as double are in `value`; 0f and 0d literals are exact
    kVector,   // {parts}
    kMemory,   // [parts[0] + value, parts[1]...]
    kPair,     // parts[0] | parts[1]
    kList,     // (parts): the arguments of a call
  };
  Kind kind = kName;
  std::string name;
  int64_t value = 0;
  bool single = false;   // a float that was written as 0f: `value` holds the 32 bits
  bool negated = false;  // !name
  std::vector<Written> parts;
};

// A place in a source file, from the last .loc, and the place that its function was inlined at.
struct Source {
  int file = 0, line = 0;
  int inlined_file = 0, inlined_line = 0;
};

struct Statement {
  int line = 0;
  int scope = 0;
  int source = 0;     // index into Text::sources
  std::string label;  // a label ends here; the rest is empty
  std::string opcode;
  std::string guard;  // the predicate's name, or empty
  bool guard_negated = false;
  std::vector<Written> operands;
};

// A declared register, variable, or parameter.
struct Variable {
  std::string name;
  std::string space;  // "reg", "shared", "global", "const", "local", "param"
  Type type = Type::kNone;
  int64_t bytes = 0;  // of a variable or parameter; -1: an extern array without a size
  int align = 0;
  int vector = 1;                // elements of a .v2 or .v4 register
  int64_t count = -1;            // %r<count>, or -1 for one register of this name
  std::vector<Written> initial;  // of a .global or .const variable
};

struct Scope {
  int parent = -1;
  std::map<std::string, Variable> variables;
  std::map<std::string, int> labels;  // to the number of their statement
};

// A kernel or function: its statements in order, and its scopes, the first of which is its body.
struct Function {
  std::string name;
  bool entry = false;
  bool defined = false;
  int line = 0;
  std::vector<Variable> parameters, results;
  int maximum_threads[3] = {0, 0, 0};   // .maxntid
  int required_threads[3] = {0, 0, 0};  // .reqntid
  int required_cluster[3] = {0, 0, 0};  // .reqnctapercluster
  std::vector<Scope> scopes;
  std::vector<Statement> statements;
  std::map<std::string, std::vector<std::string>> branch_targets;  // .branchtargets lists by label
};

struct Text {
  std::string name;
  int version = 0;     // 88 is 8.8
  std::string target;  // "sm_90a"
  std::map<int, std::string> files;
  std::vector<Source> sources;
  std::map<std::string, Variable> variables;  // of the module
  std::map<std::string, Function> functions;
};

Text parse(const std::string& text, const std::string& name);

}  // namespace ptx
