#include "footprint.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sm {

namespace {

size_t hash(uint64_t sector) {
  uint64_t x = sector * 0x9E3779B97F4A7C15ull;
  return static_cast<size_t>(x ^ x >> 29);
}

}  // namespace

void Footprint::widen() {
  std::vector<Entry> old(std::max<size_t>(1 << 12, table_.size() * 2));
  old.swap(table_);
  for (const Entry& e : old) {
    if (e.sector == ~uint64_t{0}) continue;
    slot(e.sector) = e;
  }
}

Footprint::Entry& Footprint::slot(uint64_t sector) {
  size_t mask = table_.size() - 1, i = hash(sector) & mask;
  while (table_[i].sector != ~uint64_t{0} && table_[i].sector != sector) i = (i + 1) & mask;
  return table_[i];
}

const Footprint::Entry* Footprint::look(uint64_t sector) const {
  if (table_.empty()) return nullptr;
  size_t mask = table_.size() - 1, i = hash(sector) & mask;
  while (table_[i].sector != ~uint64_t{0} && table_[i].sector != sector) i = (i + 1) & mask;
  return table_[i].sector == sector ? &table_[i] : nullptr;
}

void Footprint::add(int round, int64_t block, const uint64_t* sectors, size_t count) {
  if (round < 0 || round >= kRounds || round + 1 < static_cast<int>(fresh_.size())) {
    throw std::invalid_argument("expected rounds from 0 to " + std::to_string(kRounds - 1) +
                                " in ascending order, got " + std::to_string(round) + " after " +
                                std::to_string(fresh_.size()) + " rounds");
  }
  fresh_.resize(round + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    if (2 * (size_ + 1) > table_.size()) widen();
    Entry& e = slot(sectors[i]);
    if (e.sector == ~uint64_t{0}) {
      e.sector = sectors[i];
      e.first = static_cast<uint16_t>(round);
      ++size_;
      fresh_[round] += 32;
    }
    e.rounds |= uint64_t{1} << round;
    if (e.last != block) {
      e.last = block;
      if (e.first == round) ++e.sharers;
    }
  }
}

Footprint::Served Footprint::find(uint64_t sector, int round, double l2_bytes) const {
  Served out;
  const Entry* e = look(sector);
  if (!e) return out;
  out.known = true;
  out.share = e->sharers;
  uint64_t before = e->rounds & ((uint64_t{1} << round) - 1);
  if (before) {
    int last = 63 - __builtin_clzll(before);
    double between = 0;
    for (int r = last + 1; r <= round; ++r) between += fresh_[r];
    out.dram = between > l2_bytes;
  } else {
    for (auto [first, past] : resident_) {
      if (sector >= first && sector < past) out.dram = false;
    }
  }
  return out;
}

}  // namespace sm
