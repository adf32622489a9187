// What a kernel asks of the machine beyond C++: 16-bit numbers, shared memory, warp matrices, copies in the background,
// named barriers. All PTX of this package is in this file, and it includes no header, so that NVRTC needs no folder.
// PTX: "Parallel Thread Execution ISA", the instruction named above each function; `__CUDA_ARCH__` is 750 for sm_75.
#ifndef ATTN_CUDA_PRIMITIVES
#define ATTN_CUDA_PRIMITIVES

#define DEVICE __device__ __forceinline__
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// ---- numbers of 16 bits -------------------------------------------------------------------------------------------
struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// The nearest T, ties to even; NaN stays NaN, what is too large becomes infinite.
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE f16 from_float<f16>(float x) {
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  bf16 narrow;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  narrow.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return narrow;
}

// One rounding each, to the type of the operands. bfloat16 before sm_80 has no arithmetic of its own.
DEVICE f16 add(f16 a, f16 b) {
  f16 sum;
  asm("add.rn.f16 %0, %1, %2;" : "=h"(sum.bits) : "h"(a.bits), "h"(b.bits));
  return sum;
}
DEVICE f16 multiply(f16 a, f16 b) {
  f16 product;
  asm("mul.rn.f16 %0, %1, %2;" : "=h"(product.bits) : "h"(a.bits), "h"(b.bits));
  return product;
}
DEVICE f16 multiply_add(f16 a, f16 b, f16 c) {
  f16 sum;
  asm("fma.rn.f16 %0, %1, %2, %3;" : "=h"(sum.bits) : "h"(a.bits), "h"(b.bits), "h"(c.bits));
  return sum;
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
DEVICE bf16 multiply_add(bf16 a, bf16 b, bf16 c) {
  bf16 sum;
  asm("fma.rn.bf16 %0, %1, %2, %3;" : "=h"(sum.bits) : "h"(a.bits), "h"(b.bits), "h"(c.bits));
  return sum;
}
DEVICE bf16 add(bf16 a, bf16 b) { return multiply_add(a, bf16{0x3f80}, b); }            // 1.0
DEVICE bf16 multiply(bf16 a, bf16 b) { return multiply_add(a, b, bf16{0x8000}); }       // -0.0 changes no sum
#endif

// Two numbers in one register, the first in the low half.
template <class T>
DEVICE unsigned pack(float low, float high) {
  return from_float<T>(low).bits | (unsigned)from_float<T>(high).bits << 16;
}

// ex2.approx, lg2.approx: 2^x and log2(x), off by 2 ulp at most, subnormal numbers taken as 0.
DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- shared memory ------------------------------------------------------------------------------------------------
extern __shared__ __align__(128) unsigned char attn_shared_bytes[];

// Cuts the block's dynamic shared memory into arrays, each at a multiple of 16 bytes. All threads take the same arrays
// in the same order; what they hold at first is undefined.
struct SharedMemory {
  unsigned used = 0;
  template <class T>
  DEVICE T* take(int count) {
    T* array = (T*)(attn_shared_bytes + used);
    used += (count * (unsigned)sizeof(T) + 15) & ~15u;
    return array;
  }
};

DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// ---- warp matrices ------------------------------------------------------------------------------------------------
// ldmatrix: N matrices of 8 x 8 16-bit numbers. Lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned);
// lane l receives in registers[i] the two numbers of row l / 4, columns 2 (l % 4) and one more (transposed: of column
// l / 4, rows 2 (l % 4) and one more). All 32 lanes take part; with N < 4 the addresses of the last lanes are not read.
template <int N, bool transposed = false>
DEVICE void ldmatrix(unsigned (&registers)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const unsigned address = shared_address(row);
  unsigned r[4] = {};
  if (N == 1 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  if (N == 1 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  if (N == 2 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  if (N == 2 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  if (N == 4 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  if (N == 4 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  for (int i = 0; i < N; i++) registers[i] = r[i];
}

// mma.m16n8k16: sums (16 x 8, float) += a (16 x 16) b (16 x 8). With g = lane / 4 and t = lane % 4, a lane holds
// a: rows g, g + 8, g, g + 8 of columns 2t, 2t, 2t + 8, 2t + 8, each with the next column in the high half;
// b: rows 2t and 2t + 8 (the next row in the high half) of column g; sums: rows g, g, g + 8, g + 8 of columns 2t, 2t + 1.
template <class T>
DEVICE void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
DEVICE void mma_m16n8k16<f16>(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // sm_75 has half the depth
  for (int half = 0; half < 2; half++)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
DEVICE void mma_m16n8k16<bf16>(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// ---- copies in the background ---------------------------------------------------------------------------------------
// cp.async: this thread copies BYTES (4, 8 or 16, both addresses aligned to as many) from global to shared memory; where
// `valid` is false, zeros are written and `from` is not read. What was asked for since the last commit is one group;
// after cp_async_wait<N>() all groups of this thread but the last N have arrived, for this thread: others need a barrier.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <int BYTES>
DEVICE void cp_async(void* to, const void* from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const int bytes_read = valid ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes_read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "n"(BYTES), "r"(bytes_read) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
#endif

// ---- named barriers -------------------------------------------------------------------------------------------------
// barrier.sync, barrier.arrive: barrier `id` (1 to 15; __syncthreads has 0) falls when `threads` threads, whole warps,
// have come to it. One that arrives goes on at once; one that syncs waits.
DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }

#endif
