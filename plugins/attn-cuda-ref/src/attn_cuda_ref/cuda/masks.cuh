// A mask is three questions, each about batch entry b and head h:
//   span   which keys can a block of queries see at all (and, for the gradients of keys, which queries see a block of
//          keys)? May be too wide, never too narrow.
//   tile   is this tile of queries and keys empty, full or mixed? A mixed one is always a legal answer.
//   keep   the exact rule for one query and one key.
// A kernel walks the span, leaves out empty tiles, and asks the rule in mixed ones alone. One question more, `exists`,
// is for padding: what a key that does not exist holds may be anything, NaN too, and is never read.
// The meaning of each mask is that of the Python class of the same name in attn_core.bias.
#pragma once
#include "primitives.cuh"

enum Tile { EMPTY, FULL, MIXED };

struct Where {
  int b, h;  // batch entry, head of the query
};

struct Span {
  int low, high;  // [low, high)
};

// [low, high) within [0, end).
DEVICE Span clipped(long long low, long long high, long long end) {
  low = low < 0 ? 0 : low > end ? end : low;
  high = high > end ? end : high < low ? low : high;
  return {(int)low, (int)high};
}

// No mask.
struct Everything {
  DEVICE Span keys(Where, int, int, int seqlen_kv) const { return {0, seqlen_kv}; }
  DEVICE Span queries(Where, int, int, int seqlen_q) const { return {0, seqlen_q}; }
  DEVICE Tile tile(Where, int, int, int, int) const { return FULL; }
  DEVICE bool keep(Where, int, int) const { return true; }
  DEVICE bool exists(int, int) const { return true; }
};

// Causal and Window: between two diagonals. Key q + offset is on the diagonal of query q; `left` keys before it and
// `right` behind it are kept. No limit is a number larger than any length.
struct Band {
  long long offset, left, right;

  DEVICE Span keys(Where, int q0, int q1, int seqlen_kv) const {
    return clipped(q0 + offset - left, q1 + offset + right, seqlen_kv);
  }
  DEVICE Span queries(Where, int k0, int k1, int seqlen_q) const {
    return clipped(k0 - offset - right, k1 - offset + left, seqlen_q);
  }
  DEVICE Tile tile(Where, int q0, int q1, int k0, int k1) const {
    const long long lowest = k0 - (q1 - 1 + offset), highest = k1 - 1 - (q0 + offset);  // k - diagonal, over the tile
    if (lowest > right || highest < -left) return EMPTY;
    return lowest >= -left && highest <= right ? FULL : MIXED;
  }
  DEVICE bool keep(Where, int q, int k) const {
    const long long beside = k - (q + offset);
    return beside >= -left && beside <= right;
  }
  DEVICE bool exists(int, int) const { return true; }
};

// A number for each batch entry; with stride 0 one for all.
struct PerBatch {
  const long long* values;
  long long stride;
  DEVICE long long of(int b) const { return values[b * stride]; }
};

// PrefixLM: the first keys are seen by all, the rest is causal. `prefixes.values` is null where `prefix` is for all.
struct Prefix {
  long long offset, prefix;
  PerBatch prefixes;

  DEVICE long long of(int b) const { return prefixes.values ? prefixes.of(b) : prefix; }
  DEVICE Span keys(Where w, int, int q1, int seqlen_kv) const {
    const long long causal = q1 + offset, all = of(w.b);
    return clipped(0, causal > all ? causal : all, seqlen_kv);
  }
  DEVICE Span queries(Where w, int k0, int, int seqlen_q) const {
    return clipped(k0 < of(w.b) ? 0 : k0 - offset, seqlen_q, seqlen_q);
  }
  DEVICE Tile tile(Where w, int q0, int q1, int k0, int k1) const {
    const long long all = of(w.b);
    if (k0 >= q1 + offset && k0 >= all) return EMPTY;
    return k1 <= q0 + offset + 1 || k1 <= all ? FULL : MIXED;
  }
  DEVICE bool keep(Where w, int q, int k) const { return k <= q + offset || k < of(w.b); }
  DEVICE bool exists(int, int) const { return true; }
};

// KeyPadding and Cached: the first keys of each batch entry exist, and of those a band is kept, whose diagonal ends with
// the last of them where `from_end` is 1.
struct Cached {
  PerBatch seqlens;
  long long left, right, from_end, seqlen_q;

