// The emulator's counters. state.h has the shared state, runtime.h lists what is checked and counted.

#include "state.h"

#include <algorithm>
#include <utility>

namespace emulator {
namespace {

void count_global(SiteCount& site, const Gathered& g, Kind kind) {
  const bool write = kind == Kind::kGlobalWrite;
  const Sectors all = sectors(g.address.data(), g.active);
  const uint64_t asked = static_cast<uint64_t>(__builtin_popcount(g.active)) * g.bytes;
  Buffer* buffer = nullptr;
  for (int i = 0; i < all.count; ++i) {
    const uint64_t sector = all.sector[i];
    Buffer* b = buffer_of(reinterpret_cast<const void*>(g.address[all.lane[i]]));
    if (b == nullptr) continue;
    buffer = b;
    uint8_t& touched = b->touched[sector - b->first_sector];
    const uint8_t bit = write ? 2 : 1;
    (write ? b->count.unique_sectors_written : b->count.unique_sectors_read) += !(touched & bit);
    touched |= bit;
    (write ? b->count.sectors_written : b->count.sectors_read) += 1;
    if (kind == Kind::kGlobalCopy) {
      b->count.l2_sectors_read += 1;
    } else if (!write) {
      uint32_t& in_l1 = b->in_l1[sector - b->first_sector];
      const auto me = static_cast<uint32_t>(now->block) + 1;
      b->count.l2_sectors_read += in_l1 != me;
      in_l1 = me;
    }
  }
  if (buffer) (write ? buffer->count.bytes_written : buffer->count.bytes_read) += asked;
  site.units += all.count;
  site.least += (asked + kSector - 1) / kSector;
}

void finish(const Gathered& g, int site_id) {
  SiteCount& site = count_of(site_id);
  const Kind kind = now->sites[site_id].kind;
  site.instructions += 1;
  site.narrowest = std::min(site.narrowest, g.bytes);
  if (!g.active) return;
  if (kind == Kind::kSharedRead || kind == Kind::kSharedWrite) {
    count_shared(site, g.address.data(), g.active, g.bytes);
  } else {
    count_global(site, g, kind);
  }
}

std::vector<Counters>& finished() {
  static std::vector<Counters> all;
  return all;
}

}  // namespace

SiteCount& count_of(int site) {
  if (static_cast<int>(now->site_counts.size()) <= site) now->site_counts.resize(site + 1);
  return now->site_counts[site];
}

void count_shared(SiteCount& site, const uint64_t* address, uint32_t active, int bytes) {
  const Wavefronts fronts = wavefronts(address, active, bytes);
  site.units += fronts.units;
  site.least += fronts.least;
}

Buffer* buffer_of(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  for (Buffer& b : now->buffers)
    if (byte >= b.tensor.start && byte < b.tensor.start + b.tensor.bytes) return &b;
  return nullptr;
}

// Takes the n-th call of each lane at a line as one instruction of the warp, which is exact while lanes run together.
void gather(uint64_t address, int bytes, Kind kind, bool active, Where where) {
  Warp& warp = now->warps[self_warp()];
  const int id = now->sites.id(where, kind);
  if (static_cast<int>(warp.logs.size()) <= id) warp.logs.resize(id + 1);
  SiteLog& log = warp.logs[id];
  if (log.open.empty()) warp.touched.push_back(id);
  const int lane = self_lane();
  const uint32_t at = log.next[lane]++;
  if (at >= log.open.size()) log.open.emplace_back();
  Gathered& g = log.open[at];
  g.lanes |= 1u << lane;
  g.bytes = bytes;
  g.address[lane] = address;
  if (active) g.active |= 1u << lane;
  if (g.lanes == kAllLanes) finish(g, id);
}

// At a block barrier all lanes have run equally far, so no more lanes will join what is still open.
void flush_logs() {
  for (Warp& warp : now->warps) {
    for (int id : warp.touched) {
      SiteLog& log = warp.logs[id];
      for (const Gathered& g : log.open)
        if (g.lanes != kAllLanes) finish(g, id);
      log.open.clear();
      log.next.fill(0);
    }
    warp.touched.clear();
  }
}

void keep_counters() {
  for (Buffer& b : now->buffers) {
    b.count.size = b.tensor.bytes;
    now->counters.buffers[b.tensor.name] = b.count;
  }
  for (size_t i = 0; i < now->site_counts.size(); ++i) {
    if (now->site_counts[i].instructions == 0) continue;
    const Site& site = now->sites[i];
    SiteCount& sum = now->counters.sites[{text_of({site.file, site.line}), site.kind}];
    sum.instructions += now->site_counts[i].instructions;
    sum.units += now->site_counts[i].units;
    sum.least += now->site_counts[i].least;
    sum.narrowest = std::min(sum.narrowest, now->site_counts[i].narrowest);
  }
  finished().push_back(std::move(now->counters));
}

std::vector<Counters> take_counters() {
  return std::exchange(finished(), {});
}

}  // namespace emulator
