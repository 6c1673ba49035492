// Fibers: cooperative threads that switch to each other explicitly. On x86-64 a switch takes fourteen instructions.
// Elsewhere ucontext does it, which also saves the signal mask and takes ten times as long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void resnet_fast_emulator_switch(void** save, void* load);
#else
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // The fiber of the running thread itself.
  Fiber() = default;
  // A fiber that calls `entry`, which must never return.
  Fiber(size_t stack_bytes, void (*entry)()) : stack_(new unsigned char[stack_bytes]), bytes_(stack_bytes) {
    reset(entry);
  }

  void reset(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    // The last block's frames on this stack never returned, so the sanitizer still considers their variables poisoned.
    __asan_unpoison_memory_region(stack_.get(), bytes_);
#endif
#if defined(__x86_64__)
    auto top = (reinterpret_cast<uintptr_t>(stack_.get()) + bytes_) & ~uintptr_t{15};
    auto* words = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 6; ++i) words[i] = 0;       // the saved registers
    words[6] = reinterpret_cast<uintptr_t>(entry);  // where the first switch returns to
    words[7] = 0;                                   // entry has no caller
    saved_ = words;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Saves this fiber and continues `next`. Returns when another fiber switches back.
  void switch_to(Fiber& next) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    const void* bottom = next.stack_ ? next.stack_.get() : next.own_bottom_;
    __sanitizer_start_switch_fiber(&fake, bottom, next.stack_ ? next.bytes_ : next.own_bytes_);
    coming_from_ = this;
#endif
#if defined(__x86_64__)
    resnet_fast_emulator_switch(&saved_, next.saved_);
#else
    swapcontext(&context_, &next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    arrived(fake);
#endif
  }

  // An entry must call this first.
  static void arrived(void* fake = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake, &bottom, &bytes);
    if (coming_from_ != nullptr && !coming_from_->stack_) {
      coming_from_->own_bottom_ = bottom;
      coming_from_->own_bytes_ = bytes;
    }
#else
    (void)fake;
#endif
  }

 private:
  std::unique_ptr<unsigned char[]> stack_;
  size_t bytes_ = 0;
#if defined(__x86_64__)
  void* saved_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* own_bottom_ = nullptr;
  size_t own_bytes_ = 0;
  static inline Fiber* coming_from_ = nullptr;
#endif
};

}  // namespace emulator
