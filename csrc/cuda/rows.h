// What a thread knows of a row while tokens go by: nearest token, largest logit, sum of weights, largest logits.
//
// Logits are in units of ln 2, so that a weight is one exp2, and less `highest`. The running best are looked up only
// where a piece of the tile has a better one, which after the first tiles is rare.
#pragma once

#include "noise.h"

namespace smoothie {
namespace cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f, kInfinity = __builtin_huge_valf();

// The best value so far and the first token that has it. NaN is never better.
struct Best {
  float value = -kInfinity;
  int token = 0;

  // Of pairs of tokens: the i-th pair is first + i * step and the next.
  template <int kPairs>
  __device__ void take(const float (&even)[kPairs], const float (&odd)[kPairs], int first, int step) {
    float most = fmaxf(even[0], odd[0]);
#pragma unroll
    for (int i = 1; i < kPairs; ++i) most = fmaxf(most, fmaxf(even[i], odd[i]));
    if (!(most >= value)) return;  // tiles do not always come in the order of their tokens
    int found = 0;
#pragma unroll
    for (int i = kPairs - 1; i >= 0; --i) {
      found = odd[i] == most ? first + i * step + 1 : found;
      found = even[i] == most ? first + i * step : found;
    }
    merge(most, found);
  }

  __device__ void merge(float other, int other_token) {
    if (other > value || (other == value && other_token < token)) value = other, token = other_token;
  }

  // Of threads whose numbers differ in these bits.
  __device__ void merge_lanes(int bits) {
    for (int bit = 1; bit <= bits; bit *= 2) {
      const float other = hopper::shuffle_xor(value, bit);
      merge(other, hopper::shuffle_xor(token, bit));
    }
  }
};

// The largest logits of a bucket, in order; of equal ones the lowest token first.
template <int kKeep>
struct Kept {
  float value[kKeep];
  int token[kKeep];

  __device__ Kept() { clear(); }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) value[i] = -kInfinity, token[i] = 0;
  }

  __device__ void take(float logit, int from) {
    if (!(logit > value[kKeep - 1] || (logit == value[kKeep - 1] && from < token[kKeep - 1]))) return;
    value[kKeep - 1] = logit, token[kKeep - 1] = from;
#pragma unroll
    for (int i = kKeep - 1; i > 0; --i) {
      const bool better = value[i] > value[i - 1] || (value[i] == value[i - 1] && token[i] < token[i - 1]);
      const float low = better ? value[i - 1] : value[i];
      const int low_token = better ? token[i - 1] : token[i];
      value[i - 1] = better ? value[i] : value[i - 1], token[i - 1] = better ? token[i] : token[i - 1];
      value[i] = low, token[i] = low_token;
    }
  }
};

template <>
struct Kept<0> {};

// An int64 that sorts as logits do, in float32, and where these are equal as the lower token first: largest first.
__device__ inline int64_t sort_key(float logit, int token) {
  union {
    float number;
    int32_t bits;
  } view{logit == 0.0f ? 0.0f : logit};  // of -0.0 as of 0.0
  const int32_t high = view.bits ^ ((view.bits >> 31) & 0x7FFFFFFF);
  return int64_t(uint64_t(uint32_t(high)) << 32 | uint32_t(0x7FFFFFFF - token));
}

// Several numbers in one store.
struct alignas(16) FourWords {
  uint32_t words[4];
};
struct alignas(16) TwoKeys {
  int64_t keys[2];
};
struct alignas(8) TwoFloats {
  float numbers[2];
};
__device__ inline void store_words(void* to, const uint32_t (&words)[4]) {
  *static_cast<FourWords*>(to) = {{words[0], words[1], words[2], words[3]}};
}
__device__ inline void store_pair(float* to, float first, float second) {
  *reinterpret_cast<TwoFloats*>(to) = {{first, second}};
}
__device__ inline void store_keys(int64_t* to, int64_t first, int64_t second) {
  *reinterpret_cast<TwoKeys*>(to) = {{first, second}};
}

// How many noise fields there are: what a kernel is compiled for. kAny asks at run time.
enum class Noise : int { kNone, kOne, kAny };

// A row's own numbers: logit = scale (score - ref_score) - highest + std sum_f weight_f normal_f, times `unit`. With
// Noise::kOne, std has the field's weight and id its shift.
struct Row {
  float scale = 0, ref_score = 0, minus_highest = 0, std = 0;
  uint32_t id = 0;

  __device__ Row() {}
  template <Noise kNoise>
  __device__ static Row of(const StepParams& p, int64_t index, float unit) {
    Row row;
    if (index >= p.n_rows || !p.scale) return row;
    row.scale = unit * p.scale[index], row.ref_score = p.ref_score[index];
    if (p.highest) row.minus_highest = -unit * p.highest[index];
    if (kNoise == Noise::kNone || !p.std) return row;
    row.std = unit * p.std[index], row.id = row_id_of(p.row_ids, p.row_offset, index);
    if (kNoise == Noise::kOne) row.std *= p.fields[0].weight, row.id += p.fields[0].row_shift;
    return row;
  }

  // Relative to the reference before anything is multiplied: rows far from the origin lose nothing to rounding.
  __device__ float logit(float score) const { return fmaf(scale, score - ref_score, minus_highest); }
};

// Logits of kPairs pairs of columns, the i-th of which is first_pair + i * step, with the noise of all fields.
template <Noise kNoise, int kPairs>
__device__ inline void add_noise(float (&even)[kPairs], float (&odd)[kPairs], const Row& row, uint32_t first_pair,
                                 uint32_t step, const NoiseField& first_field, const StepParams& p) {
  if (kNoise == Noise::kNone || (kNoise == Noise::kAny && !p.std)) return;
  NoiseField field = first_field;
  float std = row.std;
  uint32_t id = row.id;
  int f = 0;
#pragma unroll 1
  do {
    if constexpr (kNoise == Noise::kAny) {
      hopper::hide(f);  // else there would be a second copy of all this: for one field
      if (f > 0) field = p.fields[f];
      std = row.std * field.weight, id = row.id + field.row_shift;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Normals eps = normals(first_pair + i * step, id, field.key);
      even[i] = fmaf(std, eps.even, even[i]), odd[i] = fmaf(std, eps.odd, odd[i]);
    }
  } while (kNoise == Noise::kAny && ++f < p.n_fields);
}

}  // namespace cuda
}  // namespace smoothie
