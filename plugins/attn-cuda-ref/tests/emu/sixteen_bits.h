// Numbers of 16 bits on a CPU: IEEE 754 binary16 and bfloat16, each operation rounded once, to nearest, ties to even,
// as the hardware does. Wide numbers are doubles, in which sums and products of two such numbers lose nothing that
// could change the rounding.
#pragma once

namespace emu {

// A format of 16 bits: `fraction` bits after the leading one, exponents of normal numbers from `lowest` up.
template <int fraction_bits, int lowest_exponent>
struct Format {
  static constexpr int kFraction = fraction_bits;
  static constexpr int kLowest = lowest_exponent;
  static constexpr unsigned short kInfinity = (unsigned short)((0x7fff >> fraction_bits) << fraction_bits);
  static constexpr unsigned short kNaN = 0x7fff;
};
using Binary16 = Format<10, -14>;
using BFloat16 = Format<7, -126>;

inline unsigned bits_of(float x) { return __builtin_bit_cast(unsigned, x); }
inline unsigned long bits_of(double x) { return __builtin_bit_cast(unsigned long, x); }
inline float float_of(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline double double_of(unsigned long bits) { return __builtin_bit_cast(double, bits); }

// The nearest number of the format. Adding and subtracting 2^e, where the format's last bit at that size is worth
// 2^(e - 52), rounds a double to that bit with the CPU's own rounding, which is to nearest even.
template <class F>
inline unsigned short round_to(double x) {
  const unsigned short sign = (unsigned short)(bits_of(x) >> 63 << 15);
  if (x != x) return F::kNaN;
  double size = sign ? -x : x;
  int exponent = (int)(bits_of(size) >> 52) - 1023;
  if (exponent > 127) return sign | F::kInfinity;
  if (exponent < F::kLowest) exponent = F::kLowest;
  const double grain = double_of((unsigned long)(exponent - F::kFraction + 52 + 1023) << 52);
  volatile double shifted = size + grain;  // volatile: no compiler may cancel the pair
  size = shifted - grain;
  exponent = (int)(bits_of(size) >> 52) - 1023;
  if (exponent < F::kLowest) {  // subnormal, or zero
    const double unit = double_of((unsigned long)(F::kFraction - F::kLowest + 1023) << 52);
    return sign | (unsigned short)(size * unit);
  }
  const unsigned fraction = (unsigned)(bits_of(size) >> (52 - F::kFraction)) & ((1u << F::kFraction) - 1);
  const unsigned code = ((unsigned)(exponent - F::kLowest + 1) << F::kFraction) | fraction;
  return sign | (unsigned short)(code < F::kInfinity ? code : F::kInfinity);
}

inline unsigned short binary16_of(float x) {
  return x != x ? Binary16::kNaN : __builtin_bit_cast(unsigned short, (_Float16)x);
}
inline float wide_binary16(unsigned short bits) { return (float)__builtin_bit_cast(_Float16, bits); }
// bfloat16 is the upper half of a float: half of what is cut off, and one less where that makes ties even, is added.
inline unsigned short bfloat16_of(float x) {
  const unsigned bits = bits_of(x);
  return x != x ? BFloat16::kNaN : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float wide_bfloat16(unsigned short bits) { return float_of((unsigned)bits << 16); }

// a b + c in a double whose last bit says that something is missing where it is: rounding that to few bits rounds the
// exact sum. (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008: rounding to odd.)
inline double multiply_add_to_odd(double a, double b, double c) {
  const double product = a * b;  // exact: 22 bits
  const double sum = product + c;
  if (!(sum - sum == 0)) return sum;
  const double part = sum - product;
  const double missing = (product - (sum - part)) + (c - part);
  if (missing == 0 || bits_of(sum) & 1) return sum;
  const bool away_from_zero = (missing > 0) == (sum > 0);
  return double_of(away_from_zero ? bits_of(sum) + 1 : bits_of(sum) - 1);
}

}  // namespace emu
