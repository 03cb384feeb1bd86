// A suspended call stack. One per emulated CUDA thread; all fibers of a block run on one host thread.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(DDST_EMU_UCONTEXT)
#define DDST_EMU_UCONTEXT 1
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifdef DDST_EMU_UCONTEXT
#include <ucontext.h>
#else
// Saves the callee-saved registers and the stack pointer, then continues on the other stack. ucontext would do, but it
// makes a system call per switch (the signal mask).
extern "C" void ddst_emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.weak ddst_emu_switch
.type ddst_emu_switch,@function
ddst_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ddst_emu_switch,.-ddst_emu_switch
)");
#endif

namespace ddst::emu {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_, kStackBytes);
  }

  // `entry` must not return: its last act is a suspend() that nobody resumes.
  void start(void (*entry)()) {
    if (!stack_) allocate();
#ifdef __SANITIZE_ADDRESS__
    const auto guard = static_cast<std::size_t>(getpagesize());
    __asan_unpoison_memory_region(static_cast<char*>(stack_) + guard,
                                  kStackBytes - guard);  // an abandoned run leaves poison
#endif
#ifdef DDST_EMU_UCONTEXT
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    makecontext(&own_, entry, 0);
#else
    auto* top = reinterpret_cast<std::uintptr_t*>(static_cast<char*>(stack_) + kStackBytes);
    *--top = 0;  // return address of `entry`; keeps the stack aligned as after a call
    *--top = reinterpret_cast<std::uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    own_ = top;
#endif
  }
#ifdef DDST_EMU_UCONTEXT
  void resume() { swapcontext(&host_, &own_); }
  void suspend() { swapcontext(&own_, &host_); }
#else
  void resume() { ddst_emu_switch(&host_, own_); }
  void suspend() { ddst_emu_switch(&own_, host_); }
#endif

 private:
  static constexpr std::size_t kStackBytes = 128 * 1024;

  void allocate() {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, static_cast<std::size_t>(getpagesize()), PROT_NONE);  // overflow faults instead of corrupting
  }

  void* stack_ = nullptr;
#ifdef DDST_EMU_UCONTEXT
  ucontext_t own_{}, host_{};
#else
  void* own_ = nullptr;
  void* host_ = nullptr;
#endif
};

}  // namespace ddst::emu
