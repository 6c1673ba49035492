// A warp: its lanes' registers, and what its instructions use to read and write them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "instruction.h"

namespace ptx {

struct Block;
struct Launch;

// Lanes that run together. They go on from `pc`, until they come to `meet`, where the entry below continues.
struct Path {
  int32_t pc = 0, meet = -1;
  uint32_t lanes = 0;
  uint32_t held = 0;  // the lanes that were alive when this path last let others go first
};

// What a warp waits for. The scheduler asks `ready` whenever it could run the warp.
struct Wait {
  bool (*ready)(Warp& warp) = nullptr;
  const char* what = "";
  uint64_t detail = 0;  // as `ready` defines it: the number of a barrier, the address of an mbarrier
  int64_t more = 0;
  const Instruction* at = nullptr;
};

struct Warp {
  Block* block = nullptr;
  Launch* launch = nullptr;
  int index = 0;

  // Registers: at Slot::at, 32 lanes of 2, 4, 8 or 16 bytes each, or the 32 bits of a predicate.
  uint8_t* file = nullptr;
  // By register, the lanes that hold a defined value. An instruction's result is defined in the lanes in which its
  // operands are; where a value matters (an address, a predicate of a branch or guard, what is stored in global memory,
  // an operand of a product), an undefined one is a finding.
  uint32_t* written = nullptr;
  // Laid out as `file`: in a lane that `written` lacks, which bits of the register are undefined, as of
  // `mov.b32 a, {b, undefined}`. In other lanes it means nothing.
  uint8_t* undefined_bits = nullptr;
  // By register, whether `undefined_bits` has been set for it. If not, lanes that `written` lacks are wholly undefined,
  // as at the start of a block: bits are only kept of registers that are defined in part.
  uint8_t* keeps_bits = nullptr;
  // By register, the lanes that an asynchronous product still reads or writes. Any use is a finding.
  uint32_t* pending = nullptr;
  int pending_registers = 0;  // how many have a bit in `pending`

  uint32_t active = 0;  // lanes that execute the present instruction: of this path, and its guard holds
  uint32_t path = 0;    // lanes of the present path
  uint32_t held = 0;    // Path::held of the present path
  uint32_t alive = 0;   // lanes that have not left the kernel
  uint32_t carry = 0;   // the condition code of add.cc, by lane
  int32_t pc = 0;       // the next instruction; a branch sets it
  int32_t meet = -1;
  std::vector<Path> below;  // paths that wait for this one, the innermost last
  int64_t quantum = 0;      // instructions until another warp may run
  bool done = false;
  Wait wait;
  std::vector<uint8_t> local, local_written;  // lane by lane

  template <class T>
  const T* in(const Slot& s) const {
    return reinterpret_cast<const T*>(file + s.at);
  }
  template <class T>
  T* out(const Slot& s) {
    return reinterpret_cast<T*>(file + s.at);
  }
  // The lanes in which a predicate holds.
  uint32_t mask(const Slot& s) const {
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(file + s.at);
    return s.negated ? ~bits : bits;
  }
  // A lane's value, widened as the register's bits, without a sign.
  uint64_t value(const Slot& s, int lane) const;

  // The lanes in which a register that is read is defined; a finding if it is pending.
  uint32_t defined(const Instruction& i, const Slot& s) {
    if (pending_registers > 0 && (pending[s.reg] & active)) used_while_pending(i, s);
    return written[s.reg];
  }
  // The lanes in which these bits of it are defined.
  uint32_t defined(const Instruction& i, const Slot& s, int first, int bits) {
    const uint32_t whole = defined(i, s);
    return (active & ~whole) == 0 ? whole : defined_partly(s, first, bits);
  }
  // The undefined bits of a lane of a register that is as wide as T.
  template <class T>
  T undefined_in(const Slot& s, int lane) const {
    if (written[s.reg] >> lane & 1) return T{0};
    return keeps_bits[s.reg] ? reinterpret_cast<const T*>(undefined_bits + s.at)[lane] : static_cast<T>(~T{0});
  }
  uint64_t undefined_value(const Slot& s, int lane) const;
  // The undefined bits, by lane, of a register that was just written.
  template <class T>
  void note_bits(const Slot& s, const T* bits) {
    if (s.absent) return;
    keep_bits(s);
    T* to = reinterpret_cast<T*>(undefined_bits + s.at);
    for (int lane = 0; lane < kWarp; ++lane) {
      const uint32_t bit = 1u << lane;
      if (!(active & bit)) continue;
      to[lane] = bits[lane];
      written[s.reg] = bits[lane] == 0 ? written[s.reg] | bit : written[s.reg] & ~bit;
    }
  }
  // Of a register that was just written: `count` of its bits are defined in the lanes `known`, and in no others.
  void note_part(const Slot& s, int first, int count, uint32_t known);
  // A finding unless all active lanes are defined. `what` names the operand: "the address".
  void require(const Instruction& i, const Slot& s, const char* what) {
    if (active & ~defined(i, s)) undefined(i, s, what);
  }

  // Stores 32 lanes in a register, for the active lanes.
  template <class T>
  void put(const Instruction& i, const Slot& s, const T* values, uint32_t defined) {
    if (s.absent) return;
    T* to = out<T>(s);
    if (active == kAllLanes) {
      std::memcpy(to, values, sizeof(T) * kWarp);
    } else {
      for (int lane = 0; lane < kWarp; ++lane) to[lane] = active >> lane & 1 ? values[lane] : to[lane];
    }
    note(i, s, defined);
  }
  void put_mask(const Instruction& i, const Slot& s, uint32_t bits, uint32_t defined) {
    if (s.absent) return;
    uint32_t& to = *out<uint32_t>(s);
    to = (to & ~active) | (bits & active);
    note(i, s, defined);
  }
  // A register's active lanes were written; they are defined where `defined` says.
  void note(const Instruction& i, const Slot& s, uint32_t defined) {
    if (pending_registers > 0 && (pending[s.reg] & active)) used_while_pending(i, s);
    written[s.reg] = (written[s.reg] & ~active) | (defined & active);
    if ((active & ~defined) && keeps_bits[s.reg]) forget(s, active & ~defined);
  }

  void pause() {
    quantum = 0;
  }

  // Reports. `lane` may be -1: the whole warp. finding() throws Fault if the launch is strict, and returns otherwise;
  // fail() always throws, for what cannot be continued after.
  void finding(const Instruction& i, int lane, const std::string& what);
  [[noreturn]] void fail(const Instruction& i, int lane, const std::string& what);

  // A finding unless all lanes that are alive execute the instruction, as an .aligned one demands.
  void require_together(const Instruction& i);

  // Every bit of these lanes becomes undefined.
  void forget(const Slot& s, uint32_t lanes);
  void keep_bits(const Slot& s);
  uint32_t defined_partly(const Slot& s, int first, int bits) const;

  void used_while_pending(const Instruction& i, const Slot& s);
  void undefined(const Instruction& i, const Slot& s, const char* what);
};

// `bits` ones from bit `first` on.
constexpr uint64_t bit_field(int first, int bits) {
  return (bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1) << first;
}

inline int first_lane(uint32_t lanes) {
  return lanes ? __builtin_ctz(lanes) : -1;
}

}  // namespace ptx
