// Values of a warp that executes machine code, and the records of what it executed.
//
// A register holds a number for each of 32 lanes, and which of the numbers are known. What the walker does not execute
// leaves its results unknown. Uniform registers hold the same number in all lanes, so that one function executes an
// instruction of either kind.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace sass {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffff;
constexpr int kRZ = 255, kURZ = 63, kPT = 7;
constexpr uint64_t kParameterWindow = uint64_t{1}
                                      << 56;          // generic addresses of the parameters, as the walker gives them
constexpr uint64_t kLocalWindow = uint64_t{1} << 57;  // sectors of local memory, as records name them

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Vec {
  uint32_t v[kWarp];
  uint32_t known;  // lanes

  static Vec of(uint32_t value) {
    Vec all;
    for (uint32_t& one : all.v) one = value;
    all.known = kAll;
    return all;
  }
};

struct Mask {
  uint32_t v = 0, known = kAll;  // v: lanes where it is true; 0 where it is unknown
};

enum class Kind : uint8_t { kR, kUR, kP, kUP, kB, kImmediate, kConstant, kMemory, kOther };

struct Operand {
  Kind kind = Kind::kOther;
  bool negated = false, absolute = false, inverted = false, wide = false;
  int number = 0;      // register
  int64_t offset = 0;  // of an address or constant
  int bank = 0;
  int base = -1, uniform = -1, descriptor = -1;
  std::string text;
  std::vector<std::string> modifiers;
  Vec value[2];  // of an immediate, or of a constant whose place is fixed: 64 bits

  bool has(const char* modifier) const {
    for (const std::string& one : modifiers)
      if (one == modifier) return true;
    return false;
  }
};

struct Written {
  Kind kind;
  int first, count;
};

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&);

struct Instruction {
  uint32_t address = 0;
  std::string opcode, name, text;
  std::vector<std::string> modifiers;  // those that no decoder has taken
  bool uniform_guard = false, guard_negated = false;
  int guard = -1;  // predicate register, or -1
  std::vector<Operand> operands;
  int results = 0;
  std::vector<Written> writes;
  uint64_t word = 0;  // the lower 64 bits
  Run run = nullptr;
  bool branch = false;     // BRA, which handles an unknown guard itself
  bool strict = false;     // its guard must be known: memory, control, barriers
  int form = 0, size = 0;  // what the decoder noted
  int64_t number = 0;
  bool flag = false, extended = false, is_signed = true;
  int target = -1;                                  // place of a branch's target
  bool slow_if_taken = false, slow_if_not = false;  // that way calls a slow path for unusual numbers
  int64_t executed = 0;

  const Operand& source(int n) const {
    return operands[results + n];
  }
  int sources() const {
    return static_cast<int>(operands.size()) - results;
  }
  bool take(const char* modifier) {
    for (size_t n = 0; n < modifiers.size(); ++n)
      if (modifiers[n] == modifier) {
        modifiers.erase(modifiers.begin() + n);
        return true;
      }
    return false;
  }
};

// ---- memory ----

struct Range {
  uint64_t address = 0, bytes = 0;
  std::string name;
  bool given = false;  // whether its content is
  std::vector<uint8_t> content, unknown;
};

class Memory {
 public:
  void add(uint64_t address, uint64_t bytes, std::string name, bool given, std::string content);
  Range* find(uint64_t address, uint64_t bytes);
  std::string outside(uint64_t address) const;

 private:
  std::vector<Range> ranges_;
  size_t last_ = 0;
};

struct Mbarrier {
  int64_t count = 0, pending = 0, bytes = 0;
  bool phase = false, valid = false;
};

// ---- records ----

struct Step {
  uint32_t instruction, lanes;
};

struct Event {
  uint64_t address;
  int64_t value;
  uint32_t step, bytes, first, sectors, wavefronts, least;
};

struct WarpRecord {
  uint32_t path = 0;
  std::vector<Event> events;
};

struct BlockRecord {
  int64_t index = 0;
  std::vector<WarpRecord> warps;
  std::vector<uint64_t> reads, writes;  // distinct sectors
};

// ---- launch, block, warp ----

struct Launch;

