// Which global memory a launch may use, what of it was written, and the sectors that it moves.

#include "global.h"

#include <algorithm>
#include <array>
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
  a.name = std::move(name);
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

bool GlobalMemory::is_written(const Allocation& a, uint64_t address, uint64_t bytes) {
  if (a.written.empty()) return true;
  const auto first = a.written.begin() + static_cast<int64_t>(address - a.address);
  return std::all_of(first, first + static_cast<int64_t>(bytes), [](uint8_t w) { return w != 0; });
}

void GlobalMemory::mark_written(Allocation& a, uint64_t address, uint64_t bytes) {
  if (a.written.empty()) return;
  std::fill_n(a.written.begin() + static_cast<int64_t>(address - a.address), bytes, 1);
}

int GlobalMemory::count(const uint64_t* address, uint32_t lanes, int bytes, bool write) {
  std::array<uint64_t, 2 * kWarp> sectors;
  int n = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Allocation* a = find(address[lane], bytes);
    if (a == nullptr) continue;
    (write ? a->bytes_written : a->bytes_read) += bytes;
    for (uint64_t sector = address[lane] / kSector; sector * kSector < address[lane] + bytes; ++sector) {
      if (n > 0 && sectors[n - 1] == sector) continue;
      if (std::find(sectors.begin(), sectors.begin() + n, sector) != sectors.begin() + n) continue;
      sectors[n++] = sector;
      uint8_t& touched = a->touched[sector - a->address / kSector];
      const uint8_t bit = write ? 2 : 1;
      (write ? a->sectors_written : a->sectors_read) += 1;
      (write ? a->unique_sectors_written : a->unique_sectors_read) += !(touched & bit);
      touched |= bit;
    }
  }
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
