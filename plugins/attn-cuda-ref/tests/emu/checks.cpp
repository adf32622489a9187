// Watches every access of a kernel: is it inside an array or a tensor, was what is read written before, and is it
// ordered with what other threads did there? The compiler announces accesses, by the calls that it would make to
// ThreadSanitizer (-fsanitize=thread); here those calls arrive at this file instead.
//
// Order is kept as vector clocks: a thread knows of each other thread up to which of its meetings it has heard. Only
// barriers (__syncthreads, __syncwarp, named ones) spread what is known; a shuffle moves a value and orders no memory.
// (Flanagan and Freund, "FastTrack: efficient and precise dynamic race detection", 2009.)
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fibers.h"
#include "state.h"

namespace emu {

struct Access {
  uint32_t clock, code;    // when, by the thread's own clock, and from where in the kernel
  uint32_t block, thread;  // block: its number among all blocks ever run, 0: no access
};
struct Cell {  // what is kept of one element
  Access write, reads[2];
  uint32_t flight_block, flight_thread;  // a copy in the background is on its way here
  int flight_line;
  const char* flight_file;
};

// One worker runs a checked launch, so all of this is there once.
static uint32_t* clocks;  // [thread][other thread]
static uint32_t barrier_clocks[kBarriers][kMostThreads];
static Cell* shared_cells;
static uint64_t shared_cell_count;
static Cell* tensor_cells[kMostTensors];
static uintptr_t code_base;
static uint32_t reads_seen;  // makes which read is forgotten vary

static uint32_t* clock_of(unsigned thread) { return clocks + thread * kMostThreads; }
static uint32_t block_number() { return (uint32_t)worker->block_number; }

void check_launch(const Launch& launch) {
  if (!clocks) clocks = (uint32_t*)malloc(sizeof(uint32_t) * kMostThreads * kMostThreads);
  for (Cell*& cells : tensor_cells) free(cells), cells = nullptr;
  for (int i = 0; i < launch.tensor_count; i++) {
    const Tensor& tensor = launch.tensors[i];
    if (tensor.writable) tensor_cells[i] = (Cell*)calloc(tensor.bytes / tensor.item + 1, sizeof(Cell));
  }
  code_base = module_base((void*)launch.call);
}

void check_block() {
  const unsigned threads = worker->threads;
  for (unsigned i = 0; i < threads; i++) {
    memset(clock_of(i), 0, threads * sizeof(uint32_t));
    clock_of(i)[i] = 1;
  }
  if (shared_cell_count < worker->shared_room) {
    free(shared_cells);
    shared_cell_count = worker->shared_room;
    shared_cells = (Cell*)calloc(shared_cell_count, sizeof(Cell));
  }
}

// ---- what threads know of each other ----
template <class Do>
static void for_each(const ThreadSet& set, Do&& what) {
  for (unsigned i = 0; i < (worker->threads + 63) / 64; i++)
    for (uint64_t word = set.words[i]; word; word &= word - 1) what(i * 64 + __builtin_ctzll(word));
}
static void hear(uint32_t* mine, const uint32_t* other) {
  for (unsigned i = 0; i < worker->threads; i++) mine[i] = mine[i] < other[i] ? other[i] : mine[i];
}
void check_met(const ThreadSet& threads) {
  static uint32_t all[kMostThreads];
  memset(all, 0, sizeof all);
  for_each(threads, [](unsigned thread) { hear(all, clock_of(thread)); });
  for_each(threads, [](unsigned thread) {
    memcpy(clock_of(thread), all, worker->threads * sizeof(uint32_t));
    clock_of(thread)[thread]++;
  });
}
void check_arrived(int barrier, bool first) {
  if (first) memset(barrier_clocks[barrier], 0, sizeof barrier_clocks[barrier]);
  hear(barrier_clocks[barrier], clock_of(self->id));
  clock_of(self->id)[self->id]++;
}
void check_passed(int barrier, const ThreadSet& waiting) {
  for_each(waiting, [barrier](unsigned thread) { hear(clock_of(thread), barrier_clocks[barrier]); });
}

// ---- where an address is ----
struct Place {
  const Tensor* tensor;
  const Array* array;
  uint64_t byte;  // within it
};
static bool has(const Tensor& tensor, uint64_t byte, unsigned bytes) {
  for (int i = 0; i < tensor.dims; i++) {
    const uint64_t stride = tensor.strides[i], index = byte / stride;
    if (index >= (uint64_t)tensor.sizes[i]) return false;
    byte -= index * stride;
    // Several elements that follow one another in the last dimension are one piece.
    if (i == tensor.dims - 1 && stride == (uint64_t)tensor.item)
      return byte + index * stride + bytes <= tensor.sizes[i] * stride;
  }
  return byte + bytes <= (uint64_t)tensor.item;
}
static bool in_tensor(int number, uintptr_t address, unsigned bytes, Place& place) {
  const Tensor& tensor = worker->launch->tensors[number];
  const uint64_t byte = address - (uintptr_t)tensor.base;
  if (byte >= tensor.bytes || !has(tensor, byte, bytes)) return false;
  place = {&tensor, nullptr, byte};
  return true;
}
static bool find(uintptr_t address, unsigned bytes, uint32_t code, Place& place) {
  const Worker& w = *worker;
  if (address - (uintptr_t)w.shared < w.shared_room) {
    for (unsigned i = 0; i < w.array_count; i++) {
      const uint64_t byte = address - (uintptr_t)w.arrays[i].base;
      if (byte < w.arrays[i].bytes && byte + bytes <= w.arrays[i].bytes) {
        place = {nullptr, &w.arrays[i], byte};
        return true;
      }
    }
    return false;
  }
  static uint8_t last_tensor[256];  // that the same code found
  uint8_t& guess = last_tensor[code % 256];
  if (guess < w.launch->tensor_count && in_tensor(guess, address, bytes, place)) return true;
  for (int i = 0; i < w.launch->tensor_count; i++)
    if (in_tensor(i, address, bytes, place)) {
      guess = (uint8_t)i;
      return true;
    }
  return false;
}
static Cell* cells_of(const Place& place) {
  if (place.array) return shared_cells + (place.array->base - worker->shared);
  return tensor_cells[place.tensor - worker->launch->tensors];
}

// ---- faults ----
#define NOWHERE Site{nullptr, 0}
static const char* read_or_written(bool write) { return write ? "written" : "read"; }

[[noreturn]] static void out_of_bounds(uintptr_t address, unsigned bytes, bool write, uint32_t code) {
  const Worker& w = *worker;
  if (address - (uintptr_t)w.shared >= w.shared_room)
    fault_with(NOWHERE, "out of bounds: %u bytes at <address 0x%lx> are %s, at <code+0x%x>", bytes, (long)address,
               read_or_written(write), code);
  const Array* nearest = nullptr;
  int64_t distance = INT64_MAX;
  for (unsigned i = 0; i < w.array_count; i++) {
    const int64_t before = (int64_t)((uintptr_t)w.arrays[i].base - address), after = -before - w.arrays[i].bytes;
    const int64_t away = before > after ? before : after;
    if (away < distance) distance = away, nearest = &w.arrays[i];
  }
  if (!nearest)
    fault_with(NOWHERE, "out of bounds: shared memory of which no array was taken is %s, at <code+0x%x>",
               read_or_written(write), code);
  fault_with(nearest->site,
             "out of bounds: %u bytes at byte %lld of a shared array of %u bytes are %s, at <code+0x%x>; the array is taken",
             bytes, (long long)(address - (uintptr_t)nearest->base), nearest->bytes, read_or_written(write), code);
}

struct Name {
  char text[160];
};
static Name name_of(const Place& place, uint64_t element) {
  Name name;
  if (place.array)
    snprintf(name.text, sizeof name.text, "element %llu of the shared array taken at %s:%d", (unsigned long long)element,
             strrchr(place.array->site.file, '/') ? strrchr(place.array->site.file, '/') + 1 : place.array->site.file,
             place.array->site.line);
  else
    snprintf(name.text, sizeof name.text, "<argument %d byte %llu>", place.tensor->argument,
             (unsigned long long)element * place.tensor->item);
  return name;
}
[[noreturn]] static void race(const Place& place, uint64_t element, bool write, uint32_t code, const Access& other,
                              bool other_wrote) {
  const bool same_block = other.block == block_number();
  fault_with(NOWHERE, "race: %s is %s at <code+0x%x>, and thread %u%s has %s it at <code+0x%x>; %s",
             name_of(place, element).text, read_or_written(write), code, other.thread,
             same_block ? "" : " of another block", read_or_written(other_wrote), other.code,
             same_block ? "no barrier orders the two" : "nothing orders two blocks");
}

// ---- accesses ----
static bool ordered(const Access& access) {
  if (access.block != block_number()) return false;
  return access.thread == self->id || access.clock <= clock_of(self->id)[access.thread];
}
static bool exists(const Access& access, bool shared) {
  return access.block != 0 && (!shared || access.block == block_number());
}

static void access_cell(const Place& place, uint64_t element, Cell& cell, bool write, uint32_t code) {
  const bool shared = place.array != nullptr;
  if (shared && cell.flight_block == block_number())
    fault_with(Site{cell.flight_file, cell.flight_line},
               "a copy is on its way: %s is %s at <code+0x%x>, and the cp.async of thread %u to it has not been waited "
               "for; it was asked for",
               name_of(place, element).text, read_or_written(write), code, cell.flight_thread);
  if (exists(cell.write, shared) && !ordered(cell.write)) race(place, element, write, code, cell.write, true);
  if (shared && !write && !exists(cell.write, true))
    fault_with(NOWHERE, "unwritten: %s is read at <code+0x%x>, and no thread has written it yet",
               name_of(place, element).text, code);
  const Access now{clock_of(self->id)[self->id], code, block_number(), self->id};
  if (write) {
    for (const Access& read : cell.reads)
      if (exists(read, shared) && !ordered(read)) race(place, element, true, code, read, false);
    cell.write = now;
    cell.reads[0].block = cell.reads[1].block = 0;
    return;
  }
  for (Access& read : cell.reads)  // one that this read comes after adds nothing to it
    if (!exists(read, shared) || ordered(read)) {
      read = now;
      return;
    }
  cell.reads[reads_seen++ % 2] = now;
}

// Of the emulator's own: what a thread can ask about itself, and constants that lie with the kernel's code.
static bool own_memory(uintptr_t address, bool write) {
  if (address - (uintptr_t)worker < sizeof(Worker) || address == (uintptr_t)&self) return !write;
  const uintptr_t page = address >> 12;
  static uintptr_t known_page;
  if (page == known_page) return !write;
  Dl_info info;
  if (!dladdr((void*)address, &info) || (uintptr_t)info.dli_fbase != code_base) return false;
  known_page = page;
  return !write;
}

static void access(const void* pointer, unsigned bytes, bool write, const void* return_address) {
  if (!self) return;
  const uintptr_t address = (uintptr_t)pointer;
  const Fiber& fiber = *static_cast<Fiber*>(self);
  if (address - (uintptr_t)fiber.stack < kStackBytes) return;
  const uint32_t code = (uint32_t)((uintptr_t)return_address - 1 - code_base);
  Place place;
  if (!find(address, bytes, code, place)) {
    if (own_memory(address, write)) return;
    out_of_bounds(address, bytes, write, code);
  }
  if (write && place.tensor && !place.tensor->writable)
    fault_with(NOWHERE, "<argument %d byte %llu> is written at <code+0x%x>, through a pointer to const",
               place.tensor->argument, (unsigned long long)place.byte, code);
  Cell* cells = cells_of(place);
  if (!cells) return;  // nobody writes it
  const unsigned item = place.array ? place.array->item : place.tensor->item;
  const uint64_t last = (place.byte + bytes - 1) / item;
  for (uint64_t i = place.byte / item; i <= last; i++)
    access_cell(place, i, cells[place.array ? i * item : i], write, code);
}

void check_in_flight(const Copy& copy, Site site) {
  const Worker& w = *worker;
  for (char* p = (char*)copy.to; p < (char*)copy.to + copy.bytes; p++) {
    Cell& cell = shared_cells[p - w.shared];
    cell.flight_block = block_number(), cell.flight_thread = self->id;
    cell.flight_file = site.file, cell.flight_line = site.line;
  }
}
void check_lands(const Copy& copy) {
  for (char* p = (char*)copy.to; p < (char*)copy.to + copy.bytes; p++) shared_cells[p - worker->shared].flight_block = 0;
}

}  // namespace emu

