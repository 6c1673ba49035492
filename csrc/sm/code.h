// What the machine is given: the timing of each instruction, and what each warp executed.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace sm {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 4;
constexpr int kNoScoreboard = 7;

// What an instruction does to the machine, beyond holding a pipe.
enum class Action : uint8_t {
  kPlain,           // result after a fixed time: the compiler's stall counts order what reads it
  kVariable,        // result after `latency`, announced by a scoreboard
  kBranch,          // may go elsewhere: then the next instruction has to be fetched
  kLoad,            // global or local memory to registers
  kStore,           // registers to global or local memory
  kAtomic,          // at L2, with or without a result
  kCopy,            // cp.async: global to shared memory
  kCopyGroup,       // LDGDEPBAR: a scoreboard for the copies so far
  kCopyArrive,      // an arrival at an mbarrier when the copies so far have come
  kScoreboardWait,  // DEPBAR: until at most `immediate` of a scoreboard's entries are open
  kShared,          // shared memory, by wavefronts
  kBarrier,         // BAR.SYNC
  kBarrierArrive,   // BAR.ARV
  kPhaseInit,       // an mbarrier
  kPhaseArrive,
  kPhaseWait,
  kBulkLoad,  // TMA
  kBulkStore,
  kBulkCommit,
  kProduct,      // HGMMA
  kGroupArrive,  // WARPGROUP.ARRIVE: the four warps of a group go on together
  kGroupWait,    // WARPGROUP.DEPBAR: until at most `immediate` committed groups of products are open
  kFence,        // until the warp's earlier stores are where others see them
  kExit,
  kCount,
};

// By scheduler, except for those of the whole SM.
enum class Pipe : uint8_t {
  kNone,
  kAlu,
  kFma,
  kFmaHeavy,
  kHalf,
  kSpecial,
  kDouble,
  kUniform,
  kBranch,
  kTensor,
  kQueue,
  kCount
};

// Why a warp does not issue.
enum class Reason : uint8_t {
  kIssue,      // it does
  kFixed,      // the stall count of the instruction before: a result of fixed latency, or its pipe's rate
  kBranch,     // fetches after a taken branch
  kOther,      // ready, but another warp was chosen
  kPipe,       // its pipe is busy
  kRegisters,  // the register file's ports are
  kQueue,      // the queue to memory, shared memory and special functions is full
  kSpecial,    // a result of variable latency from a special unit, a shuffle or a constant
  kShared,     // a result from shared memory
  kL1,         // data from the L1 cache
  kL2,         // data from L2
  kDram,       // data from DRAM
  kCopies,     // cp.async or TMA: data that is on its way to shared memory
  kBarrier,    // other warps at a barrier
  kPhase,      // an mbarrier's phase
  kTensor,     // products of the tensor cores
  kFence,
  kCount,
};

struct Row {
  uint8_t action, pipe, stall, yields, write, read, wait, commits;
  uint8_t bypass;     // of a load: L1 holds no copy of it
  uint8_t even, odd;  // operands from the two register banks
  uint8_t registers;  // of a load: how many it fills; of HGMMA: 1 if the operand A comes from registers
  int32_t immediate, scoreboard;
  float interval;  // cycles for which the pipe takes no other
  float latency;   // until the result
  float release;   // until the operands have been read
  float tensor;    // HGMMA: cycles of the tensor cores
  float operands;  // HGMMA: wavefronts of shared memory
};

struct Step {
  uint32_t instruction, lanes;
};

struct Event {
  uint64_t address;
  int64_t value;
  uint32_t step, bytes, first, sectors, wavefronts, least;
};

struct WarpTrace {
  const Step* steps = nullptr;
  const Event* events = nullptr;
  size_t count = 0, event_count = 0;
};

struct BlockTrace {
  int round = 0;  // how many blocks of its SM came before it
  int64_t index = 0;
  std::vector<WarpTrace> warps;
};

using Constants = std::map<std::string, double>;

}  // namespace sm
