// Fibers: what a CUDA thread runs on, a stack of its own and a switch that asks nothing of the
// system, since a launch of 8,192 threads takes a million of them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#if defined(__x86_64__) || defined(__aarch64__)
#define EMULATOR_OWN_SWITCH
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

#ifdef EMULATOR_OWN_SWITCH
// Leaves what a function must not change on the stack, whose address it writes to `from`, and goes
// on from what another call has left at `to`.
extern "C" void emulator_switch(void** from, void* to);

#ifdef __APPLE__
#define EMULATOR_SWITCH "_emulator_switch"
#else
#define EMULATOR_SWITCH "emulator_switch"
#endif
#endif

#if defined(__x86_64__)
asm(".text\n" EMULATOR_SWITCH
    ":\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
constexpr int kSavedWords = 8, kReturnWord = 6;  // a word more, so that `entry` finds its alignment
#elif defined(__aarch64__)
asm(".text\n.p2align 2\n" EMULATOR_SWITCH
    ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n"
    "stp d14, d15, [sp, #144]\n mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
    "ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n"
    "ldp d14, d15, [sp, #144]\n add sp, sp, #160\n ret\n");
constexpr int kSavedWords = 20, kReturnWord = 11;
#endif

// A stack above a page that nobody may touch. Stacks are kept from launch to launch.
class Stack {
 public:
  explicit Stack(size_t number) {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) abort();
    bottom_ = static_cast<char*>(memory) + page;
    // Fibers are at the same depth in the same code: without an offset of its own, each one's
    // variables would take the same lines of the cache.
    size_ = kBytes - page - number % 61 * 64;
  }

  char* bottom() const { return bottom_; }
  size_t size() const { return size_; }

 private:
#ifdef EMULATOR_ASAN
  static constexpr size_t kBytes = 256 << 10;
#else
  static constexpr size_t kBytes = 64 << 10;
#endif
  char* bottom_;
  size_t size_;
};

inline const Stack& stack(size_t number) {
  static std::vector<Stack> stacks;
  while (stacks.size() <= number) stacks.emplace_back(stacks.size());
  return stacks[number];
}

// A thread of execution: that of the caller of `launch`, or a fiber once `begin` has been called.
class Fiber {
 public:
  // Prepares the fiber to run `entry`, which must never return, at the first switch to it.
  void begin(const Stack& stack, void (*entry)()) {
    bottom_ = stack.bottom();
    size_ = stack.size();
#ifdef EMULATOR_ASAN
    ASAN_UNPOISON_MEMORY_REGION(bottom_, size_);  // an abandoned fiber may have stood there
#endif
#ifdef EMULATOR_OWN_SWITCH
    void** saved = reinterpret_cast<void**>(bottom_ + size_) - kSavedWords;
    for (int i = 0; i < kSavedWords; ++i) saved[i] = nullptr;
    saved[kReturnWord] = reinterpret_cast<void*>(entry);
    saved_ = saved;
#else
    getcontext(&saved_);
    saved_.uc_stack.ss_sp = bottom_;
    saved_.uc_stack.ss_size = size_;
    saved_.uc_link = nullptr;
    makecontext(&saved_, entry, 0);
#endif
  }

  // From this fiber, which is running, to another.
  void switch_to(Fiber& to) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
    came_from_ = this;
#endif
#ifdef EMULATOR_OWN_SWITCH
    emulator_switch(&saved_, to.saved_);
#else
    swapcontext(&saved_, &to.saved_);
#endif
    arrived();
  }

  // To be called first in `entry`.
  void arrived() {
#ifdef EMULATOR_ASAN
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    came_from_->bottom_ = static_cast<char*>(const_cast<void*>(bottom));
    came_from_->size_ = size;
#endif
  }

 private:
  char* bottom_ = nullptr;  // of the caller's stack, found out at the first switch
  size_t size_ = 0;
#ifdef EMULATOR_ASAN
  void* fake_stack_ = nullptr;
  static inline Fiber* came_from_ = nullptr;
#endif
#ifdef EMULATOR_OWN_SWITCH
  void* saved_ = nullptr;
#else
  ucontext_t saved_;
#endif
};

}  // namespace emulator
