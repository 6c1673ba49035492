// The requests of a program to callgrind, the tool of valgrind that runs it. Without valgrind they do nothing.
// See callgrind.py.

#include <valgrind/callgrind.h>

// Counts from here on, in every thread.
extern "C" void callgrind_start() {
  CALLGRIND_START_INSTRUMENTATION;
}

// Stops counting, and runs faster.
extern "C" void callgrind_stop() {
  CALLGRIND_STOP_INSTRUMENTATION;
}

// Writes what was counted since the last such request to a file of its own, under this name, and counts from zero.
extern "C" void callgrind_dump(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
}
