// cp.async, and the bulk copies of tensors.

#include <algorithm>
#include <cstring>

#include <emulator/box.h>

#include "access.h"
#include "asynchronous.h"
#include "families.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kChunk = emulator::kChunkBytes;

// ---- cp.async ----

void run_copy(Warp& w, const Instruction& i) {
  const auto bytes = static_cast<int>(i.at(2).plus);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    w.fail(i, -1, "copies " + std::to_string(bytes) + " bytes, not 4, 8 or 16");
  w.require(i, i.at(0), "the address");
  const bool sized = i.parts > 3;
  if (sized) w.require(i, i.at(3), "the number of bytes to copy");
  const uint32_t active = w.active;
  int from_bytes[kWarp];
  uint32_t whole = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint64_t asked = sized ? w.value(i.at(3), lane) : static_cast<uint64_t>(bytes);
    if (active >> lane & 1 && asked > static_cast<uint64_t>(bytes))
      w.fail(i, lane, "takes " + std::to_string(asked) + " bytes for a copy of " + std::to_string(bytes));
    from_bytes[lane] = static_cast<int>(asked);
    if (active >> lane & 1 && from_bytes[lane] == bytes) whole |= 1u << lane;
  }
  Reached from;
  w.active = whole;
  if (whole) reach(w, i, i.at(1), Space::kGlobal, bytes, Use::kRead, 0, nullptr, from);
  w.active = active;
  SharedMemory& shared = w.block->shared;
  std::array<uint64_t, kWarp> to{};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(active >> lane & 1)) continue;
    Piece piece;
    piece.at = shared_address_of(w, i.at(0), lane);
    piece.bytes = static_cast<uint8_t>(bytes);
    piece.lane = static_cast<uint8_t>(lane);
    to[lane] = piece.at;
    const uint8_t* source = whole >> lane & 1 ? from.at[lane] : nullptr;
    if (source == nullptr && from_bytes[lane] > 0) {
      const uint64_t address = address_of(w, i.at(1), lane);
      GlobalMemory& memory = *w.launch->memory;
      Allocation* a = memory.find(address, from_bytes[lane]);
      if (a == nullptr || address % bytes != 0)
        w.fail(
            i, lane,
            "copies " + std::to_string(from_bytes[lane]) + " bytes from outside of every allocation, or not aligned");
      if (!GlobalMemory::is_written(*a, address, from_bytes[lane]))
        w.finding(i, lane, "copies bytes of " + a->name + ", which nobody has written");
      std::array<uint64_t, kWarp> addresses{};
      addresses[lane] = address;
      w.launch->line(i).sectors += memory.count(addresses.data(), 1u << lane, from_bytes[lane], false);
      source = memory.host(address, from_bytes[lane]);
      w.launch->order.row(w, i, lane, *a, address, static_cast<uint64_t>(from_bytes[lane]), nullptr);
    }
    if (source != nullptr) std::memcpy(piece.data.data(), source, from_bytes[lane]);
    shared.check_bounds(w, i, lane, piece.at, bytes, bytes);
    shared.check_write(w, i, lane, piece.at, bytes, kInFlight, nullptr);
    std::memset(shared.data() + piece.at, 0xff, bytes);
    of(w).copies.push_back(piece);
  }
  LineCount& line = w.launch->line(i);
  const Rounds rounds = bank_rounds(to.data(), active, bytes);
  line.wavefronts += rounds.wavefronts;
  line.ideal += rounds.ideal;
  if (!whole) line.instructions += 1;
  w.block->asynchronous->cp_async += 1;
}

void run_commit(Warp& w, const Instruction&) {
  OfWarp& mine = of(w);
  CopyGroup group;
  group.lanes = w.active;
  const auto others = std::stable_partition(mine.copies.begin(), mine.copies.end(),
                                            [&](const Piece& piece) { return w.active >> piece.lane & 1; });
  if (others == mine.copies.end()) {
    group.pieces = std::move(mine.copies);
    mine.copies.clear();
  } else {
    group.pieces.assign(mine.copies.begin(), others);
    mine.copies.erase(mine.copies.begin(), others);
  }
  mine.copy_groups.push_back(std::move(group));
}

