// Hopper's wgmma. hopper_state.h has its state, include/emulator/hopper.h lists what is checked.

#include <resnet_fast/hopper.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <emulator/operand.h>
#include <emulator/product.h>
#include <resnet_fast/fragments.h>

#include "state.h"

namespace emulator {
namespace {

using resnet_fast::kWarpgroup;

constexpr int kRows = 64, kDepth = 16;
constexpr int kChunk = kChunkBytes, kChunks = kDepth * 2 / kChunk;  // chunks of an operand's row
constexpr int kWavefront = 128;

// Returns the byte addresses of an operand's chunks, two per row.
std::vector<uint32_t> chunks_of(uint64_t descriptor, int rows, Where where) {
  const Operand operand(descriptor);
  if (!operand.starts_with_pattern())
    fail(where, "a descriptor's rows, from shared memory byte " + std::to_string(operand.start) + " in groups " +
                    std::to_string(operand.stride) + " bytes apart, do not start where the swizzle's pattern does");
  std::vector<uint32_t> chunks;
  for (int row = 0; row < rows; ++row)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      chunks.push_back(operand.along(row, chunk));
      check_bounds(chunks.back(), kChunk, where);
    }
  return chunks;
}

// Starts the read of an operand chunk by a warp, which lasts until the warp waits.
void begin_read(uint32_t at, int warp, Where where) {
  for (uint32_t g = at / kGranule; g < (at + kChunk) / kGranule; ++g) {
    History& h = now->history[g];
    if (h.state != kWritten)
      fail(where, "multiplies shared memory byte " + std::to_string(g * kGranule) +
                      (h.state == kInFlight ? " while " + thread_text(h.writer) + " write it: wait for them first"
                                            : ", which nobody has written"));
    if (!ordered_for(warp, h.writer, h.write_time))
      race(where, g * kGranule, "multiplies", "wrote", h.writer, h.write_site);
    expect_fenced(h, g * kGranule, "multiplies", where);
    h.operand_of += 1;
  }
}

void end_read(uint32_t at, int thread, uint32_t time) {
  for (uint32_t g = at / kGranule; g < (at + kChunk) / kGranule; ++g) {
    now->history[g].operand_of -= 1;
    note_read(now->history[g], thread, time);
  }
}

// The content of a register while a product in flight reads or writes it: NaN in every format.
constexpr uint32_t kPoison = 0xffffffffu;
constexpr int kWordsOfA = 4;  // of one thread

// Fails where a thread's accumulators changed since the product was issued: the thread wrote them, or they went out of
// scope.
void expect_untouched(const float* d, int count, Where where) {
  for (int i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, &d[i], sizeof(word));
    if (word != kPoison) fail(where, "the accumulators of this wgmma were written before it was waited for");
  }
}

// Returns the value of a register of operand a for a product that is issued, and poisons the register. Products in
// flight may share it.
uint32_t hold(Thread& thread, uint32_t* word, Where where) {
  for (Held& held : thread.async.held) {
    if (held.word != word) continue;
    if (*word != kPoison)
      fail(where, "a register of operand a was written before the wgmma that reads it was waited for");
    held.products += 1;
    return held.value;
  }
  thread.async.held.push_back({word, *word, 1});
  return std::exchange(*word, kPoison);
}

// Gives a register of operand a back after a wait.
void let_go(Thread& thread, uint32_t* word, Where where) {
  auto& all = thread.async.held;
  const auto held = std::find_if(all.begin(), all.end(), [&](const Held& h) { return h.word == word; });
  if (*word != kPoison) fail(where, "the registers of operand a of this wgmma were written before it was waited for");
  if (--held->products > 0) return;
  *word = held->value;
  all.erase(held);
}

template <typename F>
void for_chunks_of_warp(const Product& product, int warp_of_group, F f) {
  constexpr int kOfWarp = 16 * kChunks;
  if (!product.a.empty())
    for (int i = 0; i < kOfWarp; ++i) f(product.a[warp_of_group * kOfWarp + i]);
  for (uint32_t at : product.b) f(at);
}

