// Which thread goes on. Every order that CUDA allows is a legal run, and those taken here are hostile: a thread runs until
// it must wait, and the next is the lowest that can go on, the highest, or any.
#include "fibers.h"
#include "state.h"

namespace emu {

ThreadSet lanes_of_warp(unsigned warp, uint32_t mask) {
  ThreadSet set{};
  set.words[warp / 2] = (uint64_t)mask << 32 * (warp % 2);
  return set;
}
ThreadSet all_threads() {
  ThreadSet set{};
  for (unsigned i = 0; i < worker->threads; i += 32) set.words[i / 64] |= 0xffffffffull << i % 64;
  return set;
}
void wake(const ThreadSet& set) {
  const unsigned words = (worker->threads + 63) / 64;
  for (unsigned i = 0; i < words; i++) worker->ready.words[i] |= set.words[i];
}

Fiber* next_ready() {
  Worker& w = *worker;
  const int words = (int)(w.threads + 63) / 64;
  const auto take = [&](int word, int bit) {
    w.ready.words[word] &= ~(1ull << bit);
    return &w.fibers[word * 64 + bit];
  };
  if (w.launch->schedule == backward) {
    for (int i = words - 1; i >= 0; i--)
      if (w.ready.words[i]) return take(i, 63 - __builtin_clzll(w.ready.words[i]));
    return nullptr;
  }
  int first = 0;
  uint64_t wanted = ~0ull;
  if (w.launch->schedule == random_order) {  // the first that is ready from a random thread on
    w.random ^= w.random << 13, w.random ^= w.random >> 7, w.random ^= w.random << 17;
    const unsigned start = (unsigned)(w.random >> 32) % w.threads;
    first = (int)start / 64;
    wanted <<= start % 64;
  }
  if (const uint64_t some = w.ready.words[first] & wanted) return take(first, __builtin_ctzll(some));
  for (int i = 1; i <= words; i++) {
    const int word = (first + i) % words;
    if (w.ready.words[word]) return take(word, __builtin_ctzll(w.ready.words[word]));
  }
  return nullptr;
}

void wait(Operation operation, unsigned mask, Site site) {
  Fiber& fiber = me();
  fiber.waits_in = operation, fiber.waits_mask = mask, fiber.waits_at = site;
  Fiber* next = next_ready();
  if (!next) fault_of_all(site, "deadlock: every thread waits, and none can go on");
  if (next != &fiber) switch_fibers(&fiber, next, false);
  fiber.waits_in = Operation::none;
}

}  // namespace emu
