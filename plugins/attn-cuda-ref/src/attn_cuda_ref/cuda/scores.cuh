// A score is a number that is added to the logit of query q and key k, batch entry b and head h. What is added is a
// constant of the logit, so a score changes no derivative of it; the derivative to what a score holds is made from that
// of the logits (simple_bias_gradient.cuh, simple_table_gradient.cuh).
// The meaning of each is that of the Python class of the same name in attn_core.bias.
#pragma once
#include "masks.cuh"

struct NoScore {
  DEVICE float added(Where, int, int) const { return 0.0f; }
};

// A floating TensorBias; broadcast dimensions have stride 0. Where it is -inf, the key is masked.
template <class Number>
struct Added {
  const Number* values;
  long long of_b, of_h, of_q, of_k;
  DEVICE float added(Where w, int q, int k) const {
    return to_float(values[w.b * of_b + w.h * of_h + q * of_q + k * of_k]);
  }
};

// ALiBi: the further from the diagonal, the less. Press, Smith, Lewis 2022, arXiv:2108.12409.
template <class Number>
struct Slopes {
  const Number* slopes;
  long long of_b, of_h, offset;
  DEVICE float added(Where w, int q, int k) const {
    const long long beside = k - (q + offset);
    return -to_float(slopes[w.b * of_b + w.h * of_h]) * (float)(beside < 0 ? -beside : beside);
  }
};

// One axis of a RelPosTable: `size` entries, the middle one for a key at the query's own place.
template <int EXTENT, int SIZE, int DILATION>
struct Offsets {
  static constexpr int extent = EXTENT, size = SIZE;
  // The entry for this pair of coordinates; -1 where there is none.
  static DEVICE int entry(int q, int k) {
    const int offset = k - q + SIZE / 2 * DILATION;  // of entry 0: 0
    return offset >= 0 && offset < SIZE * DILATION && offset % DILATION == 0 ? offset / DILATION : -1;
  }
  // The key that an entry is for; beyond the axis where there is none.
  static DEVICE int key(int q, int entry) { return q + (entry - SIZE / 2) * DILATION; }
};

// RelPosTable: a number for each head and offset on a grid of three axes, the last one fastest; of fewer axes, the first
// ones have one point and one entry.
template <class Number, class X, class Y, class Z>
struct Table {
  const Number* values;
  long long of_h, of_x, of_y, of_z;
  DEVICE float added(Where w, int q, int k) const {
    const int x = X::entry(q / Z::extent / Y::extent, k / Z::extent / Y::extent);
    const int y = Y::entry(q / Z::extent % Y::extent, k / Z::extent % Y::extent);
    const int z = Z::entry(q % Z::extent, k % Z::extent);
    return x < 0 || y < 0 || z < 0 ? 0.0f : to_float(values[w.h * of_h + x * of_x + y * of_y + z * of_z]);
  }
};

// Sum: both are added.
template <class A, class B>
struct Plus {
  A a;
  B b;
  DEVICE float added(Where w, int q, int k) const { return a.added(w, q, k) + b.added(w, q, k); }
};
