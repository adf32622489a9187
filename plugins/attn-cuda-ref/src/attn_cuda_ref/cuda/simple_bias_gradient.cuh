// Only where a bias is trained: the derivative by the logits, [batch or 1, num_heads or 1, seqlen_q, seqlen_kv], summed
// over the batch entries and heads that share the bias. A block has one tile of it, and adds up in a fixed order.
#include "simple_backward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    simple_bias_gradient(OPERAND(query), OPERAND(key), OPERAND(value), OPERAND(grad_out), const float* lse,
                         const float* delta, float* grad_logits, long long batch, long long num_heads,
                         long long heads_per_kv, long long seqlen_q, long long seqlen_kv, long long bias_batch,
                         long long bias_heads, float scale, float softcap BIAS_PARAMETERS) {
  constexpr int KEYS = WALKED_BACKWARD;
  const MASK mask{MASK_ARGUMENTS};
  const SCORE score{SCORE_ARGUMENTS};
  const int tiles_q = (int)((seqlen_q + ROWS - 1) / ROWS), tiles_kv = (int)((seqlen_kv + KEYS - 1) / KEYS);
  const int k0 = (int)(blockIdx.x % tiles_kv) * KEYS, k1 = min(k0 + KEYS, (int)seqlen_kv);
  const int q0 = (int)(blockIdx.x / tiles_kv % tiles_q) * ROWS, q1 = min(q0 + ROWS, (int)seqlen_q);
  const int entry = (int)(blockIdx.x / tiles_kv / tiles_q);
  const int b_of_bias = entry / (int)bias_heads, h_of_bias = entry % (int)bias_heads;
  const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, q = q0 + row;

  SharedMemory shared;
  float* queries = shared.take<float>(ROWS * pitch(HEAD_DIM));
  float* gradients = shared.take<float>(ROWS * pitch(HEAD_DIM_V));
  float* keys = shared.take<float>(KEYS * pitch(HEAD_DIM));
  float* values = shared.take<float>(KEYS * pitch(HEAD_DIM_V));

  float sums[KEYS / LANES] = {};
  const int b_end = bias_batch == 1 ? (int)batch : b_of_bias + 1, h_end = bias_heads == 1 ? (int)num_heads : h_of_bias + 1;
  for (int b = b_of_bias; b < b_end; b++)
    for (int h = h_of_bias; h < h_end; h++) {
      const Where w{b, h};
      const int h_kv = h / (int)heads_per_kv;
      const Tile kind = mask.tile(w, q0, q1, k0, k1);
      if (kind == EMPTY) continue;

      __syncthreads();  // all rows are done with the head before
      load<HEAD_DIM>(queries, HEAD(query, b, h), q0, ROWS, q1, AllExist{});
      load<HEAD_DIM_V>(gradients, HEAD(grad_out, b, h), q0, ROWS, q1, AllExist{});
      load<HEAD_DIM>(keys, HEAD(key, b, h_kv), k0, KEYS, k1, KeysOf{mask, b});
      load<HEAD_DIM_V>(values, HEAD(value, b, h_kv), k0, KEYS, k1, KeysOf{mask, b});
      __syncthreads();

      const long long place = (b * num_heads + h) * seqlen_q + q;
      float pairs[KEYS / LANES], grad_weights[KEYS / LANES];
      products<HEAD_DIM, KEYS>(pairs, queries + row * pitch(HEAD_DIM), keys, lane);
      products<HEAD_DIM_V, KEYS>(grad_weights, gradients + row * pitch(HEAD_DIM_V), values, lane);
#pragma unroll
      for (int j = 0; j < KEYS / LANES; j++) {
        const int k = k0 + lane + j * LANES;
        const bool kept = q < q1 && k < k1 && (kind == FULL || mask.keep(w, q, k));
        sums[j] += derivative_of(pairs[j], grad_weights[j], kept ? lse[place] : NEGATIVE_INFINITY,
                                 kept ? delta[place] : 0.0f, kept, scale, softcap, score, w, q, k).logit;
      }
    }

#pragma unroll
  for (int j = 0; j < KEYS / LANES; j++) {
    const int k = k0 + lane + j * LANES;
    if (q < q1 && k < k1) grad_logits[(entry * seqlen_q + q) * seqlen_kv + k] = sums[j];
  }
}
