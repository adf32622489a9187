// What the runtime keeps: a fiber for each thread of a block, the meetings of each warp, the tensors of the launch.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace emu {

constexpr unsigned kMostThreads = 1024, kWarpLanes = 32, kMostWarps = kMostThreads / kWarpLanes;
constexpr unsigned kMostArrays = 32, kMostTensors = 128, kMostDims = 8, kBarriers = 16;
constexpr unsigned kGap = 256;  // between arrays of shared memory, and around them

// A tensor that the kernel was given: elements of `item` bytes at base + the sum of index x stride, strides descending.
struct Tensor {
  char* base;
  uint64_t bytes;  // from the first element to the end of the last
  int argument, item, writable, dims;
  int64_t sizes[kMostDims], strides[kMostDims];  // strides in bytes
};

enum Schedule : int { forward, backward, random_order };

struct Launch {  // laid out by emulator.py
  const char* kernel;
  Index grid, block;
  uint64_t shared_bytes;
  void (*call)(void** arguments);
  void** arguments;
  const Tensor* tensors;
  int tensor_count, schedule, workers;
  int patience;  // seconds that a thread may run without meeting another or ending
  uint64_t seed;
  char* message;  // of a fault
  uint64_t message_room;
};

struct Array {  // of shared memory
  char* base;
  unsigned bytes, item;
  Site site;
};

struct Meeting {  // of lanes of one warp, all of `mask`
  Operation operation;
  unsigned mask, arrived;
  Site site;
  char* token;
};

struct Fiber : Thread {
  void* stack_pointer;
  char* stack;
  bool finished;
  Operation waits_in;  // none: running or ready
  unsigned waits_mask;  // of lanes; the number of a named barrier
  Site waits_at;
  void* request;
  char* token;
  Copy* copies;  // a ring, in the order of asking
  uint64_t copies_asked, copies_landed, copies_committed, copies_room;
  uint64_t *groups, groups_asked, groups_landed, groups_room;  // where each group ends, among the copies asked
  void *asan_stack, *tsan_fiber;
};

struct Warp {
  Meeting meetings[kWarpLanes];
  unsigned active;
};

struct ThreadSet {
  uint64_t words[kMostThreads / 64];
};

struct NamedBarrier {
  int expected, arrived;
  ThreadSet came, waiting;
  char* token;
};

// What one OS thread needs to run blocks, one at a time.
struct Worker {
  const Launch* launch;
  Fiber fibers[kMostThreads];
  Warp warps[kMostWarps];
  NamedBarrier barriers[kBarriers];
  ThreadSet ready;
  unsigned threads, live, stack_count;
  unsigned block_arrived;
  Site block_site;
  char* block_token;
  uint64_t random;
  char *stacks, *shared;  // shared: room for every array, with gaps
  uint64_t shared_room, shared_used, shared_asked;
  Array arrays[kMostArrays];
  unsigned array_count;
  void *main_stack_pointer, *main_asan_stack, *main_tsan_fiber;
  const void* main_stack_bottom;
  size_t main_stack_size;
  uint64_t block_number;
  uint64_t switches;  // of fibers
};
extern __thread Worker* worker __attribute__((tls_model("initial-exec")));

inline Fiber& me() { return *static_cast<Fiber*>(self); }
inline uint32_t lane_bit() { return 1u << self->lane; }

// ---- faults (faults.cpp): the first of a launch is its message ----
extern int faulted;
// Ends the launch; `fault` of runtime.h is the same without a format.
[[noreturn]] void fault_with(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fault_of_all(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));  // who waits?
void note_fault(const Fiber& of, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
const char* file_name(const char* path);
const char* name_of(Operation operation);
bool same(Site a, Site b);

// ---- who runs (schedule.cpp) ----
Fiber* next_ready();
void wake(const ThreadSet& threads);
void wait(Operation operation, unsigned mask, Site site);
ThreadSet all_threads();
ThreadSet lanes_of_warp(unsigned warp, uint32_t mask);

// Lanes of `mask` meet; the last to come acts for all, and then all go on (meetings.cpp).
using Act = void (*)(Fiber* lanes, uint32_t mask);
void meet(Operation operation, unsigned mask, Site site, void* request, Act act);

// ---- shared memory (memory.cpp) ----
void begin_shared(Worker& worker);
void check_gaps();

// Where the library that holds this code begins: its debug information counts from there.
inline uintptr_t module_base(void* code) {
  Dl_info info;
  return dladdr(code, &info) ? (uintptr_t)info.dli_fbase : 0;
}

// ---- what the checked build keeps of every access (checks.cpp); nothing in the others ----
#if defined(EMU_CHECKED)
void check_launch(const Launch& launch);
void check_block();
void check_met(const ThreadSet& threads);                  // all of them came, and go on from here
void check_arrived(int barrier, bool first);               // this thread, at a named barrier
void check_passed(int barrier, const ThreadSet& waiting);  // those that waited there go on
void check_in_flight(const Copy& copy, Site site);
void check_lands(const Copy& copy);
#else
inline void check_launch(const Launch&) {}
inline void check_block() {}
inline void check_met(const ThreadSet&) {}
inline void check_arrived(int, bool) {}
inline void check_passed(int, const ThreadSet&) {}
inline void check_in_flight(const Copy&, Site) {}
inline void check_lands(const Copy&) {}
#endif

}  // namespace emu
