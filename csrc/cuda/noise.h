// The noise field on a GPU: philox.h's counters, and normals from approximate logarithm, sine and cosine.
#pragma once

#include <hopper.h>

#include "params.h"

namespace smoothie {
namespace cuda {

struct Normals {
  float even, odd;
};

// Philox2x32-10 of a pair of columns; row is shifted already. No word is thrown away: both columns are used.
__device__ inline void words(uint32_t pair, uint32_t row, uint32_t key, uint32_t& r0, uint32_t& r1) {
  r0 = pair, r1 = row;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product = uint64_t(kPhilox2x32Multiplier) * r0;  // one wide multiply, not a high and a low one
    r0 = uint32_t(product >> 32) ^ key ^ r1, r1 = uint32_t(product);
    key += kPhiloxKeyIncrement;
  }
}

// sqrt(-2 ln u) (cos, sin)(2 pi v), u = (r0 + 1/2) / 2^32, v = (r1 + 1/2) / 2^32; at most 6.764. Next to u = 1 the
// logarithm is off by 3e-7, which only a radius below 0.03 feels, by 3e-4 at most; the field's contract allows 1e-3
// there. Elsewhere normals are right to 1e-5. An exact one would take eight instructions more a pair, of 95.
__device__ inline Normals box_muller(uint32_t r0, uint32_t r1) {
  constexpr float kMinusTwoLn2 = -1.38629436f, kPi = 3.14159265f;
  const float u = fmaf(float(r0), 0x1p-32f, 0x1p-33f);
  const float squared = fmaxf(kMinusTwoLn2 * hopper::log2_approx(u), 0.0f);  // may come out below zero next to u = 1
  const float radius = hopper::sqrt_approx(squared);
  // In [-pi, pi): no range reduction. Without the half of v, 7e-10, which float32 would not hold.
  const float angle = float(int32_t(r1)) * (kPi * 0x1p-31f);
  return {radius * hopper::cos_approx(angle), radius * hopper::sin_approx(angle)};
}

__device__ inline Normals normals(uint32_t pair, uint32_t shifted_row_id, uint32_t key) {
  uint32_t r0, r1;
  words(pair, shifted_row_id, key, r0, r1);
  return box_muller(r0, r1);
}

__device__ inline uint32_t row_id_of(const int64_t* row_ids, uint32_t row_offset, int64_t row) {
  return row_ids ? uint32_t(row_ids[row]) : row_offset + uint32_t(row);
}

}  // namespace cuda
}  // namespace smoothie
