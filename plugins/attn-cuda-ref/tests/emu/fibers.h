// One fiber per CUDA thread: a stack, and a switch that saves what a call must preserve and makes no system call.
// Under a sanitizer each switch is announced. For ThreadSanitizer a fiber is a thread, and switching orders nothing:
// only what order_arrive and order_leave say does.
#pragma once
#include <sys/mman.h>

#include <cstdlib>

#include "state.h"

#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

extern "C" void emu_switch(void** save, void* load);  // a local symbol of each file
#if defined(__x86_64__)
__asm__(
    ".text\n.type emu_switch,@function\nemu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size emu_switch, .-emu_switch\n");
constexpr int kSavedWords = 8, kEntryWord = 6;  // the entry is where `ret` goes; a word above it keeps the stack aligned
#elif defined(__aarch64__)
__asm__(
    ".text\n.type emu_switch,%function\nemu_switch:\n"
    "  sub sp, sp, #160\n  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n  add sp, sp, #160\n  ret\n"
    ".size emu_switch, .-emu_switch\n");
constexpr int kSavedWords = 20, kEntryWord = 11;
#else
#error "a context switch for this processor is missing"
#endif

namespace emu {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 64 * 1024, kStackStep = kStackBytes + kGuardBytes;

inline char* map_stacks(unsigned threads) {
  void* stacks = mmap(nullptr, threads * kStackStep, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) abort();
  for (unsigned i = 0; i < threads; i++) mprotect((char*)stacks + i * kStackStep, kGuardBytes, PROT_NONE);
  return (char*)stacks;
}

// The fiber will begin in `entry`. Tops of stacks lie at different places of their pages: with all at one, the same few
// lines of the CPU's cache would serve every thread.
inline void prepare(Fiber& fiber, void (*entry)()) {
  char* top = fiber.stack + kStackBytes - 64 - (fiber.id % 29) * 128;
  void** words = (void**)((uintptr_t)top & ~(uintptr_t)15) - kSavedWords;
  for (int i = 0; i < kSavedWords; i++) words[i] = nullptr;
  words[kEntryWord] = (void*)entry;
  fiber.stack_pointer = words;
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // whoever had it before never returned from its calls
#endif
#if defined(EMU_TSAN)
  if (fiber.tsan_fiber) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

// Goes on in `to`, or in whoever runs the blocks (null); `from` likewise, as one that will not go on if `ends`.
inline void switch_fibers(Fiber* from, Fiber* to, bool ends) {
  Worker& w = *worker;
  void** save = from ? &from->stack_pointer : &w.main_stack_pointer;
  void* load = to ? to->stack_pointer : w.main_stack_pointer;
  self = to;
  w.switches++;
#if defined(EMU_TSAN)
  constexpr unsigned kOrdersNothing = 1;
  if (!from) w.main_tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to ? to->tsan_fiber : w.main_tsan_fiber, kOrdersNothing);
#endif
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(ends ? nullptr : from ? &from->asan_stack : &w.main_asan_stack,
                                 to ? (const void*)to->stack : w.main_stack_bottom,
                                 to ? kStackBytes : w.main_stack_size);
#endif
  (void)ends;
  emu_switch(save, load);
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(from ? from->asan_stack : w.main_asan_stack, nullptr, nullptr);
#endif
}

// The first that a fiber does.
inline void arrive_in_fiber() {
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// What was done before arriving is ordered before what is done after leaving.
inline void order_arrive(char* token) {
#if defined(EMU_TSAN)
  __tsan_release(token);
#endif
  (void)token;
}
inline void order_leave(char* token) {
#if defined(EMU_TSAN)
  __tsan_acquire(token);
#endif
  (void)token;
}
// A token for a meeting that begins: not the one of the last meeting, whose late leavers would be ordered after what
// was done before this one.
inline char* new_token() {
  static char tokens[1 << 16];
  static unsigned used;
  return &tokens[__atomic_fetch_add(&used, 1, __ATOMIC_RELAXED) % sizeof tokens];
}

}  // namespace emu
