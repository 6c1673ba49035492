// Hopper's mbarriers and bulk copies. hopper_state.h has their state, include/emulator/hopper.h lists what is checked.

#include <resnet_fast/hopper.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <emulator/box.h>

#include "state.h"

namespace emulator {
namespace {

using resnet_fast::Im2colBox;
using resnet_fast::kBarrierBytes;
using resnet_fast::kRowBytes;
using resnet_fast::TensorBox;
using resnet_fast::TensorMap;

constexpr int kChunk = kChunkBytes;
constexpr int kNumber = 2;  // bytes of a tensor's element

std::string text_of_barrier(uint32_t at) {
  return "the mbarrier at byte " + std::to_string(at);
}

void join(Clock& mine, const Clock& other) {
  for (int i = 0; i < kClocks; ++i) mine[i] = std::max(mine[i], other[i]);
}

Barrier& barrier_at(uint32_t at, Where where) {
  const auto found = now->hopper.barriers.find(at);
  if (found == now->hopper.barriers.end()) fail(where, "uses " + text_of_barrier(at) + ", which nobody initialised");
  Barrier& b = found->second;
  const History& h = now->history[at / kGranule];
  if (h.writer != b.initialised_by || h.write_site != b.site)
    fail(where, "uses " + text_of_barrier(at) + ", which " + thread_text(h.writer) + " has overwritten at " +
                    site_text(h.write_site));
  if (!ordered(h.writer, h.write_time))
    fail(where, "uses " + text_of_barrier(at) + " that " + thread_text(h.writer) + " initialised at " +
                    site_text(h.write_site) + ", and no barrier orders the two");
  return b;
}

// Ends the phase of the mbarrier if no arrivals and no bytes are missing.
void end_phase(uint32_t at, Barrier& b, Where where) {
  if (b.overfull())
    fail(where, std::to_string(-b.bytes) + " bytes more have come to " + text_of_barrier(at) + " than phase " +
                    std::to_string(b.phase) + " expected");
  if (!b.advance()) return;
  join(b.over, b.arrived);
  b.over[kMaxWarps + b.slot] = b.phase;
  for (int thread : std::exchange(b.waiters, {})) release(thread);
}

// Completes the copies in flight to this mbarrier, in a random order.
void land(uint32_t at, Barrier& b) {
  std::vector<BulkCopy>& all = now->hopper.copies;
  std::vector<BulkCopy> mine;
  for (BulkCopy& copy : all)
    if (copy.barrier == at) mine.push_back(std::move(copy));
  all.erase(std::remove_if(all.begin(), all.end(), [&](const BulkCopy& c) { return c.barrier == at; }), all.end());
  while (!mine.empty()) {
    std::swap(mine[draw(mine.size())], mine.back());
    const BulkCopy copy = std::move(mine.back());
    mine.pop_back();
    if (copy.phase != b.phase)
      fail(copy.where, "a copy lands on " + text_of_barrier(at) + " after phase " + std::to_string(copy.phase) +
                           ", in which it was issued: that one expected fewer bytes than come");
    for (const BulkCopy::Piece& piece : copy.pieces) {
      std::memcpy(now->shared + piece.at, &piece.data, kChunk);
      for (uint32_t g = piece.at / kGranule; g < (piece.at + kChunk) / kGranule; ++g) now->history[g].state = kWritten;
    }
    b.complete(static_cast<int64_t>(copy.pieces.size()) * kChunk);
    end_phase(at, b, copy.where);
  }
}

// Checks and counts a copy's read of `bytes` contiguous bytes of global memory.
void read_global(const unsigned char* p, int bytes, Where where) {
  Buffer* b = buffer_of(p);
  if (b == nullptr || p + bytes > b->tensor.start + b->tensor.bytes)
    fail(where, "copies " + std::to_string(bytes) + " bytes from outside of every tensor of this launch");
  if (b->tensor.access == Access::kWrite) fail(where, "copies from the output " + b->tensor.name);
  SiteCount& site = count_of(now->sites.id(where, Kind::kBulkRead));
  const uint64_t first = reinterpret_cast<uintptr_t>(p) / kSector;
  const uint64_t last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / kSector;
  for (uint64_t sector = first; sector <= last; ++sector) {
    uint8_t& touched = b->touched[sector - b->first_sector];
    b->count.unique_sectors_read += !(touched & 1);
    touched |= 1;
  }
  b->count.bytes_read += bytes;
  b->count.sectors_read += last - first + 1;
  b->count.l2_sectors_read += last - first + 1;
  site.units += last - first + 1;
  site.least += (bytes + kSector - 1) / kSector;
}

// Issues a copy of these pieces, which the mbarrier completes.
void issue(std::vector<BulkCopy::Piece> pieces, uint32_t barrier, Where where) {
  Barrier& b = barrier_at(barrier, where);
  if (!b.fenced)
    fail(where, "copies to " + text_of_barrier(barrier) + ", whose initialisation has no mbarrier_init_fence");
  const int site = now->sites.id(where, Kind::kBulkRead);
  for (const BulkCopy::Piece& piece : pieces) {
    for (uint32_t g = piece.at / kGranule; g < (piece.at + kChunk) / kGranule; ++g) {
      expect_fenced(now->history[g], g * kGranule, "copies to", where);
      expect_reads_fenced(now->history[g], g * kGranule, where);
    }
    check_write(piece.at, kChunk, where, kInFlight, Kind::kBulkRead);
    std::memset(now->shared + piece.at, 0xff, kChunk);
    for (uint32_t g = piece.at / kGranule; g < (piece.at + kChunk) / kGranule; ++g) {
      now->history[g].writer = static_cast<int16_t>((kMaxWarps + b.slot) * kWarp);
      now->history[g].write_time = b.phase + 1;
    }
  }
  count_of(site).instructions += 1;
  now->counters.bulk_copies += 1;
  now->counters.bulk_bytes += pieces.size() * kChunk;
  now->hopper.copies.push_back({barrier, b.phase, where, std::move(pieces)});
  if (!b.waiters.empty()) land(barrier, b);
}

TiledTensor tiled(const TensorBox& box) {
  TiledTensor t;
  t.start = reinterpret_cast<uintptr_t>(box.start);
  std::copy(box.size, box.size + TensorBox::kRank, t.size);
  std::copy(box.stride, box.stride + TensorBox::kRank, t.stride);
  std::copy(box.box, box.box + TensorBox::kRank, t.box);
  t.rank = TensorBox::kRank;
  t.element = kNumber;
  t.pitch = box.swizzle ? kRowBytes : kChunk;
  return t;
}

// Collects the rows of a box in the order of shared memory, and checks and counts the reads for them.
struct Rows {
  uint32_t at;
  TiledTensor tensor;
  Where where;
  std::vector<BulkCopy::Piece> pieces{};

