// A kernel that touches memory which is not there, divides an integer by zero, or runs in a circle ends its launch with a
// message instead of the process. Not under a sanitizer, which says more.
#pragma once
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>

#include "fibers.h"
#include "state.h"

namespace emu {

#if defined(EMU_ASAN) || defined(EMU_TSAN)
struct Traps {
  explicit Traps(int) {}
};
#else

constexpr size_t kSignalStack = 64 * 1024;

// For as long as it lives, this OS thread has a stack for signals (the fiber's may be what overflowed), and the process
// has handlers that leave other threads' signals to whoever had them before.
class Traps {
 public:
  explicit Traps(int patience) {
    stack_t stack{};
    stack.ss_sp = memory_ = malloc(kSignalStack);
    stack.ss_size = kSignalStack;
    sigaltstack(&stack, &before_);
    if (__atomic_fetch_add(&living_, 1, __ATOMIC_SEQ_CST) == 0)
      for (int i = 0; i < kSignalCount; i++) {
        struct sigaction action {};
        action.sa_sigaction = trap;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(kSignals[i], &action, &actions_before_[i]);
      }
    sigevent event{};  // after so much time of this thread, and again
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGXCPU;
    event._sigev_un._tid = (int)syscall(SYS_gettid);
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
    const itimerspec times{{patience, 0}, {patience, 0}};
    timer_settime(timer_, 0, &times, nullptr);
    switches_ = 0;
  }
  ~Traps() {
    timer_delete(timer_);
    if (__atomic_fetch_sub(&living_, 1, __ATOMIC_SEQ_CST) == 1)
      for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &actions_before_[i], nullptr);
    sigaltstack(&before_, nullptr);
    free(memory_);
  }
  Traps(const Traps&) = delete;
  Traps& operator=(const Traps&) = delete;

 private:
  static constexpr int kSignalCount = 4, kSignals[kSignalCount] = {SIGSEGV, SIGBUS, SIGFPE, SIGXCPU};
  static inline struct sigaction actions_before_[kSignalCount];
  static inline __thread uint64_t switches_;  // when the timer last rang
  timer_t timer_{};
  static inline int living_;
  void* memory_;
  stack_t before_{};

  static void trap(int signal, siginfo_t* info, void* context) {
    if (signal == SIGXCPU && (!worker || !self || worker->switches != switches_)) {
      if (worker) switches_ = worker->switches;
      return;
    }
    if (!worker || !self) {  // not a kernel's: let it happen again under the handler that was there
      for (int i = 0; i < kSignalCount; i++)
        if (kSignals[i] == signal) sigaction(signal, &actions_before_[i], nullptr);
      return;
    }
    const Fiber& fiber = *static_cast<Fiber*>(self);
    const char* address = (const char*)info->si_addr;
    const unsigned long code = (unsigned long)code_address(context) - module_base((void*)worker->launch->call);
    if (signal == SIGXCPU)
      fault_with({nullptr, 0}, "this thread runs in a circle: %d seconds without meeting another, at <code+0x%lx>",
                 worker->launch->patience, code);
    if (signal == SIGFPE) fault_with({nullptr, 0}, "an integer is divided by zero, at <code+0x%lx>", code);
    if (address >= fiber.stack - kGuardBytes && address < fiber.stack)
      fault_with({nullptr, 0}, "the thread's local variables overflow its stack of %zu KB", kStackBytes / 1024);
    fault_with({nullptr, 0}, "out of bounds: <address 0x%lx> is touched, which is not there, at <code+0x%lx>",
               (unsigned long)address, code);
  }
  static void* code_address(void* context) {
#if defined(__x86_64__)
    return (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#else
    return (void*)((ucontext_t*)context)->uc_mcontext.pc;
#endif
  }
};
#endif

}  // namespace emu