struct Block {
  Launch* launch = nullptr;
  int index[3] = {};
  std::vector<uint8_t> shared, shared_known;
  std::map<uint64_t, Mbarrier> mbarriers;
  struct Named {
    int arrived = 0;
    int64_t threads = 0;  // that it gathers; 0: all of the block
    std::vector<int> waiting;
  };
  std::map<int, Named> barriers;
  BlockRecord record;
};

struct Fragment {
  int at = 0;  // place of its next instruction
  uint32_t lanes = 0;
  enum State : uint8_t { kReady, kConverging, kSynchronising } state = kReady;
  int barrier = -1;         // of kConverging
  uint32_t awaited = kAll;  // of kSynchronising
};

struct Warp {
  Block* block = nullptr;
  Launch* launch = nullptr;
  int number = 0;
  Vec r[256], ur[64];
  uint32_t bits[256][kWarp];  // of each register's lanes that are not known: which bits are not
  Mask p[8], up[8];
  uint32_t b[16] = {};
  uint32_t alive = 0;
  std::vector<Fragment> fragments;
  int fragment = 0;     // the one that runs
  uint32_t active = 0;  // its lanes
  uint32_t exec = 0;    // those of them whose guard is true
  uint32_t maybe = 0;   // those whose guard is unknown
  int next = 0;         // place of the next instruction; a branch changes it
  enum State : uint8_t { kRunning, kBarrier, kWaiting, kDone } state = kRunning;
  bool repeat = false;  // the instruction could not be executed yet: it is not recorded, and tried again
  std::vector<uint8_t> local, local_known;  // by lane
  std::vector<Step> path;
  std::vector<Event> events;

  [[noreturn]] void fail(const Instruction& i, const std::string& what) const;

  const Vec& read(const Instruction& i, const Operand& o, Vec& scratch, int part = 0) const;
  // The same without signs: for operands whose handler negates them itself.
  const Vec& plain(const Instruction& i, const Operand& o, Vec& scratch, int part = 0) const;
  Mask predicate(const Operand& o) const;
  // `unknown`: the bits of its lanes that are not known; all of them where it is null.
  void put(const Operand& o, const Vec& value, int part = 0, const uint32_t* unknown = nullptr);
  // The unknown bits of a lane of `x`, which `o` was read as.
  uint32_t unknown_of(const Operand& o, const Vec& x, int lane) const {
    if (x.known >> lane & 1) return 0;
    return o.kind == Kind::kR && !o.negated && !o.absolute ? bits[o.number][lane] : kAll;
  }
  void put(const Operand& o, Mask value);
  void forget(const Instruction& i, uint32_t lanes);
  uint32_t leader() const;  // the lowest lane that executes

  Event& event(const Instruction& i);
};

struct Launch {
  std::vector<Instruction> code;
  std::map<uint32_t, int> places;  // address -> place in code
  int grid[3] = {1, 1, 1}, threads[3] = {1, 1, 1};
  int64_t shared_bytes = 0, limit = 0;
  std::map<int, std::vector<uint8_t>> constants, constants_known;
  std::vector<uint8_t> parameters;
  Memory memory;
  bool record = true;
  std::function<void()> tick;
  int64_t instructions = 0;
  std::vector<std::vector<Step>> paths;
  std::map<uint64_t, std::vector<uint32_t>> by_hash;
  std::vector<uint64_t> sectors;
  std::vector<BlockRecord> blocks;
  std::map<std::string, int64_t> assumed;  // what was taken for granted, and how often

  int threads_of_block() const {
    return threads[0] * threads[1] * threads[2];
  }
};

void bind(Launch& launch);  // constants of fixed places, handlers, targets
void run(Launch& launch, const std::vector<int64_t>& blocks);
bool constant(const Launch& launch, int bank, int64_t offset, int bytes, uint32_t& value);

// Decoders by opcode without modifiers. False: the instruction is not executed, and its results are unknown.
using Decoder = bool (*)(Instruction&);
const std::map<std::string, Decoder>& integer_decoders();
const std::map<std::string, Decoder>& bit_decoders();
const std::map<std::string, Decoder>& predicate_decoders();
const std::map<std::string, Decoder>& floating_decoders();
const std::map<std::string, Decoder>& lane_decoders();
const std::map<std::string, Decoder>& memory_decoders();
const std::map<std::string, Decoder>& copy_decoders();
const std::map<std::string, Decoder>& flow_decoders();

}  // namespace sass
