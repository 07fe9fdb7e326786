// Eight fp32 lanes: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace smoothie {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kBroadcasts = 6;  // 6 x 2 accumulators + 2 loads + 1 broadcast of the 16 registers
  using F = __m256;                      // float lanes
  using I = __m256i;                     // 32-bit lanes
  using Wide = __m256i;                  // 64-bit lanes
  using Mask = __m256i;                  // sign bit of each 32-bit lane
  typedef double Pair __attribute__((may_alias, aligned(4)));  // two floats, loaded as one

  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  template <int n>  // n neighbouring floats, again and again
  static F broadcast(const float* p) {
    if constexpr (n == 1) return _mm256_set1_ps(*p);
    if constexpr (n == 2) return _mm256_castpd_ps(_mm256_set1_pd(*reinterpret_cast<const Pair*>(p)));
    if constexpr (n == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    if constexpr (n == 8) return load(p);
  }
  template <int n>  // every n neighbouring lanes take their sum
  static F sum_groups(F v) {
    if constexpr (n >= 2) v = add(v, _mm256_permute_ps(v, 0xB1));
    if constexpr (n >= 4) v = add(v, _mm256_permute_ps(v, 0x4E));
    if constexpr (n >= 8) v = add(v, _mm256_permute2f128_ps(v, v, 0x01));
    return v;
  }
  static F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
  static F max_or_nan(F bound, F v) { return _mm256_max_ps(bound, v); }  // the second operand's NaN comes through
  static F min_or_nan(F bound, F v) { return _mm256_min_ps(bound, v); }
  static F greater_or_second(F a, F b) { return _mm256_max_ps(a, b); }  // a > b ? a : b
  static F sqrt(F v) { return _mm256_sqrt_ps(v); }
  static Mask greater(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static uint32_t bits(Mask m) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }  // bit i: lane i
  static Mask negative(I v) { return v; }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
  static I select(Mask m, I yes, I no) { return as_int(select(m, as_float(yes), as_float(no))); }

  static I set_int(int32_t v) { return _mm256_set1_epi32(v); }
  static I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_int(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int n>
  static I shift_left(I v) {
    return _mm256_slli_epi32(v, n);
  }
  template <int n>  // zeros come in
  static I shift_right(I v) {
    return _mm256_srli_epi32(v, n);
  }
  template <int n>
  static I shift_right_sign(I v) {
    return _mm256_srai_epi32(v, n);
  }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static F as_float(I v) { return _mm256_castsi256_ps(v); }
  static I as_int(F v) { return _mm256_castps_si256(v); }

  // 32-bit values in 64-bit lanes; what stands in the upper halves is never read.
  static Wide even(I v) { return v; }
  static Wide odd(I v) { return _mm256_srli_epi64(v, 32); }
  static I interleave(Wide even, Wide odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
  static Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }  // 32 x 32 -> 64
  static Wide upper(Wide v) { return _mm256_srli_epi64(v, 32); }
  static Wide xor3(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
};

}  // namespace smoothie
