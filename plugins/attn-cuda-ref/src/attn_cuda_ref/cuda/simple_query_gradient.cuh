// The backward's third launch: a block has 16 queries of one head and walks the keys that they can see, as the forward
// does. The logits are made anew, which costs less than the memory that keeping them would take.
#include "simple_backward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    simple_query_gradient(OPERAND(query), OPERAND(key), OPERAND(value), OPERAND(grad_out), const float* lse,
                          const float* delta, ELEMENT* grad_query, long long num_heads, long long heads_per_kv,
                          long long seqlen_q, long long seqlen_kv, float scale, float softcap BIAS_PARAMETERS) {
  constexpr int KEYS = WALKED_BACKWARD;
  const MASK mask{MASK_ARGUMENTS};
  const SCORE score{SCORE_ARGUMENTS};
  const auto [w, q0, q1, row, lane, q] = queries_of_block(num_heads, seqlen_q);
  const int h_kv = w.h / (int)heads_per_kv;
  const long long place = (w.b * num_heads + w.h) * seqlen_q + q;

  SharedMemory shared;
  float* queries = shared.take<float>(ROWS * pitch(HEAD_DIM));
  float* gradients = shared.take<float>(ROWS * pitch(HEAD_DIM_V));
  float* keys = shared.take<float>(KEYS * pitch(HEAD_DIM));
  float* values = shared.take<float>(KEYS * pitch(HEAD_DIM_V));
  float* derivatives = shared.take<float>(ROWS * (KEYS + 1));
  load<HEAD_DIM>(queries, HEAD(query, w.b, w.h), q0, ROWS, q1, AllExist{});
  load<HEAD_DIM_V>(gradients, HEAD(grad_out, w.b, w.h), q0, ROWS, q1, AllExist{});
  const float row_lse = q < q1 ? lse[place] : NEGATIVE_INFINITY, row_delta = q < q1 ? delta[place] : 0.0f;

  float sums[per_lane(HEAD_DIM)] = {};
  const Span span = mask.keys(w, q0, q1, (int)seqlen_kv);
  for (int k0 = span.low / KEYS * KEYS; k0 < span.high; k0 += KEYS) {
    const int k1 = min(k0 + KEYS, (int)seqlen_kv);
    const Tile kind = mask.tile(w, q0, q1, k0, k1);
    if (kind == EMPTY) continue;

    __syncthreads();  // all rows are done with the tile before
    load<HEAD_DIM>(keys, HEAD(key, w.b, h_kv), k0, KEYS, k1, KeysOf{mask, w.b});
    load<HEAD_DIM_V>(values, HEAD(value, w.b, h_kv), k0, KEYS, k1, KeysOf{mask, w.b});
    __syncthreads();

    float pairs[KEYS / LANES], grad_weights[KEYS / LANES];
    products<HEAD_DIM, KEYS>(pairs, queries + row * pitch(HEAD_DIM), keys, lane);
    products<HEAD_DIM_V, KEYS>(grad_weights, gradients + row * pitch(HEAD_DIM_V), values, lane);
#pragma unroll
    for (int j = 0; j < KEYS / LANES; j++) {
      const int k = k0 + lane + j * LANES;
      const bool kept = q < q1 && k < k1 && (kind == FULL || mask.keep(w, q, k));
      derivatives[row * (KEYS + 1) + lane + j * LANES] =
          derivative_of(pairs[j], grad_weights[j], row_lse, row_delta, kept, scale, softcap, score, w, q, k).product;
    }
    __syncwarp();  // the row's derivatives are there for all of its lanes
    weighted<HEAD_DIM, KEYS>(sums, derivatives + row * (KEYS + 1), keys, lane);
  }

  if (q < q1) {
    ELEMENT* row_out = grad_query + ((w.b * seqlen_q + q) * num_heads + w.h) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < per_lane(HEAD_DIM); i++)
      if (lane + i * LANES < HEAD_DIM) row_out[lane + i * LANES] = from_float<ELEMENT>(sums[i]);
  }
}
