// What a launch ends with when a kernel does what CUDA does not allow: what, who, where, and who waits where.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "fibers.h"
#include "state.h"

namespace emu {

int faulted;  // the first fault counts, and the other workers stop

const char* name_of(Operation operation) {
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
const char* file_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}
bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

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
void fault_of_all(Site site, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_launch(site, true, format, values);
}
void note_fault(const Fiber& of, Site site, const char* format, ...) {
  va_list values;
  va_start(values, format);
  report(of, site, false, format, values);
  va_end(values);
}

}  // namespace emu
