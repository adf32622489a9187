// Where threads meet: a block's barrier, its named barriers, and the lanes of a warp.
#include <cstring>

#include "fibers.h"
#include "state.h"

namespace emu {

static void insert(ThreadSet& set, unsigned thread) { set.words[thread / 64] |= 1ull << thread % 64; }

static void nothing(Fiber*, uint32_t) {}

void meet(Operation operation, unsigned mask, Site site, void* request, Act act) {
  Fiber& fiber = me();
  Warp& warp = worker->warps[fiber.id / kWarpLanes];
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
    barrier.came = barrier.waiting = {};
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

}  // namespace emu
