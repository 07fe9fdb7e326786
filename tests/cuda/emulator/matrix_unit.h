// The arithmetic of Hopper's matrix units on 16-bit numbers with 32-bit sums: not that of IEEE 754. One instruction
// sums 16 products and the old sum, c, at once:
//   1. Products are exact. The exponent of a product is the sum of its factors' exponents: its significand is in [1,
//   4).
//      A subnormal number has the smallest exponent of its type.
//   2. All 17 terms are aligned to the largest of their exponents, at least -126. Each is truncated towards zero to
//      23 + `extra_bits` bits after the point of that exponent.
//   3. The terms are added exactly. The sum is truncated towards zero to a 32-bit number, subnormal ones included.
// A sum of 2^128 or more is infinite, a NaN is 0x7FFFFFFF, a zero is positive.
//
// Sources: Xie et al., MMA-Sim, arXiv 2511.10909 (wgmma on H100: all 16 products at once, 25 bits after the point);
// Khattak and Mikaitis, arXiv 2512.07004; Fasi et al., PeerJ CS 330 (V100: no extra bits; A100: 1).
#pragma once

#include <cstdint>

namespace smoothie {
namespace emulator {

constexpr int kDepth = 16;                                           // products of one instruction
constexpr int kExtraBits = 2, kMinExtraBits = 1, kMaxExtraBits = 3;  // Hopper's; what may be set instead

// 16-bit numbers, widened, and the exponents that the unit aligns by.
template <int kRows, int kColumns>
struct Operand {
  alignas(64) float values[kRows][kColumns];
  alignas(64) int16_t exponents[kRows][kColumns];

  void find_exponents(bool half);
};

// sums [16 x kColumns] (+)= a [16 x 16] . b [16 x kColumns]: what one warp gets of a product.
template <int kColumns>
void multiply_and_add(float* sums, const Operand<16, kDepth>& a, const Operand<kDepth, kColumns>& b, bool add,
                      int extra_bits);

}  // namespace emulator
}  // namespace smoothie
