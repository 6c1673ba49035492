// mbarriers, the copies that they count, and the fences between proxies.

#include <algorithm>
#include <cstring>
#include <utility>

#include "asynchronous.h"
#include "families.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kMbarrierBytes = 8;
constexpr int64_t kMostArrivals = (1 << 20) - 1;

std::string text_of(uint64_t at) {
  return "the mbarrier at shared memory byte " + std::to_string(at);
}

void join(Clock& mine, const Clock& other) {
  for (int i = 0; i < kClocks; ++i) mine[i] = std::max(mine[i], other[i]);
}

void end_phase(Warp& w, const Instruction& i, uint64_t at, Mbarrier& b) {
  if (b.overfull())
    w.fail(i, -1,
           std::to_string(-b.bytes) + " bytes more have come to " + text_of(at) + " than phase " +
               std::to_string(b.phase) + " expected");
  if (!b.advance()) return;
  join(b.over, b.arrived);
  b.over[kMaxWarps + b.slot] = b.before + b.phase;
}

// Completes the copies in flight to an mbarrier, in an order that is drawn.
void land_all(Block& block, uint64_t at, Mbarrier& b) {
  std::vector<BulkCopy>& all = block.asynchronous->copies;
  std::vector<BulkCopy> mine;
  for (BulkCopy& copy : all)
    if (copy.mbarrier == at) mine.push_back(std::move(copy));
  if (mine.empty()) return;
  all.erase(std::remove_if(all.begin(), all.end(), [&](const BulkCopy& copy) { return copy.mbarrier == at; }),
            all.end());
  while (!mine.empty()) {
    std::swap(mine[block.launch->draw(mine.size())], mine.back());
    const BulkCopy copy = std::move(mine.back());
    mine.pop_back();
    if (copy.phase != b.phase)
      copy.warp->fail(*copy.at, -1,
                      "its bytes come to " + text_of(at) + " after phase " + std::to_string(copy.phase) +
                          ", in which it was issued: that one expected fewer bytes than come");
    int64_t bytes = 0;
    for (const Piece& piece : copy.pieces) {
      std::memcpy(block.shared.data() + piece.at, piece.data.data(), piece.bytes);
      block.shared.set_state(piece.at, piece.bytes, kWritten);
      bytes += piece.bytes;
    }
    b.complete(bytes);
    end_phase(*copy.warp, *copy.at, at, b);
  }
}

// What a lane passes besides the address: constants and registers alike.
int64_t number_at(Warp& w, const Instruction& i, int operand, int lane, const char* what) {
  w.require(i, i.at(operand), what);
  return static_cast<int64_t>(w.value(i.at(operand), lane));
}

void run_init(Warp& w, const Instruction& i) {
  w.require(i, i.at(0), "the address");
  Asynchronous& all = *w.block->asynchronous;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const uint32_t at = shared_address_of(w, i.at(0), lane);
    const int64_t arrivals = number_at(w, i, 1, lane, "the number of arrivals");
    w.block->shared.check_bounds(w, i, lane, at, kMbarrierBytes, kMbarrierBytes);
    if (arrivals < 1 || arrivals > kMostArrivals)
      w.fail(i, lane,
             "initialises " + text_of(at) + " with " + std::to_string(arrivals) + " arrivals, not 1 to 2^20 - 1");
    if (all.mbarriers.count(at))
      w.fail(i, lane, "initialises " + text_of(at) + " again, with no mbarrier.inval before");
    const auto free = std::find(all.taken.begin(), all.taken.end(), false);
    if (free == all.taken.end())
      w.fail(i, lane, "initialises more than " + std::to_string(kMaxMbarriers) + " mbarriers, which this machine has");
    w.block->shared.check_write(w, i, lane, at, kMbarrierBytes, kWritten, nullptr);
    *free = true;
    Mbarrier b;
    static_cast<emulator::Phases&>(b) = emulator::Phases(static_cast<int>(arrivals));
    b.slot = static_cast<int>(free - all.taken.begin());
    b.before = all.phases[b.slot];
    b.line = i.line;
    all.mbarriers[at] = b;
  }
}

void run_invalidate(Warp& w, const Instruction& i) {
  w.require(i, i.at(0), "the address");
  Asynchronous& all = *w.block->asynchronous;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const uint32_t at = shared_address_of(w, i.at(0), lane);
    Mbarrier& b = mbarrier_at(w, i, lane, at);
    for (const BulkCopy& copy : all.copies)
      if (copy.mbarrier == at)
        w.fail(i, lane,
               "invalidates " + text_of(at) + " while a copy issued at line " + std::to_string(copy.at->line) +
                   " is in flight");
    w.block->shared.check_write(w, i, lane, at, kMbarrierBytes, kUnwritten, nullptr);
    all.phases[b.slot] = b.time();
    all.taken[b.slot] = false;
    all.mbarriers.erase(at);
  }
}

