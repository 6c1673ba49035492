// One SM that runs its blocks of a launch, cycle by cycle: four schedulers that issue in order by the control words.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "code.h"
#include "memory.h"

namespace sm {

constexpr int kReasons = static_cast<int>(Reason::kCount);
constexpr int kPipes = static_cast<int>(Pipe::kCount);
constexpr int kSchedulers = 4;

// A part of a warp's time in the timeline.
struct Segment {
  int64_t start, end;
  int32_t warp, instruction, reason, unused;
};

struct LaunchShape {
  int resident = 1;        // blocks that an SM holds at once
  double active = 1;       // SMs that have blocks
  double active_last = 1;  // of them, those that have one in the last round
  double first_block = 0;  // cycles from the start to this SM's first block, and between its first blocks
  double between_blocks = 0;
  int watched = -1;  // the block whose timeline is kept
};

struct Result {
  int64_t cycles = 0, drained = 0;
  std::vector<int64_t> starts, ends;  // of each block
  std::array<int64_t, kReasons> waits{};
  std::vector<std::array<int64_t, kReasons>> by_instruction;
  std::vector<int64_t> executed;
  int64_t issued = 0;
  std::array<double, kPipes> pipes{};  // cycles that the pipes were held
  double tensor = 0, shared = 0, port = 0, outward = 0, dram = 0;
  double dram_read = 0, dram_write = 0, l2_read = 0, l2_write = 0, l1_hit = 0;
  std::vector<Segment> timeline;
};

// What a warp of the machine names where it stands: for errors.
using NameOf = std::string (*)(int instruction);

class Machine {
 public:
  Machine(const Constants& constants, double clock, const std::vector<Row>& rows, const Footprint& footprint,
          const uint64_t* sectors, size_t sector_count, double shared_in_use, double launch_bytes);
  Result run(const std::vector<BlockTrace>& blocks, const LaunchShape& shape);

  // All that a file of constants has to give, and nothing else.
  static const std::vector<std::string>& names();

 private:
  struct Open {
    double time;
    Reason reason;
  };
  struct Warp {
    const WarpTrace* trace = nullptr;
    int block = 0, index = 0, scheduler = 0;
    size_t step = 0, event = 0;
    int64_t ready = 0, since = 0;
    Reason ready_reason = Reason::kFixed;
    Reason reason = Reason::kFixed;  // why it has not issued from `since` on
    bool held = false;               // until another warp, or an mbarrier, lets it go
    bool done = false;
    std::array<std::vector<Open>, 6> open;
    double copies = 0, copies_before = 0;  // when the copies since the last group, and those before, have come
    double stores = 0, bulk_read = 0;
    int products = 0, commits = 0;
  };
  struct Product {
    int arrived = 0;
    double ready = 0, end = kNever;
  };
  struct Group {  // four warps
    std::vector<Product> products;
    std::vector<double> commits;
    std::vector<int> waiting;
    int arrived = 0;
    double arrived_at = 0;
  };
  struct Barrier {
    int arrived = 0;
    double time = 0;
    std::vector<int> waiting;
    int64_t expected = 0;
  };
  struct Phase {
    int64_t count = 0, pending = 0, bytes = 0, phase = 0;
    double latest = 0, completed = 0;
    struct Waiter {
      int warp;
      int scoreboard;
    };
    std::vector<Waiter> waiting;
  };
  struct Block {
    std::vector<int> warps;
    std::vector<Group> groups;
    std::map<uint64_t, Barrier> barriers;
    std::map<uint64_t, Phase> phases;
    int alive = 0, position = 0, round = 0;
    int64_t start = 0;
  };

  bool check(int w, int64_t now);  // whether a warp can issue now; sets until_ and the reason if not
  void issue(int w, int64_t now);
  void account(int w, int64_t to, Reason reason);
  void start_block(int64_t now);
  void wake(int w, double time, Reason reason);
  void complete_barrier(Block& block, Barrier& barrier);
  void complete_phase(Block& block, Phase& phase);
  void schedule_product(Block& block, Group& group, Product& product, const Row& row);
  const Event& event(const Warp& warp) const;
  const uint64_t* sectors(const Event& e) const;
  [[noreturn]] void fail(const Warp& warp, const std::string& what) const;

  double constant(const char* name) const {
    return constants_.at(name);
  }

  Constants constants_;
  const std::vector<Row>& rows_;
  const uint64_t* sectors_;
  size_t sector_count_;
  Memory memory_;

  // Constants that the loop reads often.
  double taken_branch_, yield_, overlong_stall_, barrier_release_, phase_arrive_, phase_pass_, phase_release_;
  double product_tail_, product_queue_, product_queue_registers_, read_window_, atomic_extra_, bulk_read_release_;

  std::vector<Warp> warps_;
  std::vector<int64_t> until_;  // by warp: no need to look at it before
  std::array<std::vector<int>, kSchedulers> lists_;
  std::array<int, kSchedulers> greedy_{};
  std::array<std::array<double, kPipes>, kSchedulers> pipe_free_{};
  std::array<double, kSchedulers> lite_free_{};
  std::array<std::array<double, 2>, kSchedulers> bank_free_{};
  double tensor_free_ = 0;
  std::vector<Block> blocks_;
  const std::vector<BlockTrace>* traces_ = nullptr;
  const LaunchShape* shape_ = nullptr;
  size_t next_block_ = 0;
  int resident_ = 0, last_round_ = 0, resident_full_ = 0;
  int64_t dispatch_free_ = 0;
  Result result_;
};

const char* name(Reason reason);
const char* name(Pipe pipe);
const char* name(Action action);

}  // namespace sm
