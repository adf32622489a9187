// The backward's second launch: a block has 16 keys of one key head and walks the queries that see them, of all heads of
// the group one after the other. Nothing is added up by two blocks, so two runs are equal to the bit.
#include "simple_backward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    simple_key_value_gradient(OPERAND(query), OPERAND(key), OPERAND(value), OPERAND(grad_out), const float* lse,
                              const float* delta, ELEMENT* grad_key, ELEMENT* grad_value, long long num_heads,
                              long long heads_per_kv, long long seqlen_q, long long seqlen_kv, float scale,
                              float softcap BIAS_PARAMETERS) {
  constexpr int QUERIES = WALKED_BACKWARD;
  const MASK mask{MASK_ARGUMENTS};
  const SCORE score{SCORE_ARGUMENTS};
  const int tiles = (int)((seqlen_kv + ROWS - 1) / ROWS), num_kv_heads = (int)(num_heads / heads_per_kv);
  const int b = (int)(blockIdx.x / tiles / num_kv_heads), h_kv = (int)(blockIdx.x / tiles % num_kv_heads);
  const int k0 = (int)(blockIdx.x % tiles) * ROWS, k1 = min(k0 + ROWS, (int)seqlen_kv);
  const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, k = k0 + row;

  SharedMemory shared;
  float* keys = shared.take<float>(ROWS * pitch(HEAD_DIM));
  float* values = shared.take<float>(ROWS * pitch(HEAD_DIM_V));
  float* queries = shared.take<float>(QUERIES * pitch(HEAD_DIM));
  float* gradients = shared.take<float>(QUERIES * pitch(HEAD_DIM_V));
  float* weights = shared.take<float>(ROWS * (QUERIES + 1));
  float* derivatives = shared.take<float>(ROWS * (QUERIES + 1));
  load<HEAD_DIM>(keys, HEAD(key, b, h_kv), k0, ROWS, k1, KeysOf{mask, b});
  load<HEAD_DIM_V>(values, HEAD(value, b, h_kv), k0, ROWS, k1, KeysOf{mask, b});

  float key_sums[per_lane(HEAD_DIM)] = {}, value_sums[per_lane(HEAD_DIM_V)] = {};
  for (int h = h_kv * (int)heads_per_kv; h < (h_kv + 1) * (int)heads_per_kv; h++) {
    const Where w{b, h};
    const long long first = (b * num_heads + h) * seqlen_q;
    const Span span = mask.queries(w, k0, k1, (int)seqlen_q);
    for (int q0 = span.low / QUERIES * QUERIES; q0 < span.high; q0 += QUERIES) {
      const int q1 = min(q0 + QUERIES, (int)seqlen_q);
      const Tile kind = mask.tile(w, q0, q1, k0, k1);
      if (kind == EMPTY) continue;

      __syncthreads();  // all rows are done with the tile before
      load<HEAD_DIM>(queries, HEAD(query, b, h), q0, QUERIES, q1, AllExist{});
      load<HEAD_DIM_V>(gradients, HEAD(grad_out, b, h), q0, QUERIES, q1, AllExist{});
      __syncthreads();

      float pairs[QUERIES / LANES], grad_weights[QUERIES / LANES];
      products<HEAD_DIM, QUERIES>(pairs, keys + row * pitch(HEAD_DIM), queries, lane);
      products<HEAD_DIM_V, QUERIES>(grad_weights, values + row * pitch(HEAD_DIM_V), gradients, lane);
#pragma unroll
      for (int j = 0; j < QUERIES / LANES; j++) {
        const int q = q0 + lane + j * LANES, place = row * (QUERIES + 1) + lane + j * LANES;
        const bool kept = q < q1 && k < k1 && (kind == FULL || mask.keep(w, q, k));
        const Derivative d = derivative_of(pairs[j], grad_weights[j], kept ? lse[first + q] : NEGATIVE_INFINITY,
                                           kept ? delta[first + q] : 0.0f, kept, scale, softcap, score, w, q, k);
        weights[place] = d.weight;
        derivatives[place] = d.product;
      }
      __syncwarp();  // the row's weights are there for all of its lanes
      weighted<HEAD_DIM_V, QUERIES>(value_sums, weights + row * (QUERIES + 1), gradients, lane);
      weighted<HEAD_DIM, QUERIES>(key_sums, derivatives + row * (QUERIES + 1), queries, lane);
    }
  }

  if (k < k1) {
    const long long place = (b * seqlen_kv + k) * num_kv_heads + h_kv;
#pragma unroll
    for (int i = 0; i < per_lane(HEAD_DIM); i++)
      if (lane + i * LANES < HEAD_DIM)
        grad_key[place * HEAD_DIM + lane + i * LANES] = from_float<ELEMENT>(key_sums[i]);
#pragma unroll
    for (int i = 0; i < per_lane(HEAD_DIM_V); i++)
      if (lane + i * LANES < HEAD_DIM_V)
        grad_value[place * HEAD_DIM_V + lane + i * LANES] = from_float<ELEMENT>(value_sums[i]);
  }
}