  Rows(uint32_t at, const TensorBox& box, Where where) : at(at), tensor(tiled(box)), where(where) {
    if (at % tensor.alignment() != 0)
      fail(where, "a box's place, shared memory byte " + std::to_string(at) + ", is not a multiple of " +
                      std::to_string(tensor.alignment()));
  }

  // Adds a row; zeros outside the tensor.
  void add(const BoxRow& row) {
    std::vector<unsigned char> bytes(tensor.row_bytes());
    if (row.first < row.end) {
      const auto* from = reinterpret_cast<const unsigned char*>(row.address);
      const int present = static_cast<int>(row.end - row.first) * kNumber;
      read_global(from, present, where);
      std::memcpy(bytes.data() + row.first * kNumber, from, present);
    }
    for (uint32_t chunk = 0; chunk < bytes.size() / kChunk; ++chunk) {
      BulkCopy::Piece piece{at + tensor.place(row.row, chunk), {}};
      check_bounds(piece.at, kChunk, where);
      std::memcpy(&piece.data, bytes.data() + chunk * kChunk, kChunk);
      pieces.push_back(piece);
    }
  }
};

// The last position of a filter along W or H; with a stride the real last position may be before it.
int64_t last_of(const Im2colBox& box, int side) {
  return static_cast<int64_t>(box.x.size[1 + side]) - 1 + box.upper[side];
}

}  // namespace

void expect_fenced(const History& h, uint32_t at, const char* doing, Where where) {
  if (h.writer < 0 || h.writer >= kMaxWarps * kWarp || now->threads[h.writer].async.fences != h.fences) return;
  fail(where, std::string(doing) + " shared memory byte " + std::to_string(at) + " that " + thread_text(h.writer) +
                  " wrote at " + site_text(h.write_site) + " without a fence_async after it");
}

void expect_reads_fenced(const History& h, uint32_t at, Where where) {
  for (int32_t i = h.reads; i >= 0; i = now->reads[i].next) {
    const Read& read = now->reads[i];
    if (read.plain_thread < 0 || now->threads[read.plain_thread].async.fences != read.fences) continue;
    fail(where, "copies to shared memory byte " + std::to_string(at) + " that " + thread_text(read.plain_thread) +
                    " read without a fence_async after it");
  }
}

void start_block_of_hopper() {
  now->hopper.barriers.clear();
  now->hopper.copies.clear();
  now->hopper.warpgroups.assign(now->grid.threads / resnet_fast::kWarpgroup, {});
}

std::string left_in_flight() {
  if (now->hopper.copies.empty()) return "";
  const BulkCopy& copy = now->hopper.copies.front();
  return std::string("kernel ") + now->kernel + " leaves block " + std::to_string(now->block) +
         " with a bulk copy issued at " + text_of(copy.where) + " in flight: nobody waited at " +
         text_of_barrier(copy.barrier);
}

std::string awaited(const Asynchronous& thread, const char* otherwise) {
  if (!thread.waits) return std::string("waits for a ") + otherwise + " that others never reach";
  const Barrier& b = now->hopper.barriers.at(thread.barrier);
  return "waits for ever for the end of phase " + std::to_string(b.phase) + " (parity " + std::to_string(b.phase & 1) +
         ") of " + text_of_barrier(thread.barrier) + ", at which " + std::to_string(b.missing) + " of " +
         std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) + " expected bytes are missing";
}

