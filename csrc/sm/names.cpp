// The names of reasons, pipes and actions.

#include "machine.h"

#include <iterator>

namespace sm {

namespace {

const char* const kReasonNames[] = {"issue",  "fixed",   "branch", "other",  "pipe", "registers",
                                    "queue",  "special", "shared", "l1",     "l2",   "dram",
                                    "copies", "barrier", "phase",  "tensor", "fence"};
const char* const kPipeNames[] = {"none",   "alu",     "fma",    "fma_heavy", "half", "special",
                                  "double", "uniform", "branch", "tensor",    "queue"};
const char* const kActionNames[] = {"plain",        "variable",   "branch",         "load",        "store",
                                    "atomic",       "copy",       "copy_group",     "copy_arrive", "scoreboard_wait",
                                    "shared",       "barrier",    "barrier_arrive", "phase_init",  "phase_arrive",
                                    "phase_wait",   "bulk_load",  "bulk_store",     "bulk_commit", "product",
                                    "group_arrive", "group_wait", "fence",          "exit"};
static_assert(std::size(kReasonNames) == kReasons && std::size(kPipeNames) == kPipes &&
              std::size(kActionNames) == static_cast<int>(Action::kCount));

}  // namespace

const char* name(Reason reason) {
  return kReasonNames[static_cast<int>(reason)];
}
const char* name(Pipe pipe) {
  return kPipeNames[static_cast<int>(pipe)];
}
const char* name(Action action) {
  return kActionNames[static_cast<int>(action)];
}

}  // namespace sm
