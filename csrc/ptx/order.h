// Which accesses to global memory are ordered: between the warps of a block, and between blocks.
//
// The last write and the last reads of each byte are kept, as the block, the warp and the warp's time of them. A
// conflict (the same bytes, one of the two a write) needs an order:
//
//   in a block       by barriers, as in shared memory: the warps' clocks have a component for each warp's accesses to
//                    global memory (shared.h)
//   between blocks   by a release and an acquire, of any address: block 1 stores, and adds to a counter with release;
//                    block 2 adds with acquire, sees that, and loads. A fence of the GPU's scope before a relaxed
//                    update makes a release of it, a fence after one an acquire. Updates by others in between pass on
//                    what was released. A barrier hands on what its warps have acquired
//
// Blocks run one after another here, and that orders nothing. So a race is found whichever block came first, unless the
// later one has seen a release of the earlier one by chance, as with a counter that all blocks look at first.
//
// No findings:
//
//   two writes of equal bytes, which compilers let the threads do that hold one value
//   two accesses that are both strong (atomic, volatile, relaxed, ...), with a scope that holds both
//   a value that is loaded while another warp of the block stores there, if it is not used. Where warps hold copies of
//   a value, compilers let all of them load it and one of them store what it becomes. So such a load gives an undefined
//   value, which is reported where it matters. And a warp may store where it has loaded by the same instruction as the
//   one whose load its store races with
//
// The lanes of a warp count as one.
//
// Bytes that are accessed together share a cell: an allocation begins with cells of 16 bytes, and has smaller ones from
// its first access on that is narrower. A cell keeps the reads of a block's warps by the last two instructions, the
// last one in full. So of several reads that a write races with, one can be forgotten.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

struct Allocation;
struct Instruction;
struct Warp;

// What a memory instruction promises, from its modifiers.
enum Ordering : uint8_t {
  kStrong = 1,
  kAcquire = 2,
  kRelease = 4,
  kAllBlocks = 8,     // its scope holds other blocks
  kNonCoherent = 16,  // ld.global.nc
  kBlind = 32,        // red: an update that does not return what was there
};

enum class Use { kRead, kWrite, kUpdate };

// Who accessed a cell, when, and by which instruction: 0 is nobody. From the lowest bit on: 16 bits of the
// instruction's number, the two of Ordering that matter later, 18 of the warp's time, 5 of the warp, 22 of the block.
using Access = uint64_t;
constexpr int kWarpShift = 36;

struct Cell {
  Access write, update;  // the last writes that are not strong, and that are, since the last one that is not
  // Since the last write that is not strong: the last read, and the last before it by another instruction or block; and
  // by which warps of its block each instruction reads.
  Access read, other;
  uint32_t readers, others;
};

// The cells of an allocation. None before its first access in a launch.
struct Cells {
  struct Free {
    void operator()(void* memory) const {
      std::free(memory);
    }
  };
  int shift = 4;  // a cell has 1 << shift bytes
  std::unique_ptr<Cell[], Free> at;
};

class GlobalOrder {
 public:
  void start_block(uint32_t number, int warps);

  // An access of `bytes` by each of the lanes; `data`, of a store, points to what each lane stores. It has not been
  // written yet. `undefined`, if given, is for the lanes that load what another warp of the block stores.
  void access(Warp& w, const Instruction& i, const uint64_t* address, uint32_t lanes, int bytes, Use use,
              const uint8_t* data, uint32_t* undefined);
  // The first load whose value became undefined, in words, to be added to what became of it; or "".
  const std::string& undefined_load() const {
    return undefined_load_;
  }
  // The access of a bulk copy, on behalf of a lane.
  void row(Warp& w, const Instruction& i, int lane, Allocation& a, uint64_t address, uint64_t bytes,
           const uint8_t* written);
  // A fence whose scope holds other blocks.
  void fence(Warp& w);

 private:
  // What a warp had done or knew of when it released: a clock of its block's warps, and the block's acquisitions.
  struct Release {
    uint32_t block, first_acquisition, end_acquisition, clock;  // clock: place in clocks_
    bool all_blocks;
  };
  // A word that was released at. Its releases from `first` on are seen by who reads it now.
  struct Word {
    uint32_t first = 0;
    std::vector<uint32_t> releases;
  };
  // A warp has read a word and seen these of its releases. A relaxed read waits for a fence.
  struct Acquisition {
    uint32_t word, first, end;
    uint32_t time;
    uint8_t warp;
    bool relaxed;
    uint32_t taken = 0;  // by warp: merged into what it knows, or, if relaxed, made an acquisition of its own
  };
  // What a warp knows of other blocks.
  struct Known {
    std::unordered_map<uint32_t, uint32_t> blocks;  // to the place of their clocks
    std::vector<uint32_t> clocks;
    std::unordered_map<uint32_t, std::pair<uint32_t, uint32_t>> seen;  // of words
    uint32_t last_block = ~0u, last_clock = 0;
  };

  // An instruction of a warp, as one access after another is checked.
  struct Checked {
    Warp& w;
    const Instruction& i;
    Use use;
    Access me;
    uint32_t* undefined = nullptr;
    bool told = false;  // a race was found
  };
  Checked checked(Warp& w, const Instruction& i, Use use) const;
  void touch(Checked& c, int lane, Allocation& a, uint64_t address, uint64_t bytes, const uint8_t* data);
  void read(Checked& c, int lane, const Allocation& a, uint64_t address, Cell& cell);
  void write(Checked& c, int lane, const Allocation& a, uint64_t address, Cell& cell, int bytes, const uint8_t* data);
  bool races(const Checked& c, Access other);
  bool conflicts(const Checked& c, Access other) {
    return other != 0 && ((other ^ c.me) >> kWarpShift) != 0 && races(c, other);
  }
  bool conflicts(const Checked& c, Access read, uint32_t readers) {
    return conflicts(c, read) && !copied(c, read, readers);
  }
  static bool copied(const Checked& c, Access read, uint32_t readers);
  void report(Checked& c, int lane, const Allocation& a, uint64_t address, Access other, const char* did);
  std::string text(const Checked& c, const Allocation& a, uint64_t address, Access other, const char* did) const;

  // Whether the warp knows of what another block's warp did at a time.
  bool known(const Warp& w, uint32_t block, uint32_t warp, uint32_t time);
  bool find(Known& mine, uint32_t block, uint32_t warp, uint32_t time) const;
  void take(Known& mine, uint32_t acquisition);

  void synchronise(Warp& w, const Instruction& i, const uint64_t* address, uint32_t lanes, Use use);
  void observe(Warp& w, uint32_t word, bool relaxed, bool all_blocks);
  void acquire(Warp& w, uint32_t word, uint32_t first, uint32_t end, bool all_blocks);
  uint32_t release(const Warp& w, int component, bool all_blocks);
  bool is_after(const Warp& w, const Acquisition& a) const;

  std::string undefined_load_;
  uint32_t block_ = 0;
  int warps_ = 0;
  bool fenced_ = false;  // in this block
  std::vector<Release> releases_;
  std::vector<uint32_t> clocks_;
  std::vector<Word> words_;
  std::unordered_map<uint64_t, uint32_t> word_at_;
  std::vector<Acquisition> acquisitions_;  // block after block
  uint32_t first_acquisition_ = 0;         // of this block
  std::vector<Known> known_;               // by warp
  std::vector<uint32_t> open_;             // of take()
};

}  // namespace ptx