// The copies of these lanes in a group are there.
void finish(Warp& w, CopyGroup& group, uint32_t lanes) {
  group.lanes &= ~lanes;
  for (const Piece& piece : group.pieces) {
    if (!(lanes >> piece.lane & 1)) continue;
    std::memcpy(w.block->shared.data() + piece.at, piece.data.data(), piece.bytes);
    w.block->shared.finish_write(w, piece.lane, piece.at, piece.bytes);
  }
  const auto is_there = [&](const Piece& piece) { return lanes >> piece.lane & 1; };
  group.pieces.erase(std::remove_if(group.pieces.begin(), group.pieces.end(), is_there), group.pieces.end());
}

// Each lane waits until at most so many of its own groups are in flight.
void wait_for_copies(Warp& w, size_t most) {
  std::deque<CopyGroup>& groups = of(w).copy_groups;
  std::vector<uint32_t> over(groups.size());
  size_t in_flight[kWarp] = {};
  for (size_t n = groups.size(); n-- > 0;)
    for (int lane = 0; lane < kWarp; ++lane)
      if (w.active & groups[n].lanes & 1u << lane && in_flight[lane]++ >= most) over[n] |= 1u << lane;
  for (size_t n = 0; n < groups.size(); ++n)
    if (over[n]) finish(w, groups[n], over[n]);
  groups.erase(std::remove_if(groups.begin(), groups.end(), [](const CopyGroup& group) { return group.lanes == 0; }),
               groups.end());
}

void run_wait(Warp& w, const Instruction& i) {
  wait_for_copies(w, static_cast<size_t>(i.at(0).plus));
}

void run_wait_all(Warp& w, const Instruction& i) {
  run_commit(w, i);
  wait_for_copies(w, 0);
}

// ---- bulk copies ----

// Operands of a copy to shared memory: [to], [map, {corner}], [mbarrier]. To global memory: [map, {corner}], [from].

emulator::TiledTensor tensor_of(Warp& w, const Instruction& i, int lane, const Slot& slot, int rank) {
  uint64_t address = address_of(w, slot, lane);
  const uint8_t* bytes = nullptr;
  if (address >= kParameterWindow) {
    const uint64_t at = address - kParameterWindow;
    if (at + emulator::kTensorMapBytes <= w.launch->parameters.size()) bytes = w.launch->parameters.data() + at;
  } else {
    bytes = w.launch->memory->host(address, emulator::kTensorMapBytes);
  }
  if (bytes == nullptr) w.fail(i, lane, "names a tensor map outside of the parameters and of every allocation");
  emulator::TiledTensor tensor;
  if (address % 64 != 0) w.fail(i, lane, "names a tensor map that is not aligned to 64 bytes");
  if (!emulator::decode(bytes, tensor)) w.fail(i, lane, "names a tensor map that was not encoded");
  if (tensor.rank != rank)
    w.fail(i, lane,
           "copies a box of " + std::to_string(rank) + " dimensions of a tensor map that has " +
               std::to_string(tensor.rank));
  return tensor;
}

std::array<int, emulator::TiledTensor::kMaxRank> corner_of(const Warp& w, const Instruction& i, int operand, int lane,
                                                           int rank) {
  std::array<int, emulator::TiledTensor::kMaxRank> corner{};
  for (int d = 0; d < rank; ++d)
    corner[d] = static_cast<int>(static_cast<uint32_t>(w.value(i.at(operand, 1 + d), lane)));
  return corner;
}

uint8_t* host_row(const Warp& w, const emulator::TiledTensor& t, const emulator::BoxRow& row) {
  return w.launch->memory->host(row.address, uint64_t{row.end - row.first} * t.element);
}

