// The noise field, version 1: who feeds which Philox counter. Integer part; the twin of smoothie_kernels/noise.py.
//
//   once per field:       (key, row_shift, ., .) = Philox4x32-10(counter = (offset, 0x534D4F4F, 0), key = seed)
//   per pair of columns:  (r0, r1) = Philox2x32-10(counter = (column >> 1, row + row_shift), key)
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SMOOTHIE_DEVICE __host__ __device__
#else
#define SMOOTHIE_DEVICE
#endif

namespace smoothie {

// One of the fields whose weighted sum is the noise.
struct NoiseField {
  uint32_t key, row_shift;
  float weight;
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhilox2x32Multiplier = 0xD256D193u;
constexpr uint32_t kPhiloxKeyIncrement = 0x9E3779B9u;  // golden ratio, Random123

struct NoiseKey {
  uint32_t key, row_shift;
};

SMOOTHIE_DEVICE inline NoiseKey noise_key(uint64_t seed, uint64_t offset) {
  constexpr uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u, w1 = 0xBB67AE85u;  // Philox4x32, Random123
  uint32_t c0 = uint32_t(offset), c1 = uint32_t(offset >> 32), c2 = 0x534D4F4Fu /* "SMOO" */, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(m0) * c0, p1 = uint64_t(m1) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
    k0 += kPhiloxKeyIncrement, k1 += w1;
  }
  return {c0, c1};
}

}  // namespace smoothie