std::string barrier_text(int slot) {
  for (const auto& [at, b] : now->hopper.barriers)
    if (b.slot == slot) return text_of_barrier(at);
  return "an mbarrier";
}

void mbarrier_init(uint32_t at, int arrivals, Where where) {
  check_bounds(at, kBarrierBytes, where);
  auto& all = now->hopper.barriers;
  if (all.count(at)) fail(where, "initialises " + text_of_barrier(at) + " again");
  if (all.size() == kMaxBarriers)
    fail(where, "the emulator has no more than " + std::to_string(kMaxBarriers) + " mbarriers");
  if (arrivals < 1) fail(where, text_of_barrier(at) + " would wait for nobody");
  check_write(at, kBarrierBytes, where, kWritten, Kind::kSharedWrite);
  Barrier b;
  static_cast<Phases&>(b) = Phases(arrivals);
  b.slot = static_cast<int>(all.size());
  b.initialised_by = self().index;
  b.site = now->sites.id(where, Kind::kSharedWrite);
  all[at] = b;
}

void mbarrier_init_fence() {
  fence_async();
}

void fence_async() {
  self().async.fences += 1;
  for (auto& [at, b] : now->hopper.barriers) b.fenced |= b.initialised_by == self().index;
}

void mbarrier_arrive(uint32_t at, int bytes, Where where) {
  Barrier& b = barrier_at(at, where);
  if (!b.takes(1))
    fail(where, "arrives at " + text_of_barrier(at) + ", where all " + std::to_string(b.arrivals) + " of phase " +
                    std::to_string(b.phase) + " have arrived and " + std::to_string(b.bytes) + " bytes are missing");
  Clock& mine = now->warps[self_warp()].clock;
  join(b.arrived, mine);
  mine[self_warp()] += 1;
  b.arrive(1);
  b.expect(bytes);
  end_phase(at, b, where);
}

void mbarrier_wait(uint32_t at, int parity, Where where) {
  Barrier& b = barrier_at(at, where);
  while (!b.ended(parity)) {
    const uint32_t phase = b.phase;
    land(at, b);
    if (b.phase != phase) continue;
    b.waiters.push_back(self().index);
    self().async.waits = true;
    self().async.barrier = at;
    wait_at("phase of an mbarrier", where);
    self().async.waits = false;
  }
  join(now->warps[self_warp()].clock, b.over);
}

