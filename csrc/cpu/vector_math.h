// exp, Philox and Box-Muller on the lanes of one tier. Coefficients are minimax fits; each names its worst error.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace smoothie {
namespace {  // one copy per tier

template <class S, int kTerms>
inline typename S::F polynomial(const float (&c)[kTerms], typename S::F x) {
  typename S::F y = S::set(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = S::fma(y, x, S::set(c[i]));
  return y;
}

// exp(x), relative error 2e-7; 0 below -80, exp(most) above `most`, NaN is kept. Weights near the end of float32's
// range would give subnormal products, on which processors stumble: a step at the schedule's start took 17 times as
// long.
template <class S>
inline typename S::F exp(typename S::F x, float most = 88.0f) {
  constexpr float kExp2[] = {1.000000072f,   0.6931469671f,   0.2402211972f,
                             0.05550713276f, 0.009675541394f, 0.001327647152f};  // 2^f, |f| <= 1/2: 7.5e-8
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = S::min_or_nan(S::set(most), S::max_or_nan(S::set(-87.0f), x));
  const auto shifted = S::fma(x, S::set(1.442695041f), S::set(kRound));
  const auto n = S::sub(shifted, S::set(kRound));
  auto f = S::fma(x, S::set(1.44269502f), S::sub(S::set(0.0f), n));
  f = S::fma(x, S::set(1.92596299e-8f), f);  // log2(e) in two parts
  const auto exponent = S::template shift_left<23>(S::as_int(shifted));
  const auto y = S::as_float(S::add_int(S::as_int(polynomial<S>(kExp2, f)), exponent));
  return S::select(S::greater(S::set(-80.0f), x), S::set(0.0f), y);
}

// Keys of the ten rounds, broadcast once per call.
template <class S>
struct RoundKeys {
  typename S::Wide key[kPhiloxRounds];
  uint32_t first;

  explicit RoundKeys(uint32_t k) : first(k) {
    for (int i = 0; i < kPhiloxRounds; ++i)
      key[i] = S::even(S::set_int(int32_t(k + uint32_t(i) * kPhiloxKeyIncrement)));
  }
};

// Philox2x32-10 of the counters (first_pair + k, rows) for kPairs values of k: a pair is column >> 1, the same number
// in every lane, and `rows` differ by lane. The pairs go through the rounds side by side: one alone is a chain of 70
// cycles.
template <class S, int kPairs>
inline void philox(uint32_t first_pair, typename S::I rows, const RoundKeys<S>& keys, typename S::I (&r0)[kPairs],
                   typename S::I (&r1)[kPairs]) {
  typename S::Wide even0[kPairs], odd0[kPairs], even1[kPairs], odd1[kPairs];
  const auto multiplier = S::even(S::set_int(int32_t(kPhilox2x32Multiplier)));
  for (int k = 0; k < kPairs; ++k) {
    // Round one multiplies the same number in every lane: a scalar does it.
    const uint64_t product = uint64_t(kPhilox2x32Multiplier) * (first_pair + uint32_t(k));
    const auto left = S::bit_xor(rows, S::set_int(int32_t(uint32_t(product >> 32) ^ keys.first)));
    even0[k] = S::even(left), odd0[k] = S::odd(left);
    even1[k] = odd1[k] = S::even(S::set_int(int32_t(uint32_t(product))));
  }
  for (int round = 1; round < kPhiloxRounds; ++round) {
    for (int k = 0; k < kPairs; ++k) {
      const auto even_product = S::multiply(even0[k], multiplier), odd_product = S::multiply(odd0[k], multiplier);
      even0[k] = S::xor3(S::upper(even_product), keys.key[round], even1[k]);
      odd0[k] = S::xor3(S::upper(odd_product), keys.key[round], odd1[k]);
      even1[k] = even_product, odd1[k] = odd_product;
    }
  }
  for (int k = 0; k < kPairs; ++k) r0[k] = S::interleave(even0[k], odd0[k]), r1[k] = S::interleave(even1[k], odd1[k]);
}

// Two standard normals a lane from two words a lane: sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (r0 + 1/2) / 2^32,
// v = (r1 + 1/2) / 2^32. Next to u = 1 the distance 1 - u is taken from the integer, so that the small radius is exact.
template <class S>
inline void box_muller(typename S::I r0, typename S::I r1, typename S::F& first, typename S::F& second) {
  constexpr float kLog[] = {
      -2.000001941f, 0.9996334909f, -0.6778220121f, 0.3750648501f,
      -1.045490328f, -1.275843251f, -1.981164228f};  // -2 ln(1 + r) / r on [-1/2, 0]: 9.7e-7 relative
  constexpr float kSin[] = {3.141582561f, -5.167156414f, 2.541995237f, -0.5548396415f};  // sin(pi y) / y: 6e-7
  constexpr float kCos[] = {0.9999999535f, -4.934792859f, 4.058411915f, -1.331880166f, 0.2196968087f};  // 4.7e-8
  const auto half = S::set(0.5f);

  // u < 1/2: u = 2^e f with f in [1/2, 1), r = f - 1. u >= 1/2: e = 0, r = u - 1.
  const auto upper_half = S::negative(r0);
  const auto folded = S::bit_xor(r0, S::template shift_right_sign<31>(r0));  // min(r0, ~r0)
  const auto near_end = S::add(S::to_float(folded), half);                   // 2^32 * min(u, 1 - u)
  const auto bits = S::as_int(near_end);
  const auto mantissa = S::bit_or(S::bit_and(bits, S::set_int(0x007FFFFF)), S::set_int(0x3F000000));
  const auto r =
      S::select(upper_half, S::mul(near_end, S::set(-0x1p-32f)), S::sub(S::as_float(mantissa), S::set(1.0f)));
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

constexpr int kPairsAtOnce = 4;

// One field's noise of 2 * pairs columns for one vector of rows, shifted: put(column, normals) takes it. words
// [column][lanes] is room for Philox's, written in steps of 2 * kPairsAtOnce; put may write there.
//
// Two loops, because the chain of dependent instructions from counter to weight is long: in one loop over all of it the
// processor's window holds two columns and waits. Noise took 23 ms of a step with AVX2 (N = 512, V = 30,522, two
// threads), 12 with the loops apart, 9 with four pairs side by side.
template <class S, class Put>
inline void normals(uint32_t first_pair, int64_t pairs, typename S::I rows, const RoundKeys<S>& keys, float* words,
                    const Put& put) {
  constexpr int kPairs = kPairsAtOnce;
  typename S::I r0[kPairs], r1[kPairs];
  for (int64_t i = 0; i < pairs; i += kPairs) {
    philox<S, kPairs>(first_pair + uint32_t(i), rows, keys, r0, r1);
    for (int k = 0; k < kPairs; ++k) {
      S::store(words + 2 * (i + k) * S::kLanes, S::as_float(r0[k]));
      S::store(words + (2 * (i + k) + 1) * S::kLanes, S::as_float(r1[k]));
    }
  }
  typename S::F even, odd;
  for (int64_t i = 0; i < 2 * pairs; i += 2, words += 2 * S::kLanes) {
    box_muller<S>(S::as_int(S::load(words)), S::as_int(S::load(words + S::kLanes)), even, odd);
    put(i, even);
    put(i + 1, odd);
  }
}

}  // namespace
}  // namespace smoothie
