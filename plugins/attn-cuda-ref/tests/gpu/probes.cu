// One probe for each primitive, against its definition: tests/test_primitives.py runs them through the emulator, and
// on a GPU where there is one. They are the first thing to run on a GPU that is new: what the emulator and the kernels
// believe of an instruction together, only a GPU can refute.
#include "primitives.cuh"

#ifndef TYPE
#define TYPE f16  // or bf16, which has no arithmetic and no matrices before sm_80
#endif

// ---- numbers of 16 bits ----
extern "C" __global__ void widen(const TYPE* narrow, float* wide) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  wide[i] = to_float(narrow[i]);
}
extern "C" __global__ void narrow(const float* wide, TYPE* narrow, long long count) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) narrow[i] = from_float<TYPE>(wide[i]);
}

extern "C" __global__ void pairs(const float* wide, unsigned* packed) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  packed[i] = pack<TYPE>(wide[2 * i], wide[2 * i + 1]);
}

extern "C" __global__ void arithmetic(const TYPE* a, const TYPE* b, const TYPE* c, TYPE* sum, TYPE* product,
                                      TYPE* fused) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  sum[i] = add(a[i], b[i]);
  product[i] = multiply(a[i], b[i]);
  fused[i] = multiply_add(a[i], b[i], c[i]);
}

// ---- what lanes exchange ----
extern "C" __global__ void shuffles(const float* given, const double* wide, float* out, double* wide_out) {
  const float x = given[threadIdx.x];
  const int t = threadIdx.x, n = blockDim.x;
  out[t] = __shfl_sync(~0u, x, (t * 7 + 3) % 32);
  out[n + t] = __shfl_xor_sync(~0u, x, 5);
  out[2 * n + t] = __shfl_up_sync(~0u, x, 3);
  out[3 * n + t] = __shfl_down_sync(~0u, x, 6);
  out[4 * n + t] = __shfl_sync(~0u, x, 13, 8);
  out[5 * n + t] = __shfl_up_sync(~0u, x, 3, 8);
  out[6 * n + t] = __shfl_down_sync(~0u, x, 3, 8);
  out[7 * n + t] = __shfl_xor_sync(~0u, x, 4, 4);
  const unsigned half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[8 * n + t] = __shfl_xor_sync(half, x, 8);
  wide_out[t] = __shfl_xor_sync(~0u, wide[t], 1);
}

extern "C" __global__ void votes(const int* given, int* out) {
  const int t = threadIdx.x, n = blockDim.x;
  const unsigned quarter = 0xffu << (t % 32 / 8 * 8);
  out[t] = __ballot_sync(~0u, given[t]);
  out[n + t] = __ballot_sync(quarter, given[t]);
  out[2 * n + t] = __all_sync(quarter, given[t]);
  out[3 * n + t] = __any_sync(quarter, given[t]);
}

// ---- barriers ----
extern "C" __global__ void rotate(int* out, long long rounds) {
  SharedMemory shared;
  int* turn = shared.take<int>(128);
  const int t = threadIdx.x;
  int value = t;
  for (int i = 0; i < rounds; i++) {
    turn[t] = value;
    __syncthreads();
    value = turn[(t + 1) % 128];
    __syncthreads();
  }
  int* mine = shared.take<int>(128);
  mine[t] = value;
  __syncwarp();
  out[t] = mine[t ^ 1];
}
// One warp fills two places in turn, the other three take from them: barriers 1, 2 say full; 3, 4 say empty.
extern "C" __global__ void pass_on(int* out, long long rounds) {
  SharedMemory shared;
  int* place = shared.take<int>(2 * 32);
  const int t = threadIdx.x, lane = t % 32;
  int sum = 0;
  for (int i = 0; i < rounds; i++) {
    const int which = i % 2;
    if (t < 32) {
      if (i >= 2) barrier_sync(3 + which, 128);
      place[which * 32 + lane] = i * 32 + lane;
      barrier_arrive(1 + which, 128);
    } else {
      barrier_sync(1 + which, 128);
      sum += place[which * 32 + (lane + 1) % 32];
      if (i < rounds - 2) barrier_arrive(3 + which, 128);
    }
  }
  out[t] = sum;
}

// ---- matrices ----
extern "C" __global__ void load_matrices(const f16* matrices, unsigned* out, unsigned* two, unsigned* one) {
  SharedMemory shared;
  f16* rows = shared.take<f16>(4 * 8 * 8);
  for (int i = threadIdx.x; i < 4 * 8 * 8; i += 32) rows[i] = matrices[i];
  __syncwarp();
  unsigned straight[4], across[4], pair[2], single[1];
  ldmatrix<4>(straight, rows + 8 * threadIdx.x);
  ldmatrix<4, true>(across, rows + 8 * threadIdx.x);
  ldmatrix<2>(pair, rows + 8 * (threadIdx.x % 16));
  ldmatrix<1, true>(single, rows + 8 * (threadIdx.x % 8));
  for (int i = 0; i < 4; i++) out[i * 32 + threadIdx.x] = straight[i];
  for (int i = 0; i < 4; i++) out[(4 + i) * 32 + threadIdx.x] = across[i];
  for (int i = 0; i < 2; i++) two[i * 32 + threadIdx.x] = pair[i];
  one[threadIdx.x] = single[0];
}
extern "C" __global__ void multiply_matrices(const TYPE* a, const TYPE* b, float* sums) {
  const int g = threadIdx.x / 4, t = 2 * (threadIdx.x % 4);
  unsigned left[4], right[2];
  for (int i = 0; i < 4; i++) {
    const TYPE* pair = a + (g + 8 * (i % 2)) * 16 + t + 8 * (i / 2);
    left[i] = pair[0].bits | (unsigned)pair[1].bits << 16;
  }
  for (int i = 0; i < 2; i++) right[i] = b[(t + 8 * i) * 8 + g].bits | (unsigned)b[(t + 8 * i + 1) * 8 + g].bits << 16;
  float mine[4];
  for (int i = 0; i < 4; i++) mine[i] = sums[(g + 8 * (i / 2)) * 8 + t + i % 2];
  mma_m16n8k16<TYPE>(mine, left, right);
  for (int i = 0; i < 4; i++) sums[(g + 8 * (i / 2)) * 8 + t + i % 2] = mine[i];
}

// ---- who and where a thread is ----
extern "C" __global__ void places(long long* out, long long stride, float scale, long long offset) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[(block * threads + thread) * stride] = (long long)(scale * (block * 1000 + thread)) + offset;
}

// ---- copies in the background ----
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
extern "C" __global__ void copy(const float* from, float* early, float* late, long long count) {
  SharedMemory shared;
  float* first = shared.take<float>(128);
  float* second = shared.take<float>(128);
  const int t = threadIdx.x;
  cp_async<16>(first + 4 * t, from + 4 * t, 4 * t < count);
  cp_async_commit();
  cp_async<8>(second + 2 * t, from + 2 * t, true);
  cp_async<4>(second + 64 + t, from + 64 + t, 64 + t < count);
  cp_async_commit();
  cp_async_wait<1>();
  early[t] = first[4 * t];
  cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; i++) late[4 * t + i] = first[4 * t + i];
  for (int i = 0; i < 3; i++) late[128 + 3 * t + i] = second[3 * t + i];
}
#endif

// ---- approximations ----
extern "C" __global__ void approximations(const float* given, float* powers, float* logarithms) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  powers[i] = exp2_approximate(given[i]);
  logarithms[i] = log2_approximate(given[i]);
}
