// Runs a launch: OS threads take blocks one after the other, and run each with a fiber for every thread of it.
//
// For ThreadSanitizer the runtime is compiled without it: only what kernels do with memory is to be seen.
#include <pthread.h>

#include <cstdlib>

#include "fibers.h"
#include "state.h"
#include "traps.h"

namespace emu {

__thread Thread* self;
__thread Worker* worker;

static char end_of_launch;  // every thread's accesses are ordered before what comes after it

static void body() {
  arrive_in_fiber();
  worker->launch->call(worker->launch->arguments);
  order_arrive(&end_of_launch);
  Fiber& fiber = me();
  fiber.finished = true;
  worker->live--;
  Fiber* next = next_ready();
  if (!next && worker->live > 0)
    fault_of_all({nullptr, 0}, "deadlock: this thread has left the kernel, and every other waits");
  switch_fibers(&fiber, next, true);
  abort();
}

static void run_block(Index block) {
  Worker& w = *worker;
  const Launch& launch = *w.launch;
  w.block_number++;
  w.live = w.threads;
  w.block_arrived = 0;
  for (unsigned i = 0; i < w.threads / kWarpLanes; i++) w.warps[i].active = 0;
  for (NamedBarrier& barrier : w.barriers) barrier.arrived = 0;
  begin_shared(w);
  check_block();
#if defined(EMU_TSAN)
  munmap(w.stacks, w.stack_count * kStackStep);  // a stack has no memory of who used it before
  w.stacks = map_stacks(w.stack_count);
#endif
  for (unsigned i = 0; i < w.threads; i++) {
    Fiber& f = w.fibers[i];
    f.id = i, f.lane = i % kWarpLanes;
    f.thread = {i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
    f.block = block, f.block_size = launch.block, f.grid_size = launch.grid;
    f.finished = false, f.waits_in = Operation::none;
    f.copies_asked = f.copies_landed = f.groups_asked = f.groups_landed = 0;
    f.stack = w.stacks + i * kStackStep + kGuardBytes;
    prepare(f, body);
  }
  w.ready = {};
  wake(all_threads());
  switch_fibers(nullptr, next_ready(), false);
  if (!__atomic_load_n(&faulted, __ATOMIC_SEQ_CST)) check_gaps();
}

static Worker* idle[64];
static pthread_mutex_t pool = PTHREAD_MUTEX_INITIALIZER;
static Worker* take_worker(unsigned threads) {
  pthread_mutex_lock(&pool);
  Worker* w = nullptr;
  for (Worker*& one : idle)
    if (one && !w) w = one, one = nullptr;
  pthread_mutex_unlock(&pool);
  if (!w) w = (Worker*)calloc(1, sizeof(Worker));
  if (w->stack_count < threads) {
    if (w->stacks) munmap(w->stacks, w->stack_count * kStackStep);
    w->stacks = map_stacks(threads);
    w->stack_count = threads;
  }
  w->threads = threads;
  return w;
}
static void give_back(Worker* w) {
  pthread_mutex_lock(&pool);
  for (Worker*& one : idle)
    if (!one) {
      one = w, w = nullptr;
      break;
    }
  pthread_mutex_unlock(&pool);
}

struct Work {
  const Launch* launch;
  uint64_t next;  // block to be taken
};

// Blocks are taken in order, in reverse, or along a stride that visits each once.
static uint64_t block_at(const Launch& launch, uint64_t place, uint64_t blocks) {
  if (launch.schedule == backward) return blocks - 1 - place;
  if (launch.schedule == forward) return place;
  uint64_t stride = blocks / 2 + 1 + launch.seed % 7;
  const auto divisor = [](uint64_t a, uint64_t b) {
    while (b) {
      const uint64_t rest = a % b;
      a = b, b = rest;
    }
    return a;
  };
  while (divisor(stride, blocks) != 1) stride++;
  return (place * stride + launch.seed) % blocks;
}

static void* run_blocks(void* given) {
  Work& work = *(Work*)given;
  const Launch& launch = *work.launch;
  const uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
  Worker& w = *take_worker(launch.block.x * launch.block.y * launch.block.z);
  worker = &w;
  w.launch = &launch;
#if defined(EMU_ASAN)
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &w.main_stack_size);
  pthread_attr_destroy(&attributes);
  w.main_stack_bottom = bottom;
#endif
  check_launch(launch);
  Traps traps(launch.patience);
  for (uint64_t place; (place = __atomic_fetch_add(&work.next, 1, __ATOMIC_SEQ_CST)) < blocks;) {
    if (__atomic_load_n(&faulted, __ATOMIC_SEQ_CST)) break;
    const uint64_t i = block_at(launch, place, blocks);
    w.random = (launch.seed * 0x9e3779b97f4a7c15 + i + 1) * 0xbf58476d1ce4e5b9 | 1;
    run_block({(unsigned)(i % launch.grid.x), (unsigned)(i / launch.grid.x % launch.grid.y),
               (unsigned)(i / launch.grid.x / launch.grid.y)});
  }
  order_leave(&end_of_launch);
  worker = nullptr, self = nullptr;
  give_back(&w);
  return nullptr;
}

}  // namespace emu

// 0, or 1 where there was a fault: `launch->message` says which. One launch at a time.
extern "C" int emu_launch(const emu::Launch* launch) {
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&one);
  emu::faulted = 0;
  emu::Work work{launch, 0};
  pthread_t others[64];
  int count = launch->workers - 1 < 63 ? launch->workers - 1 : 63;
  for (int i = 0; i < count; i++)
    if (pthread_create(&others[i], nullptr, emu::run_blocks, &work)) count = i;
  emu::run_blocks(&work);
  for (int i = 0; i < count; i++) pthread_join(others[i], nullptr);
  const int result = emu::faulted;
  pthread_mutex_unlock(&one);
  return result;
}
