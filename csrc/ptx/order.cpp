// The rules of order.h.

#include "order.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"

namespace ptx {
namespace {

constexpr int kNumberBits = 16, kStrongShift = 16, kAllBlocksShift = 17, kTimeShift = 18, kBlockShift = 41,
              kLargestShift = 4;
constexpr uint32_t kMostNumber = (1u << kNumberBits) - 1;  // stands for all further instructions
constexpr uint32_t kMostTime = (1u << (kWarpShift - kTimeShift)) - 1;
constexpr Access kStrongBit = Access{1} << kStrongShift, kAllBlocksBit = Access{1} << kAllBlocksShift;
constexpr uint32_t kNone = ~0u;

uint32_t block_of(Access a) {
  return static_cast<uint32_t>(a >> kBlockShift);
}
uint32_t warp_of(Access a) {
  return static_cast<uint32_t>(a >> kWarpShift) % kMaxWarps;
}
uint32_t number_of(Access a) {
  return static_cast<uint32_t>(a) & kMostNumber;
}
uint32_t time_of(Access a) {
  return static_cast<uint32_t>(a >> kTimeShift) & kMostTime;
}
bool same_block(Access a, Access b) {
  return (a ^ b) >> kBlockShift == 0;
}

// Gives an allocation cells of at most 1 << shift bytes; those that it has are divided.
void divide(Allocation& a, int shift) {
  Cells& cells = a.cells;
  const uint64_t first = a.address >> shift, count = ((a.address + a.bytes - 1) >> shift) - first + 1;
  std::unique_ptr<Cell[], Cells::Free> fresh(static_cast<Cell*>(std::calloc(count, sizeof(Cell))));
  if (fresh == nullptr) throw std::bad_alloc();
  if (cells.at != nullptr) {
    const uint64_t before = a.address >> cells.shift;
    for (uint64_t n = 0; n < count; ++n) fresh[n] = cells.at[((first + n) << shift >> cells.shift) - before];
  }
  cells.at = std::move(fresh);
  cells.shift = shift;
}

}  // namespace

void GlobalOrder::start_block(uint32_t number, int warps) {
  block_ = number;
  warps_ = warps;
  fenced_ = false;
  first_acquisition_ = static_cast<uint32_t>(acquisitions_.size());
  known_.clear();
  known_.resize(static_cast<size_t>(warps));
}

// ---- accesses ----

GlobalOrder::Checked GlobalOrder::checked(Warp& w, const Instruction& i, Use use) const {
  const auto number = static_cast<uint64_t>(&i - w.launch->program->instructions.data());
  const uint32_t time = w.block->shared.clock[w.index][kGlobal + w.index];
  const Access me = std::min<uint64_t>(number, kMostNumber) | (i.order & kStrong ? kStrongBit : 0) |
                    (i.order & kAllBlocks ? kAllBlocksBit : 0) | Access{std::min(time, kMostTime)} << kTimeShift |
                    static_cast<Access>(w.index) << kWarpShift | Access{block_} << kBlockShift;
  return {w, i, use, me};
}

void GlobalOrder::access(Warp& w, const Instruction& i, const uint64_t* address, uint32_t lanes, int bytes, Use use,
                         const uint8_t* data, uint32_t* undefined) {
  Checked c = checked(w, i, use);
  c.undefined = undefined;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Allocation* a = w.launch->memory->find(address[lane], bytes);
    if (a != nullptr) touch(c, lane, *a, address[lane], bytes, data == nullptr ? nullptr : data + lane * bytes);
  }
  if (i.order & kStrong) synchronise(w, i, address, lanes, use);
}

void GlobalOrder::row(Warp& w, const Instruction& i, int lane, Allocation& a, uint64_t address, uint64_t bytes,
                      const uint8_t* written) {
  Checked c = checked(w, i, written == nullptr ? Use::kRead : Use::kWrite);
  touch(c, lane, a, address, bytes, written);
}