  DEVICE Band band(int b) const { return {from_end ? seqlens.of(b) - seqlen_q : 0, left, right}; }
  DEVICE Span keys(Where w, int q0, int q1, int) const { return band(w.b).keys(w, q0, q1, (int)seqlens.of(w.b)); }
  DEVICE Span queries(Where w, int k0, int k1, int seqlen_q) const {
    return k0 < seqlens.of(w.b) ? band(w.b).queries(w, k0, k1, seqlen_q) : Span{0, 0};
  }
  DEVICE Tile tile(Where w, int q0, int q1, int k0, int k1) const {
    if (k0 >= seqlens.of(w.b)) return EMPTY;
    const Tile kind = band(w.b).tile(w, q0, q1, k0, k1);
    return kind == FULL && k1 > seqlens.of(w.b) ? MIXED : kind;
  }
  DEVICE bool keep(Where w, int q, int k) const { return exists(w.b, k) && band(w.b).keep(w, q, k); }
  DEVICE bool exists(int b, int k) const { return k < seqlens.of(b); }
};

// Segments: packed documents. Query q sees the keys [low[q], high[q]), and neither limit moves back from one query to
// the next, so that a block of queries is told by its first and its last. `exist` is null where every key does.
struct Ranges {
  const int *low, *high;
  const unsigned char* exist;

  DEVICE Span keys(Where, int q0, int q1, int seqlen_kv) const { return clipped(low[q0], high[q1 - 1], seqlen_kv); }
  DEVICE Span queries(Where, int k0, int k1, int seqlen_q) const {
    return {first_above(high, k0, seqlen_q), first_above(low, k1 - 1, seqlen_q)};
  }
  DEVICE Tile tile(Where, int q0, int q1, int k0, int k1) const {
    if (high[q1 - 1] <= k0 || low[q0] >= k1) return EMPTY;
    return low[q1 - 1] <= k0 && high[q0] >= k1 ? FULL : MIXED;
  }
  DEVICE bool keep(Where, int q, int k) const { return k >= low[q] && k < high[q]; }
  DEVICE bool exists(int, int k) const { return !exist || exist[k]; }

  // The first query whose limit lies above `key`; by bisection.
  static DEVICE int first_above(const int* limits, int key, int count) {
    int before = 0, end = count;
    while (before < end) {
      const int middle = (before + end) / 2;
      if (limits[middle] > key) end = middle;
      else before = middle + 1;
    }
    return before;
  }
};

// One axis of a Neighborhood. All are constants, since dividing by what is known only at run time costs several times
// the code and the time.
template <int EXTENT, int KERNEL, int STRIDE, int DILATION, bool CAUSAL>
struct Axis {
  static constexpr int extent = EXTENT;
  static constexpr int dilation = DILATION;
  static constexpr int reach = KERNEL * DILATION - 1;  // no query sees further: its own place is in its window

  // From the first key of query i to behind the last; between them every DILATION-th is seen.
  static DEVICE Span window(int i) {
    const int line = i % DILATION, position = i / DILATION;
    const int points = (EXTENT - line + DILATION - 1) / DILATION;  // on that line
    const int behind = position / STRIDE * STRIDE + (CAUSAL ? STRIDE - 1 : STRIDE / 2);
    const int leader = behind < points ? behind : points - 1;
    int start = leader - (CAUSAL ? KERNEL - 1 : KERNEL / 2);
    start = start < 0 ? 0 : start;
    if (!CAUSAL && start > points - KERNEL) start = points - KERNEL;  // at a border the window is moved inward
    const int last = CAUSAL ? position : start + KERNEL - 1;
    return {line + DILATION * start, line + DILATION * last + 1};
  }
  static DEVICE bool sees(int q, int k) {
    const Span keys = window(q);
    return k >= keys.low && k < keys.high && (k - keys.low) % DILATION == 0;
  }
};

// A grid of three axes, the last one fastest; of fewer, the first ones have one point.
template <class X, class Y, class Z>
struct Neighborhood {
  static constexpr int row = Z::extent, plane = Y::extent * row;
  static constexpr int reach = X::reach * plane + Y::reach * row + Z::reach;
  static constexpr bool is_line = plane == row && X::extent == 1;

  DEVICE Span keys(Where, int q0, int q1, int seqlen_kv) const { return clipped(q0 - reach, q1 + reach, seqlen_kv); }
  DEVICE Span queries(Where, int k0, int k1, int seqlen_q) const { return clipped(k0 - reach, k1 + reach, seqlen_q); }