#define ANNOUNCED(name, bytes, write) \
  void name(void* p) { emu::access(p, bytes, write, __builtin_return_address(0)); }
extern "C" {
ANNOUNCED(__tsan_read1, 1, false)
ANNOUNCED(__tsan_read2, 2, false)
ANNOUNCED(__tsan_read4, 4, false)
ANNOUNCED(__tsan_read8, 8, false)
ANNOUNCED(__tsan_read16, 16, false)
ANNOUNCED(__tsan_unaligned_read2, 2, false)
ANNOUNCED(__tsan_unaligned_read4, 4, false)
ANNOUNCED(__tsan_unaligned_read8, 8, false)
ANNOUNCED(__tsan_unaligned_read16, 16, false)
ANNOUNCED(__tsan_write1, 1, true)
ANNOUNCED(__tsan_write2, 2, true)
ANNOUNCED(__tsan_write4, 4, true)
ANNOUNCED(__tsan_write8, 8, true)
ANNOUNCED(__tsan_write16, 16, true)
ANNOUNCED(__tsan_unaligned_write2, 2, true)
ANNOUNCED(__tsan_unaligned_write4, 4, true)
ANNOUNCED(__tsan_unaligned_write8, 8, true)
ANNOUNCED(__tsan_unaligned_write16, 16, true)
void __tsan_read_range(void* p, unsigned long n) { emu::access(p, (unsigned)n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { emu::access(p, (unsigned)n, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