// The part of a row that is in the tensor, checked and counted. `written`: what a copy to it writes there.
void reach_row(Warp& w, const Instruction& i, int lane, const emulator::TiledTensor& t, const emulator::BoxRow& row,
               const uint8_t* written) {
  const bool writes = written != nullptr;
  const uint64_t bytes = uint64_t{row.end - row.first} * t.element;
  if (bytes == 0) return;
  Allocation* a = w.launch->memory->find(row.address, bytes);
  if (a == nullptr || (writes && !a->writable))
    w.fail(i, lane,
           w.launch->memory->refused(row.address, 1, writes).empty()
               ? "copies a row of " + std::to_string(bytes) + " bytes that ends outside of its allocation"
               : w.launch->memory->refused(row.address, 1, writes));
  if (!writes && !a->written.empty() && !GlobalMemory::is_written(*a, row.address, bytes))
    w.finding(i, lane, "copies bytes of " + a->name + " that were never written");
  w.launch->order.row(w, i, lane, *a, row.address, bytes, written);
  if (writes) GlobalMemory::mark_written(*a, row.address, bytes);
  LineCount& line = w.launch->line(i);
  line.ideal_sectors += static_cast<int64_t>((bytes + kSector - 1) / kSector);
  // Sectors, 32 at a time, as if a warp read them.
  std::array<uint64_t, kWarp> address{};
  for (uint64_t at = row.address; at < row.address + bytes;) {
    uint32_t lanes = 0;
    for (int n = 0; n < kWarp && at < row.address + bytes; ++n, at += t.element) {
      address[n] = at;
      lanes |= 1u << n;
    }
    line.sectors += w.launch->memory->count(address.data(), lanes, t.element, writes);
  }
}

void run_load(Warp& w, const Instruction& i) {
  for (const auto& [operand, what] :
       {std::pair{0, "the address"}, {1, "the address of a tensor map"}, {2, "an mbarrier"}})
    w.require(i, i.at(operand), what);
  const auto rank = static_cast<int>(i.number);
  for (int d = 0; d < rank; ++d) w.require(i, i.at(1, 1 + d), "a coordinate");
  SharedMemory& shared = w.block->shared;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const emulator::TiledTensor t = tensor_of(w, i, lane, i.at(1), rank);
    const uint32_t to = shared_address_of(w, i.at(0), lane);
    if (to % t.alignment() != 0)
      w.fail(i, lane,
             "copies a box to shared memory byte " + std::to_string(to) + ", which is not a multiple of " +
                 std::to_string(t.alignment()));
    std::vector<Piece> pieces;
    std::vector<uint8_t> bytes(t.row_bytes());
    emulator::for_rows(t, corner_of(w, i, 1, lane, rank).data(), [&](const emulator::BoxRow& row) {
      reach_row(w, i, lane, t, row, nullptr);
      std::memset(bytes.data(), t.fill == emulator::Fill::kNaN ? 0xff : 0, bytes.size());
      if (row.first < row.end)
        std::memcpy(bytes.data() + row.first * t.element, host_row(w, t, row), size_t{row.end - row.first} * t.element);
      for (uint32_t chunk = 0; chunk < bytes.size() / kChunk; ++chunk) {
        Piece piece;
        piece.at = to + t.place(row.row, chunk);
        piece.bytes = kChunk;
        piece.lane = static_cast<uint8_t>(lane);
        std::memcpy(piece.data.data(), bytes.data() + chunk * kChunk, kChunk);
        shared.check_bounds(w, i, lane, piece.at, kChunk, kChunk);
        pieces.push_back(piece);
      }
    });
    issue(w, i, lane, shared_address_of(w, i.at(2), lane), std::move(pieces));
  }
}

