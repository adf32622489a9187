// The backward's first launch. With weights P and logits S, dS = P (dP - delta), where delta is the row's sum of
// grad_out * out, less the gradient to the LSE (whose derivative by S is P). `grad_lse` is null where there is none.
#include "simple_tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    simple_delta(OPERAND(grad_out), OPERAND(out), const float* grad_lse, float* delta, long long num_heads,
                 long long seqlen_q) {
  const auto [w, q0, q1, row, lane, q] = queries_of_block(num_heads, seqlen_q);
  const View gradients = HEAD(grad_out, w.b, w.h), results = HEAD(out, w.b, w.h);
  const long long place = (w.b * num_heads + w.h) * seqlen_q + q;

  float sum = 0.0f;
  if (q < q1)
    for (int d = lane; d < HEAD_DIM_V; d += LANES)
      sum += to_float(gradients.data[q * gradients.row + d * gradients.dim]) *
             to_float(results.data[q * results.row + d * results.dim]);
  sum = lanes_sum(sum);
  if (q < q1 && lane == 0) delta[place] = sum - (grad_lse ? grad_lse[place] : 0.0f);
}
