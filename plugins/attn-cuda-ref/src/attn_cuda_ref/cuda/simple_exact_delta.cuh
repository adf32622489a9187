// simple_delta, for a bias that is trained in half precision. There `out` was rounded, so that the derivatives of a row's
// logits do not sum to 0, as they must; a bias that is shared by many rows sums up what is left of each. Here delta is
// what it stands for, the sum of P dP over the keys that the row sees, made of the very numbers that the other launches
// make. `grad_lse` is null where there is none.
#include "simple_backward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    simple_exact_delta(OPERAND(query), OPERAND(key), OPERAND(value), OPERAND(grad_out), const float* lse,
                       const float* grad_lse, float* delta, long long num_heads, long long heads_per_kv,
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
  load<HEAD_DIM>(queries, HEAD(query, w.b, w.h), q0, ROWS, q1, AllExist{});
  load<HEAD_DIM_V>(gradients, HEAD(grad_out, w.b, w.h), q0, ROWS, q1, AllExist{});
  const float row_lse = q < q1 ? lse[place] : NEGATIVE_INFINITY;

  float sum = 0.0f;
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
      sum += derivative_of(pairs[j], grad_weights[j], row_lse, 0.0f, kept, scale, softcap, score, w, q, k).logit;
    }
  }
  sum = lanes_sum(sum);
  if (q < q1 && lane == 0) delta[place] = sum - (grad_lse ? grad_lse[place] : 0.0f);
}
