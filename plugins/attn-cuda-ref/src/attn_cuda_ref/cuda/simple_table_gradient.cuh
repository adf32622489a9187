// Only where a RelPosTable is trained: each entry, a thread, gathers the derivatives of all pairs that it was added to,
// query by query. Constant: TABLE, the type of the table in scores.cuh.
#include "scores.cuh"

template <class Number, class X, class Y, class Z>
DEVICE void gather(Table<Number, X, Y, Z>, const float* grad_logits, float* grad_table, long long num_heads) {
  constexpr int entries = X::size * Y::size * Z::size, tokens = X::extent * Y::extent * Z::extent;
  const long long place = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (place >= num_heads * entries) return;
  const float* of_head = grad_logits + place / entries * tokens * tokens;
  const int entry = (int)(place % entries);
  float sum = 0.0f;
  for (int q = 0; q < tokens; q++) {
    const int x = X::key(q / Z::extent / Y::extent, entry / Z::size / Y::size);
    const int y = Y::key(q / Z::extent % Y::extent, entry / Z::size % Y::size);
    const int z = Z::key(q % Z::extent, entry % Z::size);
    if (x < 0 || x >= X::extent || y < 0 || y >= Y::extent || z < 0 || z >= Z::extent) continue;
    sum += of_head[(long long)q * tokens + (x * Y::extent + y) * Z::extent + z];
  }
  grad_table[place] = sum;
}

// grad_logits [num_heads, tokens, tokens] and grad_table [num_heads, entries], contiguous.
extern "C" __global__ void __launch_bounds__(128)
    simple_table_gradient(const float* grad_logits, float* grad_table, long long num_heads) {
  gather(TABLE{}, grad_logits, grad_table, num_heads);
}
