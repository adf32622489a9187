// What the kernels of cuda-ref/simple have in common. A block has 16 rows of 8 lanes. A row is one query (or one key,
// where gradients of keys are made); its lanes share the numbers of head_dim and the items that are walked:
//
//              walked tile (keys)                     head_dim
//            k0 k1 k2 k3 k4 k5 ...                 d0 d1 d2 d3 ...
//   row 0     0  1  2  3  4  5  6  7  0  1 ...      0  1  2  3  4  5  6  7  0  1 ...      <- the lane that has it
//   row 1     0  1  2 ...
//
// So a row's logits are made by all of its lanes at once, and pass to the sums over head_dim through shared memory. A
// row's lanes lie in one warp: between them __syncwarp is enough, and shuffles make sums and maxima.
//
// Constants of the compilation: ELEMENT (float, f16, bf16), HEAD_DIM, HEAD_DIM_V; MASK and SCORE, types of masks.cuh and
// scores.cuh, and the names of the parameters that they are made of; SOFTCAP (0 or 1).
#pragma once
#include "masks.cuh"
#include "scores.cuh"

// Kernels are bounded by __launch_bounds__(THREADS, 1): without the 1, the compiler spills a few bytes of its own accord
// wherever one block more can run for it.
constexpr int LANES = 8, ROWS = 16, THREADS = LANES * ROWS;
constexpr unsigned ALL_LANES = 0xffffffff;

// Items of a tile that a row walks over: as many as fit the 64 KiB of shared memory that every GPU from sm_75 on has.
constexpr int LARGEST_DIM = HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V;
constexpr int WALKED_FORWARD = LARGEST_DIM <= 128 ? 32 : 16;
constexpr int WALKED_BACKWARD = LARGEST_DIM <= 128 ? 16 : 8;

// Head_dim as the lanes share it, and the distance of rows in shared memory: odd, so that rows lie in different banks.
__device__ constexpr int padded(int dim) { return (dim + LANES - 1) / LANES * LANES; }
__device__ constexpr int pitch(int dim) { return padded(dim) + 1; }
__device__ constexpr int per_lane(int dim) { return padded(dim) / LANES; }

// A block whose rows are queries: [q0, q1) of one head. This thread has row `row`, query `q`, which may lie behind q1.
struct Queries {
  Where w;
  int q0, q1, row, lane, q;
};
DEVICE Queries queries_of_block(long long num_heads, long long seqlen_q) {
  const int tiles = (int)((seqlen_q + ROWS - 1) / ROWS);
  const Where w{(int)(blockIdx.x / tiles / num_heads), (int)(blockIdx.x / tiles % num_heads)};
  const int q0 = (int)(blockIdx.x % tiles) * ROWS, row = threadIdx.x / LANES;
  return {w, q0, min(q0 + ROWS, (int)seqlen_q), row, (int)(threadIdx.x % LANES), q0 + row};
}

// A tensor [batch, seqlen, num_heads, head_dim] among the parameters of an entry, and one head of it.
#define OPERAND(name) \
  const ELEMENT *name, long long name##_batch, long long name##_row, long long name##_head, long long name##_dim
#define HEAD(name, b, h) (View{name + (b) * name##_batch + (h) * name##_head, name##_row, name##_dim})
struct View {
  const ELEMENT* data;
  long long row, dim;
};

// Rows [first, first + count) of one head to shared memory, as float. Zeros stand for rows from `end` on, for those that
// `exists` denies, and for what is behind head_dim.
template <int DIM, class Exists>
DEVICE void load(float* tile, View from, int first, int count, int end, Exists exists) {
  for (int i = threadIdx.x; i < count * padded(DIM); i += THREADS) {
    const int row = i / padded(DIM), d = i % padded(DIM);
    const bool is_there = first + row < end && d < DIM && exists(first + row);
    tile[row * pitch(DIM) + d] = is_there ? to_float(from.data[(first + row) * from.row + d * from.dim]) : 0.0f;
  }
}

struct AllExist {
  DEVICE bool operator()(int) const { return true; }
};
struct KeysOf {
  const MASK& mask;
  int b;
  DEVICE bool operator()(int k) const { return mask.exists(b, k); }
};

// The products of a row with the walked items lane, lane + 8, ...
template <int DIM, int WALKED>
DEVICE void products(float (&sums)[WALKED / LANES], const float* row, const float* walked, int lane) {
#pragma unroll
  for (int j = 0; j < WALKED / LANES; j++) sums[j] = 0.0f;
#pragma unroll 8
  for (int d = 0; d < padded(DIM); d++) {
    const float own = row[d];
#pragma unroll
    for (int j = 0; j < WALKED / LANES; j++) sums[j] += own * walked[(lane + j * LANES) * pitch(DIM) + d];
  }
}

// sums += the walked items, each times its weight; a lane has the numbers lane, lane + 8, ... of head_dim.
template <int DIM, int WALKED>
DEVICE void weighted(float (&sums)[per_lane(DIM)], const float* weights, const float* walked, int lane) {
#pragma unroll 4
  for (int j = 0; j < WALKED; j++) {
    const float weight = weights[j];
#pragma unroll
    for (int i = 0; i < per_lane(DIM); i++) sums[i] += weight * walked[j * pitch(DIM) + lane + i * LANES];
  }
}

// Over the lanes of a row.
DEVICE float lanes_sum(float x) {
  for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
DEVICE float lanes_max(float x) {
  for (int step = 1; step < LANES; step *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// logit = softcap * tanh(scale * product / softcap) + what the score adds.
struct Logit {
  float logit, derivative;  // by the product
};
DEVICE Logit logit_of(float product, float scale, float softcap, const SCORE& score, Where w, int q, int k) {
  float logit = product * scale, derivative = scale;
#if SOFTCAP
  const float capped = tanhf(logit / softcap);
  logit = softcap * capped;
  derivative *= 1.0f - capped * capped;
#endif
  return {logit + score.added(w, q, k), derivative};
}
