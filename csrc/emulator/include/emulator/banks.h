// What one access of a warp costs: wavefronts of shared memory's banks, and sectors of global memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace emulator {

constexpr int kBanks = 32, kWord = 4, kSector = 32;

// Cycles of the 32 banks, and what they would be without a bank conflict.
struct Wavefronts {
  int units = 0, least = 0;
};

// Lanes `first` to `end`, whose accesses are served together: as often as the bank with the most words.
inline int rounds(const uint64_t* address, uint32_t active, int bytes, int first, int end) {
  std::array<std::array<uint64_t, 32>, kBanks> words;
  std::array<int, kBanks> filled{};
  int most = 0;
  for (int lane = first; lane < end; ++lane) {
    if (!(active >> lane & 1)) continue;
    for (uint64_t word = address[lane] / kWord; word * kWord < address[lane] + bytes; ++word) {
      auto& bank = words[word % kBanks];
      int& n = filled[word % kBanks];
      if (std::find(bank.begin(), bank.begin() + n, word) == bank.begin() + n) bank[n++] = word;
      most = std::max(most, n);
    }
  }
  return most;
}

// Of lanes that access `bytes` (at most 16) at `address`, where `active` has a bit for each. The banks serve as many
// lanes together as ask for 128 bytes, and one word of a bank for any number of lanes at once. Aligned accesses of
// `together` lanes each fill one of as many places in the banks, so that different places, or the same address, are
// enough to see that there is no conflict.
inline Wavefronts wavefronts(const uint64_t* address, uint32_t active, int bytes) {
  constexpr int kLanes = 32;
  const int together = bytes == 16 ? 8 : bytes == 8 ? 16 : kLanes, log_bytes = bytes == 16 ? 4 : bytes == 8 ? 3 : 2;
  Wavefronts sum;
  for (int first = 0; first < kLanes; first += together) {
    std::array<uint64_t, kLanes> at;  // by place: the access that fills it
    uint32_t filled = 0;
    bool apart = true;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(active >> lane & 1)) continue;
      const uint64_t access = address[lane] >> log_bytes;
      const auto place = static_cast<uint32_t>(access) & static_cast<uint32_t>(together - 1);
      apart &=
          (address[lane] & static_cast<uint64_t>(bytes - 1)) == 0 && (!(filled >> place & 1) || at[place] == access);
      at[place] = access;
      filled |= 1u << place;
    }
    if (filled == 0) continue;
    sum.units += apart ? 1 : rounds(address, active, bytes, first, first + together);
    sum.least += 1;
  }
  return sum;
}

// The distinct sectors of an access, in the order of lanes. An aligned access of at most 32 bytes lies in one.
struct Sectors {
  std::array<uint64_t, 32> sector;  // address / kSector
  std::array<int, 32> lane;         // the first that asks for it
  int count = 0;
};

inline Sectors sectors(const uint64_t* address, uint32_t active) {
  Sectors all;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(active >> lane & 1)) continue;
    const uint64_t sector = address[lane] / kSector;
    bool known = false;
    for (int i = all.count - 1; i >= 0 && !known; --i) known = all.sector[i] == sector;
    if (known) continue;
    all.sector[all.count] = sector;
    all.lane[all.count++] = lane;
  }
  return all;
}

}  // namespace emulator
