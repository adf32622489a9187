// Runs a kernel's blocks on the CPU, one fiber per CUDA thread. Every order of threads that CUDA allows is a legal run,
// and those taken here are hostile: a thread runs until it must wait, the next is the lowest, the highest or any;
// shared memory begins as NaN; a copy in the background arrives when it is waited for and not before.
//
// For ThreadSanitizer this file is compiled without it: only what kernels do with memory is to be seen.
#include "runtime.h"

#include <pthread.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "fibers.h"
#include "state.h"
#include "traps.h"

namespace emu {

__thread Thread* self;
__thread Worker* worker;

static int faulted;  // by this launch: the first message counts, the other workers stop

static Fiber& me() { return *static_cast<Fiber*>(self); }
static Warp& my_warp() { return worker->warps[self->id / kWarpLanes]; }
static uint32_t lane_bit() { return 1u << self->lane; }

// ---- sets of threads ----
static void insert(ThreadSet& set, unsigned thread) { set.words[thread / 64] |= 1ull << thread % 64; }
static void clear(ThreadSet& set) { memset(&set, 0, sizeof set); }
static ThreadSet lanes_of_warp(unsigned warp, uint32_t mask) {
  ThreadSet set{};
  set.words[warp / 2] = (uint64_t)mask << 32 * (warp % 2);
  return set;
}
static ThreadSet all_threads() {
  ThreadSet set{};
  for (unsigned i = 0; i < worker->threads; i += 32) set.words[i / 64] |= 0xffffffffull << i % 64;
  return set;
}
static void wake(const ThreadSet& set) {
  const unsigned words = (worker->threads + 63) / 64;
  for (unsigned i = 0; i < words; i++) worker->ready.words[i] |= set.words[i];
}

// ---- faults ----
static const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::sync_block: return "__syncthreads";
    case Operation::sync_warp: return "__syncwarp";
    case Operation::shuffle: return "a shuffle";
    case Operation::vote: return "a vote";
    case Operation::ldmatrix: return "ldmatrix";
    case Operation::mma: return "mma";
    case Operation::named_barrier: return "barrier_sync";
    default: return "nothing";
  }
}
static const char* file_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}
static bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

struct Message {
  char* text;
  uint64_t room, used;
};
static void append(Message& message, const char* format, va_list values) {
  if (message.used >= message.room) return;
  const int length = vsnprintf(message.text + message.used, message.room - message.used, format, values);
  if (length > 0) message.used += length;
}
static void append(Message& message, const char* format, ...) __attribute__((format(printf, 2, 3)));
static void append(Message& message, const char* format, ...) {
  va_list values;
  va_start(values, format);
  append(message, format, values);
  va_end(values);
}

// Who waits where: threads that wait at one place in one line.
static void append_waiting(Message& message) {
  const auto alike = [](const Fiber& a, const Fiber& b) {
    return a.finished == b.finished && a.waits_in == b.waits_in && a.waits_mask == b.waits_mask &&
           (a.finished || a.waits_in == Operation::none || same(a.waits_at, b.waits_at));
  };
  for (unsigned i = 0, lines = 0; i < worker->threads && lines < 12; lines++) {
    const Fiber& first = worker->fibers[i];
    unsigned end = i + 1;
    while (end < worker->threads && alike(first, worker->fibers[end])) end++;
    append(message, "\n  threads %u to %u ", i, end - 1);
    if (first.finished)
      append(message, "have left the kernel");
    else if (first.waits_in == Operation::none)
      append(message, "can go on");
    else {
      append(message, "wait in %s", name_of(first.waits_in));
      if (first.waits_in == Operation::named_barrier) append(message, " of barrier %u", first.waits_mask);
      else if (first.waits_in != Operation::sync_block) append(message, " of the lanes 0x%08x", first.waits_mask);
      append(message, " at %s:%d", file_name(first.waits_at.file), first.waits_at.line);
    }
    i = end;
  }
}