float number_at(const std::vector<uint32_t>& chunks, int row, int k, float (*widened)(uint16_t)) {
  uint16_t raw;
  std::memcpy(&raw, now->shared + chunks[row * kChunks + k / 8] + k % 8 * 2, 2);
  return widened(raw);
}

std::shared_ptr<Chain> chain_of(Warpgroup& group, int first_thread, Where where) {
  const auto argument = [&](int t) { return static_cast<const Wgmma*>(group.arguments[t]); };
  auto& all = group.chains;
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto& c) { return c.use_count() == 1; }), all.end());
  for (const auto& chain : all)
    if (chain->d[0] == argument(0)->d && chain->each * kWarpgroup == argument(0)->columns * kRows) return chain;
  const auto chain = std::make_shared<Chain>();
  chain->each = argument(0)->columns * kRows / kWarpgroup;
  chain->value.resize(argument(0)->columns * kRows);
  for (int t = 0; t < kWarpgroup; ++t) {
    if (!now->threads[first_thread + t].async.registers_fenced)
      fail(where, "a wgmma takes registers that were free to change: no wgmma_fence since the last wgmma_wait");
    chain->d[t] = argument(t)->d;
    for (int i = 0; i < chain->each; ++i)
      chain->value[resnet_fast::wgmma_row(t, i % 4) * argument(0)->columns +
                   resnet_fast::wgmma_column(t, i / 4, i % 4)] = chain->d[t][i];
  }
  all.push_back(chain);
  return chain;
}

void multiply(Warpgroup& group, int first_thread, Where where) {
  const auto argument = [&](int t) -> const Wgmma& { return *static_cast<const Wgmma*>(group.arguments[t]); };
  const Wgmma& first = argument(0);
  for (int t = 1; t < kWarpgroup; ++t) {
    const Wgmma& other = argument(t);
    if (other.a_descriptor != first.a_descriptor || other.b_descriptor != first.b_descriptor ||
        other.accumulate != first.accumulate)
      fail(where, "the threads of a warpgroup name different operands");
  }
  const auto product = std::make_shared<Product>();
  product->b = chunks_of(first.b_descriptor, first.columns, where);
  if (first.a == nullptr) product->a = chunks_of(first.a_descriptor, kRows, where);
  for (int w = 0; w < kWarpgroup / kWarp; ++w)
    for_chunks_of_warp(*product, w, [&](uint32_t at) { begin_read(at, first_thread / kWarp + w, where); });

  std::vector<std::array<float, kDepth>> a(kRows);
  std::vector<float> b(kDepth * first.columns);
  for (int row = 0; first.a == nullptr && row < kRows; ++row)
    for (int k = 0; k < kDepth; ++k) a[row][k] = number_at(product->a, row, k, first.widened);
  for (int t = 0; first.a != nullptr && t < kWarpgroup; ++t) {
    if (!now->threads[first_thread + t].async.registers_fenced)
      fail(where, "a wgmma takes operand a from registers with no wgmma_fence after the last ldmatrix");
    product->registers[t] = argument(t).a;
    for (int w = 0; w < kWordsOfA; ++w) {
      const uint32_t pair = hold(now->threads[first_thread + t], argument(t).a + w, where);
      for (int i = 0; i < 2; ++i)
        a[t / kWarp * 16 + resnet_fast::a_row(t % kWarp, w)][resnet_fast::a_k(t % kWarp, w) + i] =
            first.widened(static_cast<uint16_t>(pair >> 16 * i));
    }
  }
  for (int column = 0; column < first.columns; ++column)
    for (int k = 0; k < kDepth; ++k) b[k * first.columns + column] = number_at(product->b, column, k, first.widened);

  product->chain = chain_of(group, first_thread, where);
  std::vector<float>& d = product->chain->value;
  if (!first.accumulate) std::fill(d.begin(), d.end(), 0.0f);
  multiply_add(d.data(), a[0].data(), b.data(), kRows, first.columns, kDepth);
  for (int t = 0; t < kWarpgroup; ++t) {
    std::memset(product->chain->d[t], 0xff, product->chain->each * sizeof(float));  // kPoison
    now->threads[first_thread + t].async.issued.push_back(product);
    now->threads[first_thread + t].where = where;
  }

  SiteCount& site = count_of(now->sites.id(where, Kind::kWgmma));
  const uint64_t wavefronts = (product->a.size() + product->b.size()) * kChunk / kWavefront;
  site.instructions += 1;
  site.units += wavefronts;
  site.least += wavefronts;
  now->counters.wgmma += 1;
  now->counters.wgmma_multiply_adds += static_cast<uint64_t>(kRows) * first.columns * kDepth;
}

}  // namespace