  // By the windows on the first axis that has more than one point.
  DEVICE Tile tile(Where, int q0, int q1, int k0, int k1) const {
    if (X::extent > 1) return by_axis<X>(q0 / plane, (q1 - 1) / plane, k0 / plane, (k1 - 1) / plane);
    if (Y::extent > 1) return by_axis<Y>(q0 / row, (q1 - 1) / row, k0 / row, (k1 - 1) / row);
    return by_axis<Z>(q0, q1 - 1, k0, k1 - 1);
  }
  template <class A>
  static DEVICE Tile by_axis(int q_first, int q_last, int k_first, int k_last) {
    Span any = A::window(q_first), all = any;
#pragma unroll 1  // once in a tile: unrolled, compiling a grid of three axes takes three times as long
    for (int q = q_first + 1; q <= q_last; q++) {
      const Span keys = A::window(q);
      any = {keys.low < any.low ? keys.low : any.low, keys.high > any.high ? keys.high : any.high};
      all = {keys.low > all.low ? keys.low : all.low, keys.high < all.high ? keys.high : all.high};
    }
    if (k_last < any.low || k_first >= any.high) return EMPTY;
    return is_line && A::dilation == 1 && k_first >= all.low && k_last < all.high ? FULL : MIXED;
  }
  DEVICE bool keep(Where, int q, int k) const {
    return X::sees(q / plane, k / plane) && Y::sees(q / row % Y::extent, k / row % Y::extent) &&
           Z::sees(q % row, k % row);
  }
  DEVICE bool exists(int, int) const { return true; }
};

// A boolean tensor [batch, num_heads, rows, columns]; broadcast dimensions have stride 0.
struct Booleans {
  const unsigned char* values;
  long long of_b, of_h, of_row, of_column;
  DEVICE bool at(Where w, int row, int column) const {
    return values[w.b * of_b + w.h * of_h + row * of_row + column * of_column];
  }
};

// A boolean TensorBias: nothing is known of a tile without reading all of it.
struct Dense {
  Booleans table;

  DEVICE Span keys(Where, int, int, int seqlen_kv) const { return {0, seqlen_kv}; }
  DEVICE Span queries(Where, int, int, int seqlen_q) const { return {0, seqlen_q}; }
  DEVICE Tile tile(Where, int, int, int, int) const { return MIXED; }
  DEVICE bool keep(Where w, int q, int k) const { return table.at(w, q, k); }
  DEVICE bool exists(int, int) const { return true; }
};

// BlockMask: a boolean for each block of queries and keys. In blocks that are not `full`, another mask says which.
template <int BLOCK_Q, int BLOCK_KV, class Within>
struct Blocks {
  Booleans blocks, full;  // full.values is null where no block is seen whole
  Within within;

  DEVICE Span keys(Where w, int q0, int q1, int seqlen_kv) const {
    return full.values ? Span{0, seqlen_kv} : within.keys(w, q0, q1, seqlen_kv);
  }
  DEVICE Span queries(Where w, int k0, int k1, int seqlen_q) const {
    return full.values ? Span{0, seqlen_q} : within.queries(w, k0, k1, seqlen_q);
  }
  DEVICE Tile tile(Where w, int q0, int q1, int k0, int k1) const {
    bool some = false, every = true, some_whole = false, every_whole = true;
    for (int i = q0 / BLOCK_Q; i <= (q1 - 1) / BLOCK_Q; i++)
      for (int j = k0 / BLOCK_KV; j <= (k1 - 1) / BLOCK_KV; j++) {
        const bool seen = blocks.at(w, i, j), whole = seen && full.values && full.at(w, i, j);
        some |= seen, every &= seen, some_whole |= whole, every_whole &= whole;
      }
    if (!some) return EMPTY;
    if (every_whole) return FULL;
    const Tile inner = within.tile(w, q0, q1, k0, k1);
    if (inner == EMPTY && !some_whole) return EMPTY;
    return inner == FULL && every ? FULL : MIXED;
  }
  DEVICE bool keep(Where w, int q, int k) const {
    const int i = q / BLOCK_Q, j = k / BLOCK_KV;
    return blocks.at(w, i, j) && ((full.values && full.at(w, i, j)) || within.keep(w, q, k));
  }
  DEVICE bool exists(int, int) const { return true; }  // what `within` says of padding does not count in full blocks
};

// Intersection: what both keep.
template <class A, class B>
struct And {
  A a;
  B b;

  static DEVICE Span both(Span x, Span y) {
    const int low = x.low > y.low ? x.low : y.low, high = x.high < y.high ? x.high : y.high;
    return {low, high < low ? low : high};
  }
  DEVICE Span keys(Where w, int q0, int q1, int n) const { return both(a.keys(w, q0, q1, n), b.keys(w, q0, q1, n)); }
  DEVICE Span queries(Where w, int k0, int k1, int n) const {
    return both(a.queries(w, k0, k1, n), b.queries(w, k0, k1, n));
  }
  DEVICE Tile tile(Where w, int q0, int q1, int k0, int k1) const {
    const Tile x = a.tile(w, q0, q1, k0, k1), y = b.tile(w, q0, q1, k0, k1);
    if (x == EMPTY || y == EMPTY) return EMPTY;
    return x == FULL && y == FULL ? FULL : MIXED;
  }
  DEVICE bool keep(Where w, int q, int k) const { return a.keep(w, q, k) && b.keep(w, q, k); }
  DEVICE bool exists(int i, int k) const { return a.exists(i, k) && b.exists(i, k); }
};
