// CUDA C++ for g++: what NVRTC knows without any header, and what the package's primitives.cuh defines. The compiler is
// told to read this file first, so a kernel's text is the same for both. A call says where it stands (EMU_HERE), so
// that a fault names the kernel's line.
#pragma once
#include "runtime.h"
#include "sixteen_bits.h"

// ---- words ----
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// Shared memory has no bounds that could be watched unless it is taken from SharedMemory.
#define __shared__ the emulator knows no __shared__ variables: take arrays from SharedMemory;
#define threadIdx (emu::self->thread)
#define blockIdx (emu::self->block)
#define blockDim (emu::self->block_size)
#define gridDim (emu::self->grid_size)
#define warpSize 32

// ---- meetings of threads ----
inline void __syncthreads(emu::Site here = EMU_HERE) { emu::sync_block(here); }
inline void __syncwarp(unsigned mask = ~0u, emu::Site here = EMU_HERE) { emu::sync_warp(mask, here); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emu {
template <class T>
inline T shuffle_from(unsigned mask, T value, unsigned source, Site here) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  unsigned long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source, here);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emu

// The lane that a shuffle reads: PTX, `shfl.sync`. Lanes are in segments of `width`; outside its own, a lane keeps its
// value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, emu::Site here = EMU_HERE) {
  const unsigned lane = emu::self->lane, first = lane & -width;
  return emu::shuffle_from(mask, value, first | (source & (width - 1)), here);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned steps, int width = 32, emu::Site here = EMU_HERE) {
  const unsigned lane = emu::self->lane, within = lane & (width - 1);
  return emu::shuffle_from(mask, value, steps <= within ? lane - steps : lane, here);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned steps, int width = 32, emu::Site here = EMU_HERE) {
  const unsigned lane = emu::self->lane, within = lane & (width - 1);
  return emu::shuffle_from(mask, value, within + steps < (unsigned)width ? lane + steps : lane, here);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = 32, emu::Site here = EMU_HERE) {
  const unsigned lane = emu::self->lane, source = lane ^ flipped, last = lane | (width - 1);
  return emu::shuffle_from(mask, value, source <= last ? source : lane, here);
}
inline unsigned __ballot_sync(unsigned mask, int value, emu::Site here = EMU_HERE) {
  return emu::vote(mask, emu::Vote::ballot, value, here);
}
inline int __all_sync(unsigned mask, int value, emu::Site here = EMU_HERE) {
  return emu::vote(mask, emu::Vote::all, value, here);
}
inline int __any_sync(unsigned mask, int value, emu::Site here = EMU_HERE) {
  return emu::vote(mask, emu::Vote::any, value, here);
}

// ---- arithmetic ----
extern "C" {
float expf(float), exp2f(float), exp10f(float), expm1f(float), logf(float), log2f(float), log1pf(float), sqrtf(float);
float tanhf(float), sinf(float), cosf(float), powf(float, float), fmaf(float, float, float), fabsf(float);
float floorf(float), ceilf(float), truncf(float), rintf(float), fmodf(float, float), copysignf(float, float);
float ldexpf(float, int), fmaxf(float, float), fminf(float, float), erff(float), rsqrtf(float);
double exp(double), exp2(double), log(double), log2(double), sqrt(double), tanh(double), fabs(double), floor(double);
double ceil(double), fma(double, double, double), fmax(double, double), fmin(double, double), pow(double, double);
}
#define EMU_OF_TWO(T)                                  \
  inline T min(T a, T b) { return a < b ? a : b; }     \
  inline T max(T a, T b) { return a < b ? b : a; }
EMU_OF_TWO(int)
EMU_OF_TWO(unsigned)
EMU_OF_TWO(long)
EMU_OF_TWO(unsigned long)
EMU_OF_TWO(long long)
EMU_OF_TWO(unsigned long long)
#undef EMU_OF_TWO
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return x - x == 0; }

inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

#include "primitives_on_cpu.h"