void wgmma(Wgmma argument, Where where) {
  Thread& me = self();
  const int index = me.index / kWarpgroup, first = index * kWarpgroup;
  if (first + kWarpgroup > now->grid.threads) fail(where, "a wgmma needs four warps, from a multiple of four on");
  Warpgroup& group = now->hopper.warpgroups[index];
  if (group.arrived == 0) {
    group.where = where;
  } else if (group.where.line != where.line || std::strcmp(group.where.file, where.file) != 0) {
    fail(where,
         "threads of a warpgroup part: this one is at a wgmma, others wait for the one at " + text_of(group.where));
  }
  group.arguments[me.index - first] = &argument;
  group.arrived += 1;
  if (group.arrived < kWarpgroup) return wait_at("wgmma of the warpgroup", where);
  group.arrived = 0;
  multiply(group, first, where);
  for (int t = first; t < first + kWarpgroup; ++t) release(t);
  yield_from(me.index);
}

void expect_free(const void* registers, int words, const char* doing, Where where) {
  const auto* first = static_cast<const uint32_t*>(registers);
  for (const Held& held : self().async.held)
    if (held.word >= first && held.word < first + words)
      fail(where, std::string(doing) + " registers of operand a of a wgmma that is in flight: wait for it first");
}

void wgmma_fence() {
  self().async.registers_fenced = true;
}

void wgmma_commit() {
  Asynchronous& mine = self().async;
  mine.groups.push_back(std::move(mine.issued));
  mine.issued.clear();
}

void wgmma_wait(int pending) {
  Thread& me = self();
  Asynchronous& mine = me.async;
  mine.registers_fenced = false;
  if (mine.groups.size() <= static_cast<size_t>(pending)) return;
  const auto end = mine.groups.begin() + static_cast<ptrdiff_t>(mine.groups.size() - pending);
  Products done;
  for (auto group = mine.groups.begin(); group != end; ++group) done.insert(done.end(), group->begin(), group->end());
  mine.groups.erase(mine.groups.begin(), end);
  const auto goes_on = [&](const std::shared_ptr<Chain>& chain) {
    const auto of_chain = [&](const auto& product) { return product->chain == chain; };
    bool any = std::any_of(mine.issued.begin(), mine.issued.end(), of_chain);
    for (const Products& group : mine.groups) any |= std::any_of(group.begin(), group.end(), of_chain);
    return any;
  };
  const int thread = me.index % kWarpgroup;
  std::vector<const Chain*> written;
  for (const auto& product : done) {
    if (self_lane() == 0)
      for_chunks_of_warp(*product, thread / kWarp, [&](uint32_t at) { end_read(at, me.index, time_of(self_warp())); });
    if (uint32_t* words = product->registers[thread])
      for (int w = 0; w < kWordsOfA; ++w) let_go(me, words + w, me.where);
    const Chain& chain = *product->chain;
    if (goes_on(product->chain) || std::count(written.begin(), written.end(), &chain)) continue;
    written.push_back(&chain);
    expect_untouched(chain.d[thread], chain.each, me.where);
    const int columns = chain.each * kWarpgroup / kRows;
    for (int i = 0; i < chain.each; ++i)
      chain.d[thread][i] =
          chain
              .value[resnet_fast::wgmma_row(thread, i % 4) * columns + resnet_fast::wgmma_column(thread, i / 4, i % 4)];
  }
}

}  // namespace emulator