void GlobalOrder::touch(Checked& c, int lane, Allocation& a, uint64_t address, uint64_t bytes, const uint8_t* data) {
  const int narrow = std::min(__builtin_ctzll(address | bytes), kLargestShift);
  if (a.cells.at == nullptr || narrow < a.cells.shift) divide(a, narrow);
  const int shift = a.cells.shift;
  Cell* cell = &a.cells.at[(address >> shift) - (a.address >> shift)];
  const uint64_t end = address + bytes;
  for (uint64_t at = address; at < end; ++cell, at += uint64_t{1} << shift) {
    if (c.use == Use::kRead) {
      read(c, lane, a, at, *cell);
    } else {
      write(c, lane, a, at, *cell, 1 << shift, data == nullptr ? nullptr : data + (at - address));
    }
  }
}

inline void GlobalOrder::read(Checked& c, int lane, const Allocation& a, uint64_t address, Cell& cell) {
  if ((cell.write | cell.update) != 0) {
    if (conflicts(c, cell.write)) {
      if (c.undefined != nullptr && same_block(cell.write, c.me)) {
        *c.undefined |= 1u << lane;
        if (undefined_load_.empty())
          undefined_load_ = "; line " + std::to_string(c.i.line) + " " + text(c, a, address, cell.write, "wrote");
      } else {
        report(c, lane, a, address, cell.write, "wrote");
      }
    } else if (conflicts(c, cell.update)) {
      report(c, lane, a, address, cell.update, "updated");
    } else if (c.i.order & kNonCoherent && !c.told) {
      c.told = true;
      c.w.finding(c.i, lane,
                  "reads byte " + std::to_string(address - a.address) + " of " + a.name +
                      " by ld.global.nc, and this launch has written it");
    }
  }
  if (cell.read == c.me) return;
  if (!same_block(cell.read, c.me) || number_of(cell.read) != number_of(c.me)) {
    cell.other = cell.read;
    cell.others = cell.readers;
    cell.readers = 0;
  }
  cell.read = c.me;
  cell.readers |= 1u << c.w.index;
}

// Whether the warp itself has read what another warp of its block read, by the same instruction.
bool GlobalOrder::copied(const Checked& c, Access read, uint32_t readers) {
  return same_block(read, c.me) && readers >> c.w.index & 1;
}

void GlobalOrder::write(Checked& c, int lane, const Allocation& a, uint64_t address, Cell& cell, int bytes,
                        const uint8_t* data) {
  if (conflicts(c, cell.update)) {
    report(c, lane, a, address, cell.update, "updated");
  } else {
    const bool wrote = conflicts(c, cell.write);
    const Access other = wrote                                   ? cell.write
                         : conflicts(c, cell.read, cell.readers) ? cell.read
                         : conflicts(c, cell.other, cell.others) ? cell.other
                                                                 : 0;
    if (other != 0) {
      const auto* now = reinterpret_cast<const uint8_t*>(a.host + (address - a.address));
      if (data != nullptr && std::memcmp(now, data, static_cast<size_t>(bytes)) == 0) return;
      report(c, lane, a, address, other, wrote ? "wrote" : "read");
    }
  }
  if (c.me & kStrongBit) {
    cell.update = c.me;
  } else {
    cell = {};
    cell.write = c.me;
  }
}

// Whether nothing orders an access by another warp before this one. Blocks that update the same bytes need a scope that
// holds both: that one block has seen here what the other released may be chance, because they run one after another.
bool GlobalOrder::races(const Checked& c, Access other) {
  const bool near = same_block(other, c.me);
  if (other & c.me & kStrongBit && (near || other & c.me & kAllBlocksBit)) return false;
  if (!near && c.use == Use::kUpdate && other & c.me & kStrongBit) return true;
  if (near) return c.w.block->shared.clock[c.w.index][kGlobal + warp_of(other)] < time_of(other);
  return !known(c.w, block_of(other), warp_of(other), time_of(other));
}

void GlobalOrder::report(Checked& c, int lane, const Allocation& a, uint64_t address, Access other, const char* did) {
  if (c.told) return;
  c.told = true;
  c.w.finding(c.i, lane, text(c, a, address, other, did));
}

