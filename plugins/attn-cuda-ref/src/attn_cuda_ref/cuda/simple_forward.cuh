// Attention, forward: a block has 16 queries of one head and walks the keys that they can see. The softmax is made on the
// way, by a maximum and a sum that are put right whenever the maximum grows (Milakov and Gimelshein, arXiv:1805.02867).
#include "simple_tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    simple_forward(OPERAND(query), OPERAND(key), OPERAND(value), ELEMENT* out, float* lse, long long num_heads,
                   long long heads_per_kv, long long seqlen_q, long long seqlen_kv, float scale,
                   float softcap BIAS_PARAMETERS) {
  constexpr int KEYS = WALKED_FORWARD;
  const MASK mask{MASK_ARGUMENTS};
  const SCORE score{SCORE_ARGUMENTS};
  const auto [w, q0, q1, row, lane, q] = queries_of_block(num_heads, seqlen_q);
  const int h_kv = w.h / (int)heads_per_kv;

  SharedMemory shared;
  float* queries = shared.take<float>(ROWS * pitch(HEAD_DIM));
  float* keys = shared.take<float>(KEYS * pitch(HEAD_DIM));
  float* values = shared.take<float>(KEYS * pitch(HEAD_DIM_V));
  float* weights = shared.take<float>(ROWS * (KEYS + 1));
  load<HEAD_DIM>(queries, HEAD(query, w.b, w.h), q0, ROWS, q1, AllExist{});

  float sums[per_lane(HEAD_DIM_V)] = {};
  float highest = NEGATIVE_INFINITY, total = 0.0f;
  const Span span = mask.keys(w, q0, q1, (int)seqlen_kv);
  for (int k0 = span.low / KEYS * KEYS; k0 < span.high; k0 += KEYS) {
    const int k1 = min(k0 + KEYS, (int)seqlen_kv);
    const Tile kind = mask.tile(w, q0, q1, k0, k1);
    if (kind == EMPTY) continue;

    __syncthreads();  // all rows are done with the tile before
    load<HEAD_DIM>(keys, HEAD(key, w.b, h_kv), k0, KEYS, k1, KeysOf{mask, w.b});
    load<HEAD_DIM_V>(values, HEAD(value, w.b, h_kv), k0, KEYS, k1, KeysOf{mask, w.b});
    __syncthreads();

    float logits[KEYS / LANES];
    products<HEAD_DIM, KEYS>(logits, queries + row * pitch(HEAD_DIM), keys, lane);
    float tile_highest = NEGATIVE_INFINITY;
#pragma unroll
    for (int j = 0; j < KEYS / LANES; j++) {
      const int k = k0 + lane + j * LANES;
      const bool kept = q < q1 && k < k1 && (kind == FULL || mask.keep(w, q, k));
      logits[j] = kept ? logit_of(logits[j], scale, softcap, score, w, q, k).logit : NEGATIVE_INFINITY;
      tile_highest = fmaxf(tile_highest, logits[j]);
    }

    const float before = highest;
    highest = fmaxf(highest, lanes_max(tile_highest));
    const float base = highest == NEGATIVE_INFINITY ? 0.0f : highest;  // -inf - -inf is NaN
    const float shrunk = expf(before - base);
    float tile_total = 0.0f;
#pragma unroll
    for (int j = 0; j < KEYS / LANES; j++) {
      const float weight = expf(logits[j] - base);
      tile_total += weight;
      weights[row * (KEYS + 1) + lane + j * LANES] = weight;
    }
    total = total * shrunk + lanes_sum(tile_total);
    __syncwarp();  // the row's weights are there for all of its lanes
#pragma unroll
    for (int i = 0; i < per_lane(HEAD_DIM_V); i++) sums[i] *= shrunk;
    weighted<HEAD_DIM_V, KEYS>(sums, weights + row * (KEYS + 1), values, lane);
  }

  if (q < q1) {  // a row without keys: 0 and -inf
    ELEMENT* out_row = out + ((w.b * seqlen_q + q) * num_heads + w.h) * HEAD_DIM_V;
#pragma unroll
    for (int i = 0; i < per_lane(HEAD_DIM_V); i++) {
      const int d = lane + i * LANES;
      if (d < HEAD_DIM_V) out_row[d] = from_float<ELEMENT>(total > 0.0f ? sums[i] / total : 0.0f);
    }
    if (lane == 0)
      lse[(w.b * num_heads + w.h) * seqlen_q + q] = total > 0.0f ? highest + logf(total) : NEGATIVE_INFINITY;
  }
}