// The first fault of a launch is its message.
static void report(const Fiber& f, Site site, bool shows_waiting, const char* format, va_list values) {
  if (__atomic_exchange_n(&faulted, 1, __ATOMIC_SEQ_CST)) return;
  const Launch& launch = *worker->launch;
  Message message{launch.message, launch.message_room, 0};
  append(message, format, values);
  append(message, "\n  %s, block (%u, %u, %u), thread %u", launch.kernel, f.block.x, f.block.y, f.block.z, f.id);
  if (launch.block.y * launch.block.z > 1) append(message, " (%u, %u, %u)", f.thread.x, f.thread.y, f.thread.z);
  append(message, " (warp %u, lane %u)", f.id / kWarpLanes, f.lane);
  if (site.file) append(message, ", at %s:%d", file_name(site.file), site.line);
  if (shows_waiting) append_waiting(message);
}
// Leaves the block as it stands: kernels own nothing that would have to be given back.
[[noreturn]] static void end_launch(Site site, bool shows_waiting, const char* format, va_list values) {
  report(me(), site, shows_waiting, format, values);
  switch_fibers(&me(), nullptr, true);
  abort();
}
void fault_with(Site site, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_launch(site, false, format, values);
}
void fault(const char* what, Site site) { fault_with(site, "%s", what); }
[[noreturn]] static void fault_of_all(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
static void fault_of_all(Site site, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_launch(site, true, format, values);
}

// ---- who runs ----
static Fiber* next_ready() {
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

static void wait(Operation operation, unsigned mask, Site site) {
  Fiber& fiber = me();
  fiber.waits_in = operation, fiber.waits_mask = mask, fiber.waits_at = site;
  Fiber* next = next_ready();
  if (!next) fault_of_all(site, "deadlock: every thread waits, and none can go on");
  if (next != &fiber) switch_fibers(&fiber, next, false);
  fiber.waits_in = Operation::none;
}

static void body() {
  worker->launch->call(worker->launch->arguments);
  Fiber& fiber = me();
  fiber.finished = true;
  worker->live--;
  Fiber* next = next_ready();
  if (!next && worker->live > 0)
    fault_of_all({nullptr, 0}, "deadlock: this thread has left the kernel, and every other waits");
  switch_fibers(&fiber, next, true);
  abort();
}

// ---- meetings ----
using Act = void (*)(Fiber* lanes, uint32_t mask);
static void nothing(Fiber*, uint32_t) {}

static void meet(Operation operation, unsigned mask, Site site, void* request, Act act) {
  Fiber& fiber = me();
  Warp& warp = my_warp();
  if (!(mask & lane_bit()))
    fault_with(site, "%s of the lanes 0x%08x by lane %u, which is none of them", name_of(operation), mask, fiber.lane);
  unsigned i = 0;
  while (i < warp.active && !(warp.meetings[i].mask == mask && warp.meetings[i].operation == operation &&
                              same(warp.meetings[i].site, site)))
    i++;
  Meeting& meeting = warp.meetings[i];
  if (i == warp.active) {
    meeting = {operation, mask, 0, site, new_token()};
    warp.active++;
  }
  char* const token = meeting.token;
  order_arrive(token);
  fiber.request = request;
  meeting.arrived |= lane_bit();
  if (meeting.arrived == mask) {
    meeting = warp.meetings[--warp.active];
    const unsigned number = fiber.id / kWarpLanes;
    act(&worker->fibers[number * kWarpLanes], mask);
    const ThreadSet lanes = lanes_of_warp(number, mask);
    if (operation == Operation::sync_warp) check_met(lanes);
    wake(lanes);
  }
  wait(operation, mask, site);
  if (operation == Operation::sync_warp) order_leave(token);
}

void sync_warp(unsigned mask, Site site) { meet(Operation::sync_warp, mask, site, nullptr, nothing); }

void sync_block(Site site) {
  Worker& w = *worker;
  if (w.block_arrived == 0) {
    w.block_site = site;
    w.block_token = new_token();
  } else if (!same(w.block_site, site)) {
    fault_of_all(site, "divergence: threads of one block are at different __syncthreads, %s:%d and %s:%d",
                 file_name(w.block_site.file), w.block_site.line, file_name(site.file), site.line);
  }
  char* const token = w.block_token;
  order_arrive(token);
  if (++w.block_arrived == w.threads) {
    w.block_arrived = 0;
    const ThreadSet everyone = all_threads();
    check_met(everyone);
    wake(everyone);
  }
  wait(Operation::sync_block, 0, site);
  order_leave(token);
}

void sync_named(int id, int threads, bool waits, Site site) {
  if (id < 1 || id >= (int)kBarriers) fault_with(site, "barrier %d: there are barriers 1 to 15", id);
  if (threads <= 0 || threads % (int)kWarpLanes || threads > (int)worker->threads)
    fault_with(site, "barrier %d for %d threads: it takes whole warps of the block's %u threads", id, threads,
               worker->threads);
  NamedBarrier& barrier = worker->barriers[id];
  const bool first = barrier.arrived == 0;
  if (first) {
    barrier.expected = threads;
    barrier.token = new_token();
    clear(barrier.came);
    clear(barrier.waiting);
  } else if (barrier.expected != threads) {
    fault_with(site, "barrier %d for %d threads, where another thread came to it for %d", id, threads,
               barrier.expected);
  }
  char* const token = barrier.token;
  order_arrive(token);
  check_arrived(id, first);
  insert(barrier.came, self->id);
  if (waits) insert(barrier.waiting, self->id);
  if (++barrier.arrived == barrier.expected) {
    for (uint64_t word : barrier.came.words)
      for (int half = 0; half < 2; half++, word >>= 32)
        if ((uint32_t)word != 0 && (uint32_t)word != ~0u)
          fault_with(site, "barrier %d: only some lanes of a warp came to it", id);
    barrier.arrived = 0;
    check_passed(id, barrier.waiting);
    wake(barrier.waiting);
  }
  if (!waits) return;
  wait(Operation::named_barrier, (unsigned)id, site);
  order_leave(token);
}

// ---- what lanes exchange: the last to come reads what the others laid on their stacks, and answers there ----
struct Shuffle {
  uint64_t value, result;
  unsigned source;
  Site site;
};
static void answer_shuffle(Fiber* lanes, uint32_t mask) {
  for (unsigned lane = 0; lane < kWarpLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    Shuffle& mine = *(Shuffle*)lanes[lane].request;
    if (mine.source >= kWarpLanes || !(mask >> mine.source & 1))
      fault_with(mine.site, "a shuffle of the lanes 0x%08x: lane %u reads lane %u, which is none of them", mask, lane,
                 mine.source);
    mine.result = ((Shuffle*)lanes[mine.source].request)->value;
  }
}
unsigned long shuffle(unsigned mask, unsigned long value, unsigned source, Site site) {
  Shuffle request{value, 0, source, site};
  meet(Operation::shuffle, mask, site, &request, answer_shuffle);
  return request.result;
}

static void answer_vote(Fiber* lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < kWarpLanes; lane++)
    if (mask >> lane & 1 && *(uint32_t*)lanes[lane].request) ballot |= 1u << lane;
  for (unsigned lane = 0; lane < kWarpLanes; lane++)
    if (mask >> lane & 1) *(uint32_t*)lanes[lane].request = ballot;
}
unsigned vote(unsigned mask, Vote kind, bool value, Site site) {
  uint32_t request = value;
  meet(Operation::vote, mask, site, &request, answer_vote);
  return kind == Vote::ballot ? request : kind == Vote::all ? request == mask : request != 0;
}

struct Rows {
  const void* mine;
  const void** all;
};
static void answer_rows(Fiber* lanes, uint32_t) {
  for (unsigned to = 0; to < kWarpLanes; to++)
    for (unsigned from = 0; from < kWarpLanes; from++)
      ((Rows*)lanes[to].request)->all[from] = ((Rows*)lanes[from].request)->mine;
}
void exchange_rows(const void* row, const void* (&rows)[32], Site site) {
  Rows request{row, rows};
  meet(Operation::ldmatrix, ~0u, site, &request, answer_rows);
}

struct Multiply {
  bool brain;
  float* sums;
  const unsigned *a, *b;
};
static void answer_mma(Fiber* lanes, uint32_t) {
  float a[16][16], b[16][8], sums[16][8];
  const bool brain = ((Multiply*)lanes[0].request)->brain;
  const auto wide = [brain](unsigned bits) {
    return brain ? wide_bfloat16((unsigned short)bits) : wide_binary16((unsigned short)bits);
  };
  for (unsigned lane = 0; lane < kWarpLanes; lane++) {
    const Multiply& given = *(Multiply*)lanes[lane].request;
    const unsigned g = lane / 4, t = 2 * (lane % 4);
    for (unsigned i = 0; i < 4; i++)
      for (unsigned half = 0; half < 2; half++)
        a[g + 8 * (i % 2)][t + 8 * (i / 2) + half] = wide(given.a[i] >> 16 * half);
    for (unsigned i = 0; i < 2; i++)
      for (unsigned half = 0; half < 2; half++) b[t + 8 * i + half][g] = wide(given.b[i] >> 16 * half);
    for (unsigned i = 0; i < 4; i++) sums[g + 8 * (i / 2)][t + i % 2] = given.sums[i];
  }
  for (unsigned row = 0; row < 16; row++)
    for (unsigned k = 0; k < 16; k++)
      for (unsigned column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
  for (unsigned lane = 0; lane < kWarpLanes; lane++)
    for (unsigned i = 0; i < 4; i++)
      ((Multiply*)lanes[lane].request)->sums[i] = sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}
void mma_m16n8k16(bool brain, float* sums, const unsigned* a, const unsigned* b, Site site) {
  Multiply request{brain, sums, a, b};
  meet(Operation::mma, ~0u, site, &request, answer_mma);
}

// ---- copies in the background ----
template <class T>
static void grow(T*& ring, uint64_t& room, uint64_t first, uint64_t last) {
  const uint64_t wider = room ? 2 * room : 64;
  T* copy = (T*)malloc(wider * sizeof(T));
  for (uint64_t i = first; i < last; i++) copy[i % wider] = ring[i % room];
  free(ring);
  ring = copy, room = wider;
}
void copy_begin(Copy copy, Site site) {
  const uintptr_t both = (uintptr_t)copy.to | (uintptr_t)copy.from;
  if (both & (copy.bytes - 1))
    fault_with(site, "cp.async of %d bytes: an address is no multiple of %d", copy.bytes, copy.bytes);
  const char* to = (const char*)copy.to;
  if (to < worker->shared || to >= worker->shared + worker->shared_room)
    fault_with(site, "cp.async writes to an address outside shared memory");
  check_in_flight(copy, site);
  Fiber& f = me();
  if (f.copies_asked - f.copies_landed == f.copies_room) grow(f.copies, f.copies_room, f.copies_landed, f.copies_asked);
  f.copies[f.copies_asked++ % f.copies_room] = copy;
}
void copy_commit() {
  Fiber& f = me();
  if (f.groups_asked - f.groups_landed == f.groups_room) grow(f.groups, f.groups_room, f.groups_landed, f.groups_asked);
  f.groups[f.groups_asked++ % f.groups_room] = f.copies_asked;
}
unsigned copies_due(int groups) {
  Fiber& f = me();
  uint64_t end = f.copies_landed;
  while (f.groups_asked - f.groups_landed > (uint64_t)groups) end = f.groups[f.groups_landed++ % f.groups_room];
  return (unsigned)(end - f.copies_landed);
}
Copy copy_next() {
  Fiber& f = me();
  const Copy copy = f.copies[f.copies_landed++ % f.copies_room];
  check_lands(copy);
  return copy;
}

// ---- shared memory ----
constexpr unsigned char kUnwritten = 0xff;  // NaN in each of the types
static void fill_unwritten(char* from, uint64_t bytes) {
#if defined(EMU_TSAN)
  for (uint64_t i = 0; i < bytes; i++) ((volatile unsigned char*)from)[i] = kUnwritten;  // memset would be seen
#else
  memset(from, kUnwritten, bytes);
#endif
}
static void begin_shared(Worker& w) {
  const uint64_t room = w.launch->shared_bytes + (kMostArrays + 1) * (kGap + 32);
#if defined(EMU_TSAN)
  w.shared = nullptr;  // blocks know nothing of each other: the next one's threads must not meet this one's traces
#endif
  if (!w.shared || w.shared_room < room) {
#if !defined(EMU_TSAN)
    free(w.shared);
#endif
    w.shared = (char*)aligned_alloc(128, (room + 127) / 128 * 128);
    w.shared_room = room;
  }
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(w.shared, w.shared_room);
#endif
  fill_unwritten(w.shared, room);
#if defined(EMU_ASAN)
  __asan_poison_memory_region(w.shared, w.shared_room);
#endif
  w.shared_used = kGap, w.shared_asked = 0, w.array_count = 0;
}
void* take_shared(unsigned count, unsigned item, unsigned& taken, Site site) {
  Worker& w = *worker;
  const unsigned bytes = count * item;
  if (taken < w.array_count) {
    const Array& array = w.arrays[taken++];
    if (array.bytes != bytes || array.item != item)
      fault_with(site, "shared memory: this thread takes %u bytes as array %u, where another took %u", bytes,
                 taken - 1, array.bytes);
    return array.base;
  }
  if (w.array_count == kMostArrays) fault_with(site, "shared memory: more than %u arrays", kMostArrays);
  w.shared_asked += (bytes + 15) & ~15u;
  if (w.shared_asked > w.launch->shared_bytes)
    fault_with(site, "shared memory: the kernel takes %llu bytes, and %llu were given at the launch",
               (unsigned long long)w.shared_asked, (unsigned long long)w.launch->shared_bytes);
  char* base = w.shared + w.shared_used + 16;  // a multiple of 16 as promised, and of no more
  w.shared_used += ((bytes + 31) & ~31u) + kGap;
  w.arrays[w.array_count++] = {base, bytes, item, site};
  taken++;
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(base, bytes);
#endif
  return base;
}
// Where nothing watches the kernel's accesses, what lies between the arrays must at the end be as it was.
[[maybe_unused]] static void report_gap(const Array* array, ...) {
  va_list values;
  va_start(values, array);
  report(worker->fibers[0], array->site, false, "shared memory: byte %lld of an array of %u bytes was written", values);
  va_end(values);
}
static void check_gaps() {
#if !defined(EMU_ASAN) && !defined(EMU_CHECKED)
  Worker& w = *worker;
  const char* gap = w.shared;
  for (unsigned i = 0; w.array_count > 0 && i <= w.array_count; i++) {
    const char* end = i < w.array_count ? w.arrays[i].base : gap + kGap / 2;
    for (const char* p = gap; p < end; p++) {
      if ((unsigned char)*p == kUnwritten) continue;
      const bool before = i == 0 || (i < w.array_count && end - p < p - gap);
      const Array& array = w.arrays[before ? i : i - 1];
      return report_gap(&array, (long long)(p - array.base), array.bytes);
    }
    if (i < w.array_count) gap = w.arrays[i].base + w.arrays[i].bytes;
  }
#endif
}

// ---- blocks ----
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
  clear(w.ready);
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
  Traps traps;
  for (uint64_t place; (place = __atomic_fetch_add(&work.next, 1, __ATOMIC_SEQ_CST)) < blocks;) {
    if (__atomic_load_n(&faulted, __ATOMIC_SEQ_CST)) break;
    const uint64_t i = block_at(launch, place, blocks);
    w.random = (launch.seed * 0x9e3779b97f4a7c15 + i + 1) * 0xbf58476d1ce4e5b9 | 1;
    run_block({(unsigned)(i % launch.grid.x), (unsigned)(i / launch.grid.x % launch.grid.y),
               (unsigned)(i / launch.grid.x / launch.grid.y)});
  }
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
  pthread_t helpers[64];
  int count = launch->workers - 1 < 63 ? launch->workers - 1 : 63;
  for (int i = 0; i < count; i++)
    if (pthread_create(&helpers[i], nullptr, emu::run_blocks, &work)) count = i;
  emu::run_blocks(&work);
  for (int i = 0; i < count; i++) pthread_join(helpers[i], nullptr);
  const int result = emu::faulted;
  pthread_mutex_unlock(&one);
  return result;
}
