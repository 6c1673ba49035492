// Which global memory a launch may use, what of it was written, and the sectors that it moves.

#include "global.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "types.h"

namespace ptx {

void GlobalMemory::add(uint64_t address, uint64_t bytes, std::string name, bool written, bool writable, uint64_t host) {
  if (bytes == 0) return;
  auto at = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                             [](uint64_t value, const Allocation& a) { return value < a.address; });
  const bool before = at != allocations_.begin() && std::prev(at)->address + std::prev(at)->bytes > address;
  const bool after = at != allocations_.end() && address + bytes > at->address;
  if (before || after)
    throw std::invalid_argument("allocation " + name + " overlaps " + (before ? std::prev(at)->name : at->name));
  Allocation a;
  a.address = address;
  a.bytes = bytes;
  a.host = host;
  const int same = ++names_[name];
  a.name = same == 1 ? std::move(name) : name + " #" + std::to_string(same);
  a.writable = writable;
  if (!written) a.written.assign(bytes, 0);
  a.touched.assign((address + bytes - 1) / kSector - address / kSector + 1, 0);
  allocations_.insert(at, std::move(a));
  last_ = nullptr;
}

void GlobalMemory::remove(uint64_t address) {
  allocations_.erase(std::remove_if(allocations_.begin(), allocations_.end(),
                                    [&](const Allocation& a) { return a.address == address; }),
                     allocations_.end());
  last_ = nullptr;
}

Allocation* GlobalMemory::search(uint64_t address, uint64_t bytes) {
  const auto after = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                                      [](uint64_t value, const Allocation& a) { return value < a.address; });
  if (after == allocations_.begin()) return nullptr;
  Allocation& a = *std::prev(after);
  if (address + bytes > a.address + a.bytes) return nullptr;
  last_ = &a;
  return last_;
}

std::string GlobalMemory::refused(uint64_t address, int bytes, bool write, bool also_read) {
  const Allocation* a = find(address, bytes);
  const std::string access = std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes";
  if (a == nullptr) {
    std::string text = access + " of global memory outside of every allocation";
    constexpr int64_t kNear = 1 << 16;
    for (const Allocation& near : allocations_) {
      const auto offset = static_cast<int64_t>(address - near.address);
      if (offset > -kNear && offset < static_cast<int64_t>(near.bytes) + kNear)
        text +=
            "; at byte " + std::to_string(offset) + " of " + near.name + ", which has " + std::to_string(near.bytes);
    }
    return text;
  }
  const std::string place = " at byte " + std::to_string(address - a->address) + " of " + a->name;
  if (address % bytes != 0) return access + place + ", which is not aligned to them";
  if (write && !a->writable) return access + place + ", which may only be read";
  if ((!write || also_read) && !is_written(*a, address, bytes)) return access + place + ", which nobody has written";
  return "";
}

namespace {

// `bytes` flags from `first` on, at most 8 at a time: whether all are 1.
bool all_set(const uint8_t* first, uint64_t bytes) {
  constexpr uint64_t kEach = 0x0101010101010101;
  for (; bytes >= 8; bytes -= 8, first += 8) {
    uint64_t flags;
    std::memcpy(&flags, first, 8);
    if (flags != kEach) return false;
  }
  return std::all_of(first, first + bytes, [](uint8_t w) { return w != 0; });
}

}  // namespace

bool GlobalMemory::is_written(const Allocation& a, uint64_t address, uint64_t bytes) {
  return a.written.empty() || all_set(a.written.data() + (address - a.address), bytes);
}

void GlobalMemory::mark_written(Allocation& a, uint64_t address, uint64_t bytes) {
  if (!a.written.empty()) std::memset(a.written.data() + (address - a.address), 1, bytes);
}

int GlobalMemory::count(const uint64_t* address, uint32_t lanes, int bytes, bool write) {
  std::array<uint64_t, 2 * kWarp> sectors;
  uint64_t highest = 0;  // of them; one above is new, as most are
  int n = 0;
  Allocation* a = nullptr;
  int64_t moved = 0, found = 0, unique = 0;  // in `a`
  const uint8_t bit = write ? 2 : 1;
  const auto add = [&] {
    if (a == nullptr) return;
    (write ? a->bytes_written : a->bytes_read) += moved;
    (write ? a->sectors_written : a->sectors_read) += found;
    (write ? a->unique_sectors_written : a->unique_sectors_read) += unique;
    moved = found = unique = 0;
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if (a == nullptr || address[lane] - a->address >= a->bytes) {
      add();
      a = find(address[lane], bytes);
      if (a == nullptr) continue;
    }
    moved += bytes;
    for (uint64_t sector = address[lane] / kSector; sector * kSector < address[lane] + bytes; ++sector) {
      if (n > 0 && sector <= highest &&
          (sectors[n - 1] == sector || std::find(sectors.begin(), sectors.begin() + n, sector) != sectors.begin() + n))
        continue;
      sectors[n++] = sector;
      highest = std::max(highest, sector);
      uint8_t& touched = a->touched[sector - a->address / kSector];
      found += 1;
      unique += !(touched & bit);
      touched |= bit;
    }
  }
  add();
  return n;
}

void GlobalMemory::start_launch() {
  for (Allocation& a : allocations_) {
    std::fill(a.touched.begin(), a.touched.end(), 0);
    a.sectors_read = a.sectors_written = a.bytes_read = a.bytes_written = 0;
    a.unique_sectors_read = a.unique_sectors_written = 0;
    a.cells = {};
  }
}

}  // namespace ptx
