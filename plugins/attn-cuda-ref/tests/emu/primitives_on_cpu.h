// The primitives of the package (primitives.cuh has them in PTX), by their definitions. Memory is read and written
// here, in what is compiled with the kernel, so that a sanitizer sees who touches what; meetings are in the runtime.
#pragma once
#define ATTN_CUDA_PRIMITIVES  // the package's own file is then empty

#define DEVICE inline __attribute__((always_inline))
#define NEGATIVE_INFINITY (-__builtin_inff())

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(f16 x) { return emu::wide_binary16(x.bits); }
DEVICE float to_float(bf16 x) { return emu::wide_bfloat16(x.bits); }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE f16 from_float<f16>(float x) {
  return {emu::binary16_of(x)};
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return {emu::bfloat16_of(x)};
}

inline f16 add(f16 a, f16 b) { return {emu::round_to<emu::Binary16>((double)to_float(a) + to_float(b))}; }
inline f16 multiply(f16 a, f16 b) { return {emu::round_to<emu::Binary16>((double)to_float(a) * to_float(b))}; }
inline f16 multiply_add(f16 a, f16 b, f16 c) {
  return {emu::round_to<emu::Binary16>(emu::multiply_add_to_odd(to_float(a), to_float(b), to_float(c)))};
}
inline bf16 multiply_add(bf16 a, bf16 b, bf16 c) {
  return {emu::round_to<emu::BFloat16>(emu::multiply_add_to_odd(to_float(a), to_float(b), to_float(c)))};
}
inline bf16 add(bf16 a, bf16 b) { return multiply_add(a, bf16{0x3f80}, b); }
inline bf16 multiply(bf16 a, bf16 b) { return {emu::round_to<emu::BFloat16>((double)to_float(a) * to_float(b))}; }

template <class T>
DEVICE unsigned pack(float low, float high) {
  return from_float<T>(low).bits | (unsigned)from_float<T>(high).bits << 16;
}

// Subnormal numbers are 0 to these two, as an argument and as a result.
inline float emu_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float exp2_approximate(float x) { return emu_flush(exp2f(emu_flush(x))); }
inline float log2_approximate(float x) { return log2f(emu_flush(x)); }

struct SharedMemory {
  unsigned arrays = 0;
  template <class T>
  T* take(int count, emu::Site here = EMU_HERE) {
    return (T*)emu::take_shared(count, sizeof(T), arrays, here);
  }
};

// Each lane reads the pieces that it receives, from the rows that other lanes gave.
template <int N, bool transposed = false>
inline void ldmatrix(unsigned (&registers)[N], const void* row, emu::Site here = EMU_HERE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const void* rows[32];
  emu::exchange_rows(row, rows, here);
  const unsigned lane = emu::self->lane;
  for (int i = 0; i < N; i++) {
    const unsigned short* const* matrix = (const unsigned short* const*)rows + 8 * i;
    for (int j = 0; j < 8 * N; j++)
      if (((unsigned long)rows[j] & 15) != 0) emu::fault("ldmatrix: a row's address is no multiple of 16 bytes", here);
    const int major = lane / 4, minor = 2 * (lane % 4);
    const unsigned low = transposed ? matrix[minor][major] : matrix[major][minor];
    const unsigned high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
    registers[i] = low | high << 16;
  }
}

constexpr bool is_brain(f16) { return false; }
constexpr bool is_brain(bf16) { return true; }
template <class T>
inline void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], emu::Site here = EMU_HERE) {
  emu::mma_m16n8k16(is_brain(T{}), sums, a, b, here);
}

// As late as is legal: the target is NaN from the request to the wait that covers it.
template <int BYTES>
inline void cp_async(void* to, const void* from, bool valid, emu::Site here = EMU_HERE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  for (int i = 0; i < BYTES / 4; i++) ((volatile unsigned*)to)[i] = ~0u;  // not memset, which sanitizers do not see
  if (valid)
    for (int i = 0; i < BYTES / 4; i++) (void)((const volatile unsigned*)from)[i];
  emu::copy_begin({to, from, BYTES, valid ? BYTES : 0}, here);
}
inline void cp_async_commit() { emu::copy_commit(); }
template <int N>
inline void cp_async_wait() {
  for (unsigned due = emu::copies_due(N); due > 0; due--) {
    const emu::Copy copy = emu::copy_next();
    for (int i = 0; i < copy.bytes / 4; i++)
      ((volatile unsigned*)copy.to)[i] = i < copy.valid_bytes / 4 ? ((const volatile unsigned*)copy.from)[i] : 0;
  }
}

inline void barrier_sync(int id, int threads, emu::Site here = EMU_HERE) { emu::sync_named(id, threads, true, here); }
inline void barrier_arrive(int id, int threads, emu::Site here = EMU_HERE) {
  emu::sync_named(id, threads, false, here);
}