std::string GlobalOrder::text(const Checked& c, const Allocation& a, uint64_t address, Access other,
                              const char* did) const {
  const Launch& l = *c.w.launch;
  const uint32_t number = number_of(other), block = block_of(other);
  const std::string line =
      number == kMostNumber ? "" : " at line " + std::to_string(l.program->instructions[number].line);
  const bool near = same_block(other, c.me);
  std::string who = "warp " + std::to_string(warp_of(other));
  if (!near)
    who += " of block (" + std::to_string(block % l.grid[0]) + ", " + std::to_string(block / l.grid[0] % l.grid[1]) +
           ", " + std::to_string(block / l.grid[0] / l.grid[1]) + ")";
  const char* does = c.use == Use::kRead ? "reads" : c.use == Use::kWrite ? "writes" : "updates";
  return std::string(does) + " byte " + std::to_string(address - a.address) + " of " + a.name + ", which " + who + " " +
         did + line + (near ? ", and no barrier orders the two" : ", and no release and acquire order the two");
}

// ---- releases and acquires ----

bool GlobalOrder::is_after(const Warp& w, const Acquisition& a) const {
  return a.warp == w.index || w.block->shared.clock[w.index][kGlobal + a.warp] >= a.time;
}

bool GlobalOrder::known(const Warp& w, uint32_t block, uint32_t warp, uint32_t time) {
  Known& mine = known_[w.index];
  if (find(mine, block, warp, time)) return true;
  const uint32_t bit = 1u << w.index;
  for (auto n = first_acquisition_; n < acquisitions_.size(); ++n) {
    Acquisition& a = acquisitions_[n];
    if (a.relaxed || a.taken & bit || !is_after(w, a)) continue;
    a.taken |= bit;
    take(mine, n);
  }
  return find(mine, block, warp, time);
}

bool GlobalOrder::find(Known& mine, uint32_t block, uint32_t warp, uint32_t time) const {
  if (block != mine.last_block) {
    const auto found = mine.blocks.find(block);
    if (found == mine.blocks.end()) return false;
    mine.last_block = block;
    mine.last_clock = found->second;
  }
  return mine.clocks[mine.last_clock + warp] >= time;
}

// Adds what an acquisition of this block has seen: releases, and what those who released had acquired.
void GlobalOrder::take(Known& mine, uint32_t acquisition) {
  open_.assign(1, acquisition);
  while (!open_.empty()) {
    const Acquisition a = acquisitions_[open_.back()];
    open_.pop_back();
    const Word& word = words_[a.word];
    auto& [first, end] = mine.seen[a.word];
    for (uint32_t n = a.first; n < a.end; ++n) {
      if (n >= first && n < end) {
        n = end - 1;
        continue;
      }
      const Release& r = releases_[word.releases[n]];
      if (!r.all_blocks || r.block == block_) continue;
      const auto [place, fresh] = mine.blocks.try_emplace(r.block, static_cast<uint32_t>(mine.clocks.size()));
      if (fresh) mine.clocks.resize(mine.clocks.size() + warps_);
      for (int warp = 0; warp < warps_; ++warp) {
        uint32_t& time = mine.clocks[place->second + warp];
        time = std::max(time, clocks_[r.clock + warp]);
      }
      for (uint32_t k = r.first_acquisition; k < r.end_acquisition; ++k)
        if (!acquisitions_[k].relaxed && clocks_[r.clock + acquisitions_[k].warp] >= acquisitions_[k].time)
          open_.push_back(k);
    }
    if (a.first > end || a.end < first) {  // of two that do not touch, the later one is kept
      if (a.first > end) first = a.first, end = a.end;
    } else {
      first = std::min(first, a.first);
      end = std::max(end, a.end);
    }
  }
}