resnet_fast::Status encode(const TensorMap& map) {
  const TensorBox& box = map.box.x;
  resnet_fast::Status status = refused(tiled(box), map.im2col ? Im2colBox::kMaxPixels : 256);
  const auto refuse = [&](bool when, const char* what) {
    if (when && status == nullptr) status = what;
  };
  refuse(box.swizzle && box.box[0] * kNumber != kRowBytes, "a swizzled box's rows are not of 128 bytes");
  for (int i = 0; map.im2col && i < 2; ++i) {
    const Im2colBox& windows = map.box;
    const auto of_a_byte = [](int corner) { return corner >= -128 && corner <= 127; };
    refuse(!of_a_byte(windows.lower[i]) || !of_a_byte(windows.upper[i]), "a corner of im2col is not in -128 to 127");
    refuse(windows.step[i] == 0 || windows.step[i] > Im2colBox::kMaxStep, "a step of im2col is none or above 8");
    refuse(windows.lower[i] > last_of(windows, i), "a filter of im2col fits nowhere");
  }
  return status;
}

void bulk_load(uint32_t at, const void* p, int bytes, uint32_t barrier, Where where) {
  if (bytes <= 0 || bytes % kChunk != 0 || at % kChunk != 0 || reinterpret_cast<uintptr_t>(p) % kChunk != 0)
    fail(where, "a bulk copy's addresses and its " + std::to_string(bytes) + " bytes must be multiples of 16");
  const auto* from = static_cast<const unsigned char*>(p);
  read_global(from, bytes, where);
  std::vector<BulkCopy::Piece> pieces;
  for (int i = 0; i < bytes; i += kChunk) {
    check_bounds(at + i, kChunk, where);
    BulkCopy::Piece piece{at + static_cast<uint32_t>(i), {}};
    std::memcpy(&piece.data, from + i, kChunk);
    pieces.push_back(piece);
  }
  issue(std::move(pieces), barrier, where);
}

void tensor_load(uint32_t at, const TensorMap& map, const int* corner, uint32_t barrier, Where where) {
  if (map.im2col) fail(where, "a tensor_load with the map of an Im2colBox");
  Rows rows(at, map.box.x, where);
  for_rows(rows.tensor, corner, [&](const BoxRow& row) { rows.add(row); });
  issue(std::move(rows.pieces), barrier, where);
}

void im2col_load(uint32_t at, const TensorMap& map, const int* first, const int* offset, uint32_t barrier,
                 Where where) {
  if (!map.im2col) fail(where, "an im2col_load with the map of a TensorBox");
  const Im2colBox& box = map.box;
  int64_t pixel[2] = {first[1], first[2]}, image = first[3];
  for (int i = 0; i < 2; ++i) {
    const char* side = i == 0 ? "w" : "h";
    if (pixel[i] < box.lower[i] || pixel[i] > last_of(box, i))
      fail(where, std::string("im2col begins at ") + side + " = " + std::to_string(pixel[i]) +
                      ", where the filter is not put down: from " + std::to_string(box.lower[i]) + " to " +
                      std::to_string(last_of(box, i)));
    if (offset[i] < 0 || offset[i] > Im2colBox::kMaxOffset)
      fail(where, std::string("im2col's offset of ") + side + " is " + std::to_string(offset[i]) + ", not in 0 to " +
                      std::to_string(Im2colBox::kMaxOffset));
  }
  Rows rows(at, box.x, where);
  for (uint32_t i = 0; i < box.x.box[1]; ++i) {
    const int64_t coordinates[] = {first[0], pixel[0] + offset[0], pixel[1] + offset[1], image};
    rows.add(row_at(rows.tensor, i, coordinates));
    pixel[0] += box.step[0];
    if (pixel[0] <= last_of(box, 0)) continue;
    pixel[0] = box.lower[0];
    pixel[1] += box.step[1];
    if (pixel[1] <= last_of(box, 1)) continue;
    pixel[1] = box.lower[1];
    image += 1;
  }
  issue(std::move(rows.pieces), barrier, where);
}

}  // namespace emulator
