// Global memory: the allocations that a launch may use. A kernel's address of one may differ from where it is on the
// host, so that allocations can lie far apart and an access past the end of one does not land in another.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "order.h"

namespace ptx {

constexpr int kSector = 32;

struct Allocation {
  uint64_t address = 0, bytes = 0;
  uint64_t host = 0;  // where its first byte is
  std::string name;
  bool writable = true;
  std::vector<uint8_t> written;  // by byte; empty: all of them are
  std::vector<uint8_t> touched;  // by sector: 1 read, 2 written
  Cells cells;                   // who accessed what
  int64_t sectors_read = 0, sectors_written = 0, bytes_read = 0, bytes_written = 0;
  int64_t unique_sectors_read = 0, unique_sectors_written = 0;
};

class GlobalMemory {
 public:
  // Throws std::invalid_argument if it overlaps another allocation. The second one of a name gets " #2" behind it, so
  // that reports and counters tell them apart.
  void add(uint64_t address, uint64_t bytes, std::string name, bool written, bool writable, uint64_t host);
  void remove(uint64_t address);
  // The allocation that holds all of these bytes, or null.
  Allocation* find(uint64_t address, uint64_t bytes) {
    if (last_ != nullptr && address >= last_->address && address + bytes <= last_->address + last_->bytes) return last_;
    return search(address, bytes);
  }
  // Where bytes of an allocation are on the host, or null if they are not all in one.
  uint8_t* host(uint64_t address, uint64_t bytes) {
    const Allocation* a = find(address, bytes);
    return a == nullptr ? nullptr : reinterpret_cast<uint8_t*>(a->host + (address - a->address));
  }
  // Why an access of `bytes` at `address` is refused, or "": outside of every allocation, misaligned, not writable,
  // never written.
  std::string refused(uint64_t address, int bytes, bool write, bool also_read = false);
  // Whether bytes were written; marks them as such.
  static bool is_written(const Allocation& a, uint64_t address, uint64_t bytes);
  static void mark_written(Allocation& a, uint64_t address, uint64_t bytes);
  // Counts an instruction of a warp. Returns its sectors.
  int count(const uint64_t* address, uint32_t lanes, int bytes, bool write);
  std::vector<Allocation>& allocations() {
    return allocations_;
  }
  // Forgets what earlier launches counted, and who accessed what: launches are ordered.
  void start_launch();

 private:
  Allocation* search(uint64_t address, uint64_t bytes);
  std::vector<Allocation> allocations_;  // by address
  Allocation* last_ = nullptr;
  std::map<std::string, int> names_;  // how often each was given
};

}  // namespace ptx
