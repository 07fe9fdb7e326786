// Sixteen fp32 lanes: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace smoothie {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kBroadcasts = 12;  // 12 x 2 accumulators + 2 loads of the 32 registers; divides 384, 768
  using F = __m512;                       // float lanes
  using I = __m512i;                      // 32-bit lanes
  using Wide = __m512i;                   // 64-bit lanes
  using Mask = __mmask16;
  typedef double Pair __attribute__((may_alias, aligned(4)));  // two floats, loaded as one

  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  template <int n>  // n neighbouring floats, again and again
  static F broadcast(const float* p) {
    if constexpr (n == 1) return _mm512_set1_ps(*p);
    if constexpr (n == 2) return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const Pair*>(p)));
    if constexpr (n == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (n == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    if constexpr (n == 16) return load(p);
  }
  template <int n>  // every n neighbouring lanes take their sum
  static F sum_groups(F v) {
    if constexpr (n >= 2) v = add(v, _mm512_permute_ps(v, 0xB1));
    if constexpr (n >= 4) v = add(v, _mm512_permute_ps(v, 0x4E));
    if constexpr (n >= 8) v = add(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    if constexpr (n >= 16) v = add(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    return v;
  }
  static F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
  static F max_or_nan(F bound, F v) { return _mm512_max_ps(bound, v); }  // the second operand's NaN comes through
  static F min_or_nan(F bound, F v) { return _mm512_min_ps(bound, v); }
  static F greater_or_second(F a, F b) { return _mm512_max_ps(a, b); }  // a > b ? a : b
  static F sqrt(F v) { return _mm512_sqrt_ps(v); }
  static Mask greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static uint32_t bits(Mask m) { return m; }  // bit i: lane i
  static Mask negative(I v) { return _mm512_movepi32_mask(v); }
  static F select(Mask m, F yes, F no) { return _mm512_mask_mov_ps(no, m, yes); }
  static I select(Mask m, I yes, I no) { return _mm512_mask_mov_epi32(no, m, yes); }

  static I set_int(int32_t v) { return _mm512_set1_epi32(v); }
  static I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_int(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int n>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, n);
  }
  template <int n>  // zeros come in
  static I shift_right(I v) {
    return _mm512_srli_epi32(v, n);
  }
  template <int n>
  static I shift_right_sign(I v) {
    return _mm512_srai_epi32(v, n);
  }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F as_float(I v) { return _mm512_castsi512_ps(v); }
  static I as_int(F v) { return _mm512_castps_si512(v); }

  // 32-bit values in 64-bit lanes; what stands in the upper halves is never read.
  static Wide even(I v) { return v; }
  static Wide odd(I v) { return _mm512_srli_epi64(v, 32); }
  static I interleave(Wide even, Wide odd) { return _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32)); }
  static Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }  // 32 x 32 -> 64
  static Wide upper(Wide v) { return _mm512_srli_epi64(v, 32); }
  static Wide xor3(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
};

}  // namespace smoothie
