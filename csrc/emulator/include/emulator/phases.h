// The state of an mbarrier: a phase ends when no arrivals and no bytes are missing (PTX ISA, "Phase of the mbarrier
// object").
#pragma once

#include <cstdint>

namespace emulator {

struct Phases {
  int arrivals = 0;   // per phase
  int missing = 0;    // arrivals, in this phase
  int64_t bytes = 0;  // expected in this phase and not yet arrived
  uint32_t phase = 0;

  Phases() = default;
  explicit Phases(int arrivals) : arrivals(arrivals), missing(arrivals) {
  }

  // Whether `count` more threads may arrive in this phase.
  bool takes(int count) const {
    return count <= missing;
  }
  void expect(int64_t more) {
    bytes += more;
  }
  void arrive(int count) {
    missing -= count;
  }
  void complete(int64_t arrived) {
    bytes -= arrived;
  }
  // More bytes came than were expected by all who arrived.
  bool overfull() const {
    return missing == 0 && bytes < 0;
  }
  // Begins the next phase if this one is complete.
  bool advance() {
    if (missing > 0 || bytes != 0) return false;
    phase += 1;
    missing = arrivals;
    return true;
  }
  // Whether a wait for the phase of this parity is over: the running phase has the other one.
  bool ended(int parity) const {
    return static_cast<int>(phase & 1) != (parity & 1);
  }
};

}  // namespace emulator
