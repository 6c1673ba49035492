// Addresses of an access, and the records of what it touches.
#pragma once

#include "warp.h"

namespace sass {

struct Addresses {
  uint64_t at[kWarp];
};

// Addresses of `lanes`. An unknown one is an error.
Addresses addresses_of(Warp& w, const Instruction& i, const Operand& o, uint32_t lanes, bool global);

// Notes the distinct sectors of an access to global memory.
void note_global(Warp& w, Event& e, const uint64_t* at, uint32_t lanes, int bytes, bool reads, bool writes);

// Notes the rounds through the 32 banks.
void note_banks(Warp& w, Event& e, const uint64_t* at, uint32_t lanes, int bytes);

void check_shared(Warp& w, const Instruction& i, uint64_t at, int bytes);

}  // namespace sass
