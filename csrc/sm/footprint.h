// Which sectors of global memory a launch touches, in which round, and from how many blocks of that round.
//
// One SM is simulated. What the others do to its loads is this: a sector that a block of an earlier round has read is
// in L2; one that several blocks of this round read comes from DRAM once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace sm {

class Footprint {
 public:
  static constexpr int kRounds = 64;

  // Notes the sectors (32 bytes; address >> 5) that block `block` of round `round` touches. By ascending round.
  void add(int round, int64_t block, const uint64_t* sectors, size_t count);

  // Notes that the sectors [first, last) are in L2 before the launch.
  void add_resident(uint64_t first, uint64_t last) {
    resident_.emplace_back(first, last);
  }

  struct Served {
    bool dram = true;
    float share = 1;  // blocks among which one transfer from DRAM is divided
    bool known = false;
  };
  Served find(uint64_t sector, int round, double l2_bytes) const;

  size_t sectors() const {
    return size_;
  }
  int rounds() const {
    return static_cast<int>(fresh_.size());
  }

 private:
  struct Entry {
    uint64_t sector = ~uint64_t{0};
    uint64_t rounds = 0;
    int64_t last = -1;     // block
    uint16_t first = 0;    // round
    uint16_t sharers = 0;  // blocks of that round
  };
  Entry& slot(uint64_t sector);
  const Entry* look(uint64_t sector) const;
  void widen();

  std::vector<Entry> table_;
  size_t size_ = 0;
  std::vector<double> fresh_;  // bytes that each round touched first
  std::vector<std::pair<uint64_t, uint64_t>> resident_;
};

}  // namespace sm
