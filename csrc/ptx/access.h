// Addresses of lanes, checked.
#pragma once

#include "machine.h"

namespace ptx {

enum class Space : uint32_t { kGeneric, kGlobal, kShared, kLocal, kParameter };

// The lanes' addresses of one instruction, by where they lead.
struct Reached {
  std::array<uint8_t*, kWarp> at{};            // of each active lane
  std::array<uint64_t, kWarp> address{};       // in its space
  uint32_t global = 0, shared = 0, local = 0;  // lanes
  uint32_t defined = 0;                        // lanes whose bytes are all defined, if they are read
  bool load = false;                           // a race of a load with a store of the block makes it undefined
};

// Checks bounds, alignment and history of every active lane's access. What is written is marked so, with
// `written` saying which lanes write a defined value; `data`, if given, points to `bytes` for each lane.
void reach(Warp& w, const Instruction& i, const Slot& base, Space space, int bytes, Use use, uint32_t written,
           const uint8_t* data, Reached& out);

// Takes a state space off a memory instruction; and cache hints with an order and its scope, which it returns.
Space take_space(Modifiers& m);
uint8_t take_order(Modifiers& m);

}  // namespace ptx