void GlobalOrder::synchronise(Warp& w, const Instruction& i, const uint64_t* address, uint32_t lanes, Use use) {
  const bool writes = use != Use::kRead, all_blocks = i.order & kAllBlocks;
  const bool observes = use == Use::kRead || (use == Use::kUpdate && !(i.order & kBlind));
  Clock& mine = w.block->shared.clock[w.index];
  const bool releases = writes && i.order & kRelease;
  const bool publishes =
      releases || (writes && fenced_ &&
                   std::any_of(&mine[kReleased], &mine[kReleased] + warps_, [](uint32_t time) { return time != 0; }));
  if (!publishes && word_at_.empty()) return;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!observes || !(lanes >> lane & 1)) continue;
    if (const auto found = word_at_.find(address[lane]); found != word_at_.end())
      observe(w, found->second, !(i.order & kAcquire), all_blocks);
  }
  if (!writes) return;
  const uint32_t record = publishes ? release(w, releases ? kGlobal : kReleased, all_blocks) : kNone;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto found = word_at_.find(address[lane]);
    if (found == word_at_.end()) {
      if (!publishes) continue;
      found = word_at_.emplace(address[lane], static_cast<uint32_t>(words_.size())).first;
      words_.emplace_back();
    }
    Word& word = words_[found->second];
    if (use == Use::kWrite) word.first = static_cast<uint32_t>(word.releases.size());
    if (publishes && (word.releases.size() == word.first || word.releases.back() != record))
      word.releases.push_back(record);
  }
  if (publishes) mine[kGlobal + w.index] += 1;
}

void GlobalOrder::observe(Warp& w, uint32_t number, bool relaxed, bool all_blocks) {
  const Word& word = words_[number];
  const auto end = static_cast<uint32_t>(word.releases.size());
  if (word.first == end) return;
  if (!relaxed) return acquire(w, number, word.first, end, all_blocks);
  if (!all_blocks) return;
  if (acquisitions_.size() > first_acquisition_) {  // a loop that waits reads the same again and again
    const Acquisition& last = acquisitions_.back();
    if (last.warp == w.index && last.word == number && last.end == end && last.relaxed) return;
  }
  const uint32_t now = w.block->shared.clock[w.index][kGlobal + w.index];
  acquisitions_.push_back({number, word.first, end, now, static_cast<uint8_t>(w.index), true});
}

void GlobalOrder::acquire(Warp& w, uint32_t number, uint32_t first, uint32_t end, bool all_blocks) {
  const Word& word = words_[number];
  Clock& mine = w.block->shared.clock[w.index];
  for (uint32_t n = end; n-- > first;) {  // those of this block are the last
    const Release& r = releases_[word.releases[n]];
    if (r.block != block_) break;
    for (int warp = 0; warp < warps_; ++warp)
      if (warp != w.index) mine[kGlobal + warp] = std::max(mine[kGlobal + warp], clocks_[r.clock + warp]);
  }
  if (!all_blocks) return;
  if (acquisitions_.size() > first_acquisition_) {
    const Acquisition& last = acquisitions_.back();
    if (last.warp == w.index && last.word == number && last.end == end && !last.relaxed) return;
  }
  acquisitions_.push_back({number, first, end, mine[kGlobal + w.index], static_cast<uint8_t>(w.index), false});
}

uint32_t GlobalOrder::release(const Warp& w, int component, bool all_blocks) {
  const Clock& mine = w.block->shared.clock[w.index];
  const auto clock = static_cast<uint32_t>(clocks_.size());
  clocks_.insert(clocks_.end(), &mine[component], &mine[component] + warps_);
  releases_.push_back({block_, first_acquisition_, static_cast<uint32_t>(acquisitions_.size()), clock, all_blocks});
  return static_cast<uint32_t>(releases_.size()) - 1;
}

// What the warp has done or knows of can be released by a relaxed update from now on, and what it knows to have been
// read by one is acquired.
void GlobalOrder::fence(Warp& w) {
  Clock& mine = w.block->shared.clock[w.index];
  fenced_ = true;
  const uint32_t bit = 1u << w.index;
  for (size_t n = first_acquisition_, end = acquisitions_.size(); n < end; ++n) {
    if (!acquisitions_[n].relaxed || acquisitions_[n].taken & bit || !is_after(w, acquisitions_[n])) continue;
    acquisitions_[n].taken |= bit;
    const Acquisition seen = acquisitions_[n];
    acquire(w, seen.word, seen.first, seen.end, true);
  }
  for (int warp = 0; warp < warps_; ++warp)
    mine[kReleased + warp] = std::max(mine[kReleased + warp], mine[kGlobal + warp]);
  mine[kGlobal + w.index] += 1;
}

}  // namespace ptx