enum Flag : uint32_t { kExpects = 1, kArrives = 2, kParity = 4, kBlocks = 8 };

// mbarrier.arrive, .arrive.expect_tx, .expect_tx. Operands: the state, [mbarrier], and a count of arrivals or bytes.
void run_arrive(Warp& w, const Instruction& i) {
  const int first = i.flags & kArrives ? 1 : 0;
  w.require(i, i.at(first), "the address");
  uint64_t states[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    const uint32_t at = shared_address_of(w, i.at(first), lane);
    Mbarrier& b = mbarrier_at(w, i, lane, at);
    const int64_t number = i.parts > first + 1 ? number_at(w, i, first + 1, lane, "a count") : 1;
    const int count = !(i.flags & kArrives) ? 0 : i.flags & kExpects ? 1 : static_cast<int>(number);
    if (!b.takes(count))
      w.fail(i, lane,
             "arrives at " + text_of(at) + ", where " + std::to_string(b.missing) + " of " +
                 std::to_string(b.arrivals) + " arrivals of phase " + std::to_string(b.phase) + " and " +
                 std::to_string(b.bytes) + " bytes are missing");
    states[lane] = b.phase;
    if (i.flags & kExpects) b.expect(number);
    if (count == 0) continue;
    w.block->shared.join_into(b.arrived, w.index);
    b.arrive(count);
    end_phase(w, i, at, b);
  }
  w.block->shared.advance(w.index);
  if (i.flags & kArrives) w.put(i, i.at(0), states, kAllLanes);
}

// Whether the phase that a lane waits for is over. What arrived is then ordered before what the warp does next.
bool is_over(Warp& w, const Instruction& i, int lane) {
  const uint32_t at = shared_address_of(w, i.at(1), lane);
  Mbarrier& b = mbarrier_at(w, i, lane, at);
  const auto parity = static_cast<int>(w.value(i.at(2), lane) & 1);
  if (!b.ended(parity)) land_all(*w.block, at, b);
  if (!b.ended(parity)) return false;
  w.block->shared.learn(w.index, b.over);
  return true;
}

bool ready_to_go_on(Warp& w) {
  const auto lane = static_cast<int>(w.wait.detail);
  const uint32_t at = shared_address_of(w, w.wait.at->at(1), lane);
  const auto found = w.block->asynchronous->mbarriers.find(at);
  if (found == w.block->asynchronous->mbarriers.end()) return true;  // the instruction then fails
  land_all(*w.block, at, found->second);
  return found->second.ended(static_cast<int>(w.wait.more));
}

// try_wait waits until the phase is over: a GPU gives up after a time that it chooses, and code tries again. test_wait
// does not wait.
void run_wait(Warp& w, const Instruction& i) {
  w.require(i, i.at(1), "the address");
  w.require(i, i.at(2), i.flags & kParity ? "the parity" : "the state");
  uint32_t over = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    if (is_over(w, i, lane)) {
      over |= 1u << lane;
      continue;
    }
    w.pause();
    if (!(i.flags & kBlocks)) continue;
    w.wait = {ready_to_go_on, "the end of a phase of an mbarrier", static_cast<uint64_t>(lane),
              static_cast<int64_t>(w.value(i.at(2), lane) & 1), &i};
    w.pc -= 1;  // it is executed again
    return;
  }
  w.put_mask(i, i.at(0), over, kAllLanes);
}

void run_proxy_fence(Warp& w, const Instruction&) {
  w.block->shared.fence(w.index, w.active);
}

void run_init_fence(Warp& w, const Instruction&) {
  for (auto& [at, b] : w.block->asynchronous->mbarriers) {
    const History& h = w.block->shared.history(at);
    b.fenced |= h.writer == w.index && w.active >> h.write_lane & 1;
  }
}

}  // namespace

Mbarrier& mbarrier_at(Warp& w, const Instruction& i, int lane, uint64_t at) {
  w.block->shared.check_bounds(w, i, lane, static_cast<int64_t>(at), kMbarrierBytes, kMbarrierBytes);
  auto& all = w.block->asynchronous->mbarriers;
  const auto found = all.find(static_cast<uint32_t>(at));
  if (found == all.end()) w.fail(i, lane, "uses " + text_of(at) + ", which nobody has initialised");
  const History& h = w.block->shared.history(static_cast<int64_t>(at));
  if (h.write_line != found->second.line)
    w.fail(i, lane, "uses " + text_of(at) + ", which was overwritten at line " + std::to_string(h.write_line));
  if (!w.block->shared.ordered(w.index, h.writer, h.write_time))
    w.finding(i, lane,
              "uses " + text_of(at) + ", initialised at line " + std::to_string(h.write_line) +
                  ", and no barrier orders the two");
  return found->second;
}

