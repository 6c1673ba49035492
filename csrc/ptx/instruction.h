// PTX as executed: instructions with their operands resolved to places in a warp's register file.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "syntax.h"
#include "types.h"

namespace ptx {

struct Instruction;
struct Warp;

// Executes an instruction for the lanes of `warp.active`.
using Run = void (*)(Warp& warp, const Instruction& i);

// The number that all constants and special registers have: they are always defined.
constexpr int32_t kConstantRegister = 0;

// A place in the register file. Constants and special registers have places too, so an operand that is read always has
// lanes. For an operand [a + 16], the place of `a`, and 16 in `plus`. An operand that must be a constant: only `plus`.
struct Slot {
  uint32_t at = 0;
  int32_t reg = kConstantRegister;  // number of the register, whose written lanes are Warp::written[reg]
  int64_t plus = 0;
  Type type = Type::kNone;  // of the register
  bool negated = false;     // !p
  bool absent = false;      // an optional operand that was left out, or the sink `_`
};

// The slots of one operand: several for a vector, and for a tensor's coordinates within [].
struct Part {
  uint16_t first = 0, count = 0;
};

constexpr int kMaxParts = 8;

struct Instruction {
  Run run = nullptr;
  const Slot* slot = nullptr;  // of all operands, one after another
  Part part[kMaxParts];        // by operand
  uint8_t parts = 0;
  bool guarded = false, guard_negated = false;
  bool collective = false;  // lanes wait here for each other: .sync, .aligned, bar
  uint32_t guard_at = 0;
  int32_t guard_reg = -1;
  Type type = Type::kNone, other_type = Type::kNone;  // as the family sets them
  uint32_t flags = 0;                                 // as the family defines them
  int64_t number = 0;                                 // likewise
  int32_t target = -1;                                // of a branch: the instruction's number
  int32_t meet = -1;                                  // of a branch: where lanes that part here meet again
  std::vector<int32_t> targets;                       // of brx.idx
  int32_t line = 0, source = 0, opcode = 0;
  uint8_t order = 0;  // of an access to memory: what Ordering says

  const Slot& at(int operand, int element = 0) const {
    return slot[part[operand].first + element];
  }
};

// What an operand must be, in the order in which PTX writes them.
struct Want {
  enum Kind {
    kRead,       // a register or a constant
    kWrite,      // a register, or `_`
    kMemory,     // [address], [address, {coordinates}], [address, mask]
    kConstant,   // an integer known when the text is read; it is put into `plus`
    kLabel,      // of a branch
    kReadMany,   // a vector, or one register
    kWriteMany,  // likewise
    kPair,       // p, or p|q: two slots, the second absent if it was not written
  };
  Kind kind = kRead;
  Type type = Type::kNone;  // kNone: any register; a constant then has 64 bits
  bool optional = false;    // may be left out, together with all that follow
  bool any_width = false;   // the register may be wider than `type`, as for ld, st and cvt
  bool split = false;       // the elements of a vector share the bits of `type`, as for mov
  uint16_t count = 0;       // elements that a vector, or what is in [], must have; 0: any number
};

// How an opcode is executed. `run` is null if the opcode is not understood.
struct Form {
  Run run = nullptr;
  Run plain = nullptr;  // in place of `run` if no operand is a vector
  Run exact = nullptr;  // in place of `run` if every register is as wide as its type
  std::vector<Want> wants;
  Type type = Type::kNone, other_type = Type::kNone;
  uint32_t flags = 0;
  int64_t number = 0;
  uint8_t order = 0;
};

// The modifiers of an opcode, taken one by one. An opcode with modifiers left over is not understood.
class Modifiers {
 public:
  explicit Modifiers(const std::string& opcode);
  const std::string& name() const {
    return words_[0];
  }
  bool take(const char* word);                                     // takes the word wherever it stands
  const char* take_one(std::initializer_list<const char*> words);  // the one that was there, or ""
  Type take_type();                                                // takes the first word that names a type, or kNone
  bool empty() const;
  // All words; words_[0] is the name, and those taken are empty.
  const std::vector<std::string>& left() const {
    return words_;
  }

 private:
  std::vector<std::string> words_;
};

using Family = Form (*)(Modifiers& m);

// The family of an opcode by its first word, or null. families.cpp has the table.
Family family_named(const std::string& word);

struct Parameter {
  std::string name;
  Type type;
  int bytes, align, offset;
};

// A kernel ready to run.
struct Program {
  std::string name;
  std::string module;
  std::vector<Instruction> instructions;  // ends with an exit
  std::vector<Slot> slots;
  std::vector<std::string> opcodes;    // by Instruction::opcode
  std::vector<std::string> registers;  // their names by number, for reports
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  uint32_t file_bytes = 0;              // of a warp's registers
  std::vector<uint8_t> initial;         // the beginning of them: constants, and special registers
  std::map<std::string, Slot> special;  // the special registers that are read, by name
  int64_t static_shared = 0;
  int shared_align = 1;
  int64_t local_bytes = 0;          // of a lane
  std::vector<uint64_t> variables;  // memory of .global and .const variables
  int64_t variable_bytes = 0;
  int maximum_threads[3] = {0, 0, 0}, required_threads[3] = {0, 0, 0};
  const Text* text = nullptr;

  // "conv_fwd.py:254", or "" if the compiler did not say.
  std::string source(const Instruction& i) const;
};

// Resolves the operands of a kernel. Throws Error with the line of what it does not understand.
Program decode(const Text& text, const Function& kernel);

// What decode.cpp adds itself: a jump, and the end of a kernel or function.
void run_branch(Warp& warp, const Instruction& i);
void run_exit(Warp& warp, const Instruction& i);

// Sets Instruction::meet of every branch.
void find_meeting_points(std::vector<Instruction>& instructions);

}  // namespace ptx
