// exp, Philox and Box-Muller on the lanes of one tier. Coefficients are minimax fits; each names its worst error.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace smoothie {

template <class S, int kTerms>
inline typename S::F polynomial(const float (&c)[kTerms], typename S::F x) {
  typename S::F y = S::set(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = S::fma(y, x, S::set(c[i]));
  return y;
}

// exp(x), relative error 2e-7; below -87 it stays at exp(-87), above 88 at exp(88), NaN is kept.
template <class S>
inline typename S::F exp(typename S::F x) {
  constexpr float kExp2[] = {1.000000072f, 0.6931469671f, 0.2402211972f, 0.05550713276f, 0.009675541394f,
                             0.001327647152f};  // 2^f, |f| <= 1/2: 7.5e-8
  constexpr float kRound = 12582912.0f;         // 1.5 * 2^23: adding it rounds to an integer
  x = S::min_or_nan(S::set(88.0f), S::max_or_nan(S::set(-87.0f), x));
  const auto shifted = S::fma(x, S::set(1.442695041f), S::set(kRound));
  const auto n = S::sub(shifted, S::set(kRound));
  auto f = S::fma(x, S::set(1.44269502f), S::sub(S::set(0.0f), n));
  f = S::fma(x, S::set(1.92596299e-8f), f);  // log2(e) in two parts
  const auto exponent = S::template shift_left<23>(S::as_int(shifted));
  return S::as_float(S::add_int(S::as_int(polynomial<S>(kExp2, f)), exponent));
}

// Keys of the ten rounds, broadcast once per call.
template <class S>
struct RoundKeys {
  typename S::Wide key[kPhiloxRounds];
  uint32_t first;

  explicit RoundKeys(uint32_t k) : first(k) {
    for (int i = 0; i < kPhiloxRounds; ++i) key[i] = S::even(S::set_int(int32_t(k + uint32_t(i) * kPhiloxKeyIncrement)));
  }
};

// Philox2x32-10 of the counters (pair, rows): `pair` = column >> 1 is one number, `rows` differ by lane.
template <class S>
inline void philox(uint32_t pair, typename S::I rows, const RoundKeys<S>& keys, typename S::I& r0, typename S::I& r1) {
  // Round one multiplies the same number in every lane: a scalar does it.
  const uint64_t product = uint64_t(kPhilox2x32Multiplier) * pair;
  const auto left = S::bit_xor(rows, S::set_int(int32_t(uint32_t(product >> 32) ^ keys.first)));
  const auto multiplier = S::even(S::set_int(int32_t(kPhilox2x32Multiplier)));
  auto even0 = S::even(left), odd0 = S::odd(left);
  auto even1 = S::even(S::set_int(int32_t(uint32_t(product)))), odd1 = even1;
  for (int round = 1; round < kPhiloxRounds; ++round) {
    const auto even_product = S::multiply(even0, multiplier), odd_product = S::multiply(odd0, multiplier);
    even0 = S::xor3(S::upper(even_product), keys.key[round], even1);
    odd0 = S::xor3(S::upper(odd_product), keys.key[round], odd1);
    even1 = even_product, odd1 = odd_product;
  }
  r0 = S::interleave(even0, odd0);
  r1 = S::interleave(even1, odd1);
}

// Two standard normals a lane from two words a lane: sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (r0 + 1/2) / 2^32,
// v = (r1 + 1/2) / 2^32. Next to u = 1 the distance 1 - u is taken from the integer, so that the small radius is exact.
template <class S>
inline void box_muller(typename S::I r0, typename S::I r1, typename S::F& first, typename S::F& second) {
  constexpr float kLog[] = {-2.000001941f, 0.9996334909f, -0.6778220121f, 0.3750648501f, -1.045490328f, -1.275843251f,
                            -1.981164228f};  // -2 ln(1 + r) / r on [-1/2, 0]: 9.7e-7 relative
  constexpr float kSin[] = {3.141582561f, -5.167156414f, 2.541995237f, -0.5548396415f};  // sin(pi y) / y: 6e-7
  constexpr float kCos[] = {0.9999999535f, -4.934792859f, 4.058411915f, -1.331880166f, 0.2196968087f};  // 4.7e-8
  const auto half = S::set(0.5f);

  // u < 1/2: u = 2^e f with f in [1/2, 1), r = f - 1. u >= 1/2: e = 0, r = u - 1.
  const auto upper_half = S::negative(r0);
  const auto folded = S::bit_xor(r0, S::template shift_right_sign<31>(r0));  // min(r0, ~r0)
  const auto near_end = S::add(S::to_float(folded), half);                   // 2^32 * min(u, 1 - u)
  const auto bits = S::as_int(near_end);
  const auto mantissa = S::bit_or(S::bit_and(bits, S::set_int(0x007FFFFF)), S::set_int(0x3F000000));
  const auto r = S::select(upper_half, S::mul(near_end, S::set(-0x1p-32f)), S::sub(S::as_float(mantissa), S::set(1.0f)));
  const auto exponent = S::add_int(S::template shift_right<23>(bits), S::set_int(-(126 + 32)));
  const auto e = S::to_float(S::select(upper_half, S::set_int(0), exponent));
  const auto radius = S::sqrt(S::fma(e, S::set(-1.38629436f), S::mul(r, polynomial<S>(kLog, r))));  // -2 ln 2 e + ...

  // angle = pi (y + half turns), y in [-1/2, 1/2]; an odd number of half turns flips both signs.
  const auto y = S::mul(S::to_float(S::bit_or(S::template shift_left<1>(r1), S::set_int(1))), S::set(0x1p-32f));
  const auto flip = S::bit_and(S::add_int(r1, S::set_int(0x40000000)), S::set_int(int32_t(0x80000000u)));
  const auto signed_radius = S::as_float(S::bit_xor(S::as_int(radius), flip));
  const auto y2 = S::mul(y, y);
  first = S::mul(signed_radius, polynomial<S>(kCos, y2));
  second = S::mul(signed_radius, S::mul(y, polynomial<S>(kSin, y2)));
}

}  // namespace smoothie