void issue(Warp& w, const Instruction& i, int lane, uint64_t mbarrier, std::vector<Piece> pieces) {
  Mbarrier& b = mbarrier_at(w, i, lane, mbarrier);
  SharedMemory& shared = w.block->shared;
  const History& h = shared.history(static_cast<int64_t>(mbarrier));
  if (w.launch->pedantic && !b.fenced && !shared.is_fenced(w, h.writer, h.write_lane, h.write_time, h.write_fences))
    w.finding(i, lane,
              "copies for " + text_of(mbarrier) + ", initialised at line " + std::to_string(b.line) +
                  ", and no fence.mbarrier_init or fence.proxy.async follows that");
  for (const Piece& piece : pieces) {
    shared.begin_copy(w, i, lane, piece.at, piece.bytes, kMaxWarps + b.slot, b.time());
    std::memset(shared.data() + piece.at, 0xff, piece.bytes);
  }
  w.launch->counters.events["bulk_copies"] += 1;
  int64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  w.launch->counters.events["bulk_bytes"] += bytes;
  w.block->asynchronous->copies.push_back({static_cast<uint32_t>(mbarrier), b.phase, &i, &w, std::move(pieces)});
}

void start_asynchronous(Block& b) {
  b.asynchronous = std::make_shared<Asynchronous>();
  b.asynchronous->warps.resize(b.warps.size());
  b.asynchronous->groups.resize(b.warps.size() / kWarpsOfGroup);
  start_products(b);
}

void count_events(Block& b) {
  const Asynchronous& all = *b.asynchronous;
  for (const auto& [name, count] :
       {std::pair{"mma", all.mma}, {"mma_multiply_adds", all.mma_multiply_adds}, {"cp_async", all.cp_async}})
    if (count > 0) b.launch->counters.events[name] += count;
}

template <class T>
static bool is_empty(const std::vector<T>& group) {
  return group.empty();
}
static bool is_empty(const CopyGroup& group) {
  return group.pieces.empty();
}

std::string left_in_flight(Block& b) {
  for (const BulkCopy& copy : b.asynchronous->copies)
    return "a bulk copy issued at line " + std::to_string(copy.at->line) + " is in flight: nobody waited at " +
           text_of(copy.mbarrier);
  const auto any = [](const auto& open, const auto& groups) {
    bool found = !open.empty();
    for (const auto& group : groups) found |= !is_empty(group);
    return found;
  };
  for (size_t n = 0; n < b.warps.size(); ++n) {
    const OfWarp& warp = b.asynchronous->warps[n];
    const std::string who = " of warp " + std::to_string(n) + " is in flight: it was never waited for";
    if (any(warp.copies, warp.copy_groups)) return "a cp.async" + who;
    if (any(warp.products, warp.product_groups)) return "a wgmma" + who;
    if (any(warp.stores, warp.store_groups)) return "a bulk copy to global memory" + who;
  }
  for (const OfGroup& group : b.asynchronous->groups)
    if (!group.products.empty())
      return "the wgmma at line " + std::to_string(group.products.front()->at->line) + " was executed by " +
             std::to_string(group.products.front()->warps) + " of the four warps of a warpgroup";
  return "";
}

Form decode_mbarrier(Modifiers& m) {
  Form f;
  if (!m.take("b64")) return f;
  const bool shared = m.take("shared") || m.take("shared::cta");
  m.take_one({"relaxed", "acquire", "release"});
  m.take_one({"cta", "cluster"});
  if (!shared) return f;
  const Want count{Want::kRead, Type::kU32}, address{Want::kMemory};
  if (m.take("init")) {
    f.run = run_init;
    f.wants = {address, count};
  } else if (m.take("inval")) {
    f.run = run_invalidate;
    f.wants = {address};
  } else if (m.take("arrive")) {
    f.flags = kArrives;
    if (m.take("expect_tx")) f.flags |= kExpects;
    f.run = run_arrive;
    f.wants = {{Want::kWrite, Type::kB64}, address, count};
    f.wants[2].optional = !(f.flags & kExpects);
  } else if (m.take("expect_tx")) {
    f.flags = kExpects;
    f.run = run_arrive;
    f.wants = {address, count};
  } else {
    f.flags = m.take("try_wait") ? uint32_t{kBlocks} : 0;
    if (f.flags == 0 && !m.take("test_wait")) return f;
    if (m.take("parity")) f.flags |= kParity;
    f.run = run_wait;
    f.wants = {{Want::kWrite, Type::kPred}, address, {Want::kRead, f.flags & kParity ? Type::kB32 : Type::kB64}};
    if (f.flags & kBlocks) f.wants.push_back({Want::kRead, Type::kU32, true});
  }
  return f;
}

Form decode_proxy_fence(Modifiers& m) {
  Form f;
  if (m.take("proxy") && m.take("async")) {
    m.take_one({"shared::cta", "shared::cluster", "global"});
    f.run = run_proxy_fence;
  } else if (m.take("mbarrier_init")) {
    if (m.take("release") & m.take("cluster")) f.run = run_init_fence;
  }
  return f;
}

}  // namespace ptx
