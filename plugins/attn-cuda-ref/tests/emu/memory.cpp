// Shared memory, which begins as NaN, in arrays with gaps between them; and copies in the background, which arrive when
// they are waited for and not before.
#include <cstdlib>
#include <cstring>

#include "fibers.h"
#include "state.h"

namespace emu {

// ---- shared memory ----
constexpr unsigned char kUnwritten = 0xff;  // NaN in each of the types
static void fill_unwritten(char* from, uint64_t bytes) {
#if defined(EMU_TSAN)
  for (uint64_t i = 0; i < bytes; i++) ((volatile unsigned char*)from)[i] = kUnwritten;  // memset would be seen
#else
  memset(from, kUnwritten, bytes);
#endif
}
void begin_shared(Worker& w) {
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
void check_gaps() {
#if !defined(EMU_ASAN) && !defined(EMU_CHECKED)
  Worker& w = *worker;
  const char* gap = w.shared;
  for (unsigned i = 0; w.array_count > 0 && i <= w.array_count; i++) {
    const char* end = i < w.array_count ? w.arrays[i].base : gap + kGap / 2;
    for (const char* p = gap; p < end; p++) {
      if ((unsigned char)*p == kUnwritten) continue;
      const bool before = i == 0 || (i < w.array_count && end - p < p - gap);
      const Array& array = w.arrays[before ? i : i - 1];
      return note_fault(w.fibers[0], array.site, "shared memory: byte %lld of an array of %u bytes was written",
                        (long long)(p - array.base), array.bytes);
    }
    if (i < w.array_count) gap = w.arrays[i].base + w.arrays[i].bytes;
  }
#endif
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

}  // namespace emu
