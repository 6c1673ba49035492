// Addresses of an access, the records of what it touches, and its bytes.
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

struct Bytes {
  uint8_t data[kWarp][16];
  bool known[kWarp][16];
};

// Whether a loaded byte may be known.
bool load_global(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, Bytes& out);
void store_global(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, const Bytes& in);
void load_shared(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, Bytes& out);
void store_shared(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, int bytes, const Bytes& in);

// Registers from loaded bytes; narrow ones are widened.
void put_bytes(Warp& w, const Instruction& i, const Operand& to, int bytes, const Bytes& in);
void take_bytes(Warp& w, const Instruction& i, const Operand& from, int bytes, Bytes& out);

}  // namespace sass
