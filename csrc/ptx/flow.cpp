// Where lanes that part at a branch meet again: the first instruction of the branch's immediate post-dominator.
//
// A block post-dominates another if every way from that one to the end of the kernel leads through it. They are
// computed as in "A Simple, Fast Dominance Algorithm" (Cooper, Harvey, Kennedy, 2001), on the reversed graph.

#include <algorithm>

#include "instruction.h"

namespace ptx {
namespace {

struct Graph {
  std::vector<int32_t> block_of;  // by instruction
  std::vector<int32_t> first, last;
  std::vector<std::vector<int32_t>> after, before;  // the last block is the kernel's end
};

bool is_branch(const Instruction& i) {
  return i.target >= 0 || !i.targets.empty();
}

Graph graph_of(const std::vector<Instruction>& code) {
  const auto count = static_cast<int32_t>(code.size());
  std::vector<bool> leads(count + 1, false);
  leads[0] = true;
  for (int32_t n = 0; n < count; ++n) {
    const Instruction& i = code[n];
    if (i.target >= 0) leads[i.target] = true;
    for (int32_t target : i.targets) leads[target] = true;
    if (is_branch(i) || i.run == run_exit) leads[n + 1] = true;
  }
  Graph g;
  g.block_of.resize(count);
  for (int32_t n = 0; n < count; ++n) {
    if (leads[n]) {
      g.first.push_back(n);
      g.last.push_back(n);
    }
    g.last.back() = n;
    g.block_of[n] = static_cast<int32_t>(g.first.size()) - 1;
  }
  const auto end = static_cast<int32_t>(g.first.size());
  g.after.resize(end + 1);
  g.before.resize(end + 1);
  const auto connect = [&](int32_t from, int32_t to) {
    g.after[from].push_back(to);
    g.before[to].push_back(from);
  };
  for (int32_t b = 0; b < end; ++b) {
    const Instruction& i = code[g.last[b]];
    if (i.target >= 0) connect(b, g.block_of[i.target]);
    for (int32_t target : i.targets) connect(b, g.block_of[target]);
    if (i.run == run_exit) connect(b, end);
    const bool falls = i.guarded || !(is_branch(i) || i.run == run_exit);
    if (falls && g.last[b] + 1 < count) connect(b, g.block_of[g.last[b] + 1]);
  }
  return g;
}

// Blocks from which the end can be reached, so that each comes after one that it can go to; the end is first.
std::vector<int32_t> order_from_end(const Graph& g) {
  const auto end = static_cast<int32_t>(g.first.size());
  std::vector<int32_t> order;
  std::vector<bool> seen(end + 1, false);
  std::vector<std::pair<int32_t, size_t>> open{{end, 0}};
  seen[end] = true;
  while (!open.empty()) {
    auto& [block, next] = open.back();
    if (next == g.before[block].size()) {
      order.push_back(block);
      open.pop_back();
      continue;
    }
    const int32_t before = g.before[block][next++];
    if (!seen[before]) {
      seen[before] = true;
      open.emplace_back(before, 0);
    }
  }
  std::reverse(order.begin(), order.end());
  return order;
}

std::vector<int32_t> post_dominators(const Graph& g) {
  const std::vector<int32_t> order = order_from_end(g);
  const auto end = static_cast<int32_t>(g.first.size());
  std::vector<int32_t> place(end + 1, -1), immediate(end + 1, -1);
  for (size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<int32_t>(i);
  immediate[end] = end;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t n = 1; n < order.size(); ++n) {
      int32_t common = -1;
      for (int32_t other : g.after[order[n]]) {
        if (immediate[other] < 0) continue;
        if (common < 0) common = other;
        for (int32_t mine = other; mine != common;) {
          while (place[mine] > place[common]) mine = immediate[mine];
          while (place[common] > place[mine]) common = immediate[common];
        }
      }
      if (common != immediate[order[n]]) {
        immediate[order[n]] = common;
        changed = true;
      }
    }
  }
  return immediate;
}

}  // namespace

void find_meeting_points(std::vector<Instruction>& code) {
  const Graph g = graph_of(code);
  const auto end = static_cast<int32_t>(g.first.size());
  const std::vector<int32_t> immediate = post_dominators(g);
  for (size_t n = 0; n < code.size(); ++n) {
    if (!is_branch(code[n])) continue;
    const int32_t block = immediate[g.block_of[n]];
    code[n].meet = block < 0 || block == end ? -1 : g.first[block];
  }
}

}  // namespace ptx
