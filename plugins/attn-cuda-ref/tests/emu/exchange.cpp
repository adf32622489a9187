// What the lanes of a warp exchange: the last to come reads what the others laid on their stacks, and answers there.
#include "sixteen_bits.h"
#include "state.h"

namespace emu {

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

}  // namespace emu
