// A resource with a rate, as a calendar: how much of each span of time is taken.
//
// A queue that serves in the order of issue would let a request that needs the resource late hold up one that needs it
// early: a product reads its operands over 64 cycles, and a load between two of those reads does not wait for the last.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sm {

class Calendar {
 public:
  static constexpr double kSpan = 8;  // cycles

  // Takes `amount` cycles of the resource from time `from` on, wherever it is free. Returns when the last is done.
  double take(double from, double amount) {
    if (amount <= 0) return from;
    taken_ += amount;
    double left = amount, end = from;
    size_t b = static_cast<size_t>(from / kSpan);
    grow(b);
    double begin = from - b * kSpan;  // of the first span, what is before `from` cannot be used
    for (;;) {
      b = open(b);
      if (b * kSpan > from) begin = 0;
      double room = std::min(kSpan - used_[b], kSpan - begin);
      double part = std::min(room, left);
      if (part > 0) {
        used_[b] += static_cast<float>(part);
        left -= part;
        end = b * kSpan + std::max(static_cast<double>(used_[b]), begin + part);
      }
      if (used_[b] > kSpan - 1e-3) next_[b] = static_cast<uint32_t>(b + 1);
      if (left <= 1e-6) break;
      begin = 0;
      grow(++b);
    }
    return std::max(end, from + amount);
  }

  // Takes `amount` evenly over `duration`, as a unit does that reads ahead of its work.
  double spread(double from, double amount, double duration) {
    if (amount <= 0) return from;
    int parts = std::max(1, static_cast<int>(std::ceil(std::max(amount, duration) / kSpan)));
    double end = from;
    for (int i = 0; i < parts; ++i) end = std::max(end, take(from + i * kSpan, amount / parts));
    return end;
  }

  double taken() const {
    return taken_;
  }

 private:
  // The first span from `b` on that is not full. Shortens the chains that it follows.
  size_t open(size_t b) {
    size_t root = b;
    for (grow(root); next_[root] != root; grow(root)) root = next_[root];
    while (next_[b] != b) {
      size_t after = next_[b];
      next_[b] = static_cast<uint32_t>(root);
      b = after;
    }
    return root;
  }

  void grow(size_t b) {
    while (used_.size() <= b + 1) {
      next_.push_back(static_cast<uint32_t>(next_.size()));
      used_.push_back(0);
    }
  }

  std::vector<float> used_;
  std::vector<uint32_t> next_;  // of a full span: one from which to look on
  double taken_ = 0;
};

}  // namespace sm