void run_store(Warp& w, const Instruction& i) {
  w.require(i, i.at(0), "the address of a tensor map");
  w.require(i, i.at(1), "the address");
  const auto rank = static_cast<int>(i.number);
  for (int d = 0; d < rank; ++d) w.require(i, i.at(0, 1 + d), "a coordinate");
  SharedMemory& shared = w.block->shared;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const emulator::TiledTensor t = tensor_of(w, i, lane, i.at(0), rank);
    const uint32_t from = shared_address_of(w, i.at(1), lane);
    if (from % t.alignment() != 0)
      w.fail(i, lane,
             "copies a box from shared memory byte " + std::to_string(from) + ", which is not a multiple of " +
                 std::to_string(t.alignment()));
    const int32_t reads = shared.begin_reads(w.index, 1, i.line, "a bulk copy");
    std::vector<Needed> needed;
    std::vector<uint8_t> bytes(t.row_bytes());
    emulator::for_rows(t, corner_of(w, i, 0, lane, rank).data(), [&](const emulator::BoxRow& row) {
      for (uint32_t chunk = 0; chunk < bytes.size() / kChunk; ++chunk) {
        const uint32_t at = from + t.place(row.row, chunk);
        shared.check_bounds(w, i, lane, at, kChunk, kChunk);
        if (!shared.collect(w, i, at, kChunk, "copies", needed))
          w.finding(i, lane,
                    "copies shared memory byte " + std::to_string(at) +
                        " or one after it to global memory, which holds a value that was never written");
        shared.add_read(reads, at);
        std::memcpy(bytes.data() + chunk * kChunk, shared.data() + at, kChunk);
      }
      reach_row(w, i, lane, t, row, bytes.data() + row.first * t.element);
      if (row.first < row.end)
        std::memcpy(host_row(w, t, row), bytes.data() + row.first * t.element, size_t{row.end - row.first} * t.element);
    });
    shared.check_needed(w, i, "copies", needed);
    of(w).stores.push_back(reads);
    w.launch->counters.events["bulk_stores"] += 1;
  }
}

void run_commit_bulk(Warp& w, const Instruction&) {
  OfWarp& mine = of(w);
  mine.store_groups.push_back(std::move(mine.stores));
  mine.stores.clear();
}

void run_wait_bulk(Warp& w, const Instruction& i) {
  OfWarp& mine = of(w);
  while (mine.store_groups.size() > static_cast<size_t>(i.at(0).plus)) {
    for (int32_t reads : mine.store_groups.front()) w.block->shared.end_reads(reads, w.index);
    mine.store_groups.pop_front();
  }
}

Form decode_bulk(Modifiers& m) {
  Form f;
  if (m.take("commit_group")) {
    f.run = run_commit_bulk;
    return f;
  }
  if (m.take("wait_group")) {
    m.take("read");
    f.run = run_wait_bulk;
    f.wants = {{Want::kConstant}};
    return f;
  }
  if (!m.take("tensor")) return f;
  const std::string rank = m.take_one({"1d", "2d", "3d", "4d", "5d"});
  m.take("tile");
  if (rank.empty()) return f;
  f.number = rank[0] - '0';
  const bool to_shared = m.take("mbarrier::complete_tx::bytes"), to_global = m.take("bulk_group");
  const bool shared = m.take("shared::cta") || m.take("shared::cluster") || m.take("shared");
  if (!m.take("global") || !shared || to_shared == to_global) return f;
  f.run = to_shared ? run_load : run_store;
  f.wants = {{Want::kMemory, Type::kB32}, {Want::kMemory, Type::kB32}};
  if (to_shared) f.wants.push_back({Want::kMemory});
  f.wants[to_shared ? 1 : 0].count = static_cast<uint16_t>(1 + f.number);
  return f;
}

}  // namespace

Form decode_cp(Modifiers& m) {
  Form f;
  if (!m.take("async")) return f;
  if (m.take("bulk")) return decode_bulk(m);
  if (m.take("commit_group")) {
    f.run = run_commit;
  } else if (m.take("wait_group")) {
    f.run = run_wait;
    f.wants = {{Want::kConstant}};
  } else if (m.take("wait_all")) {
    f.run = run_wait_all;
  } else {
    const std::string level = m.take_one({"ca", "cg"});
    const bool shared = m.take("shared") || m.take("shared::cta");
    m.take_one({"L2::64B", "L2::128B", "L2::256B"});
    if (level.empty() || !shared || !m.take("global")) return f;
    f.run = run_copy;
    f.wants = {{Want::kMemory}, {Want::kMemory}, {Want::kConstant}, {Want::kRead, Type::kB32, true}};
  }
  return f;
}

}  // namespace ptx
