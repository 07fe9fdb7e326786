// What is made of a tile's sums: scores, logits with their noise, weights, and what is kept of them.
#pragma once

#include "tiles.h"

namespace smoothie {
namespace cuda {

constexpr int kept_in(Mode mode) {
  return mode == Mode::kKeep1 ? 1 : mode == Mode::kKeep2 ? 2 : mode == Mode::kKeep4 ? 4 : 0;
}

// Two rows of a thread, and a quarter of the columns: 8 j + 2 t and the next, t the thread's place among four.
template <class T, Mode kMode, int kTokens>
struct Epilogue {
  static constexpr int kKeep = kept_in(kMode);
  static constexpr bool kLogits = kMode != Mode::kNearest, kStatistics = kMode != Mode::kKeys;
  static constexpr bool kWeights = kMode == Mode::kWeights || kMode == Mode::kMean;
  static constexpr int kPairs = kKeep ? 2 : 4;  // of columns of a piece, of a thread and row; of 4, buckets spill
  static constexpr int kPieces = kTokens / (8 * kPairs);  // of a tile
  static constexpr float kUnit = kMode == Mode::kKeys ? 1.0f : kLog2E;

  const StepParams& p;
  int64_t first_row;  // and first_row + 8
  int column;         // 2 t
  NoiseField field{};
  Row rows[2];
  Best nearest[2], noisy[2];
  float total[2] = {};
  Kept<kKeep> even[2], odd[2];  // logits of even and of odd columns
  float* bias;                  // two tiles' in turn
  float next_bias = 0;
  int turn = 0;

  __device__ Epilogue(const StepParams& params, ScoreShared& shared) : p(params) {
    first_row = int64_t(blockIdx.x) * kTileRows + threadIdx.x / kWarpgroup * 64 + hopper::row_of(threadIdx.x, 0);
    column = hopper::column_of(threadIdx.x, 0);
    bias = shared.bias[threadIdx.x / kWarpgroup][0];
    if (kLogits) {
      rows[0] = Row(p, first_row, kUnit), rows[1] = Row(p, first_row + 8, kUnit);
      if (p.std) field = p.fields[0];
    }
  }

  // Which tokens a tile's columns are: the pair of columns c and c + 1 is `first` and the next, from p.first_token on,
  // and the pair of c + 8 is `step` tokens further.
  struct Columns {
    int first, step;
  };
  __device__ Columns columns_of(int tile, int c) const {
    if (kKeep > 0 && tile < p.strided_tiles) return {2 * (c / 2 * p.strided_tiles + tile), 8 * p.strided_tiles};
    return {tile * kTokens + c, 8};
  }

  // The bias of a tile's tokens, on its way before it is needed. Beyond the last token no score is any good.
  __device__ void fetch_bias(int tile) {
    const int c = threadIdx.x % kWarpgroup, token = p.first_token + columns_of(tile, c & ~1).first + c % 2;
    next_bias = token < p.end_token ? p.bias[token] : -kInfinity;
  }

  __device__ void begin_tile() {
    turn ^= 1;
    bias[turn * kWarpgroup + threadIdx.x % kWarpgroup] = next_bias;
    hopper::sync_threads(1 + threadIdx.x / kWarpgroup, kWarpgroup);
  }

  // A piece of a tile's sums. Its weights, of both rows: two of neighbouring columns a word.
  __device__ void take(const float (&sums)[kTokens / 2], int tile, int piece, uint32_t (&weights)[2][kPairs]) {
    const Columns columns = columns_of(tile, piece * (8 * kPairs) + column);
    const float* bias_here = bias + turn * kWarpgroup + piece * (8 * kPairs) + column;
    float low_bias[kPairs], high_bias[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low_bias[i] = bias_here[8 * i], high_bias[i] = bias_here[8 * i + 1];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float low[kPairs], high[kPairs];  // of the even and of the odd columns: scores, logits, weights
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float* sum = &sums[(piece * kPairs + i) * 4 + r * 2];
        low[i] = sum[0] + low_bias[i], high[i] = sum[1] + high_bias[i];
      }
      if (kStatistics) nearest[r].take(low, high, p.first_token + columns.first, columns.step);
      if (kLogits) take_logits(low, high, r, columns, weights[r]);
    }
  }

  __device__ void take_logits(float (&low)[kPairs], float (&high)[kPairs], int r, Columns columns,
                              uint32_t (&weights)[kPairs]) {
    const int first = columns.first, step = columns.step;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low[i] = rows[r].logit(low[i]), high[i] = rows[r].logit(high[i]);
    if (p.std) add_noise(low, high, rows[r], uint32_t(p.first_token + first) / 2, step / 2, field, p);
    const int end = p.end_token - p.first_token;
    if (first + step * kPairs > end) {  // a scale of zero would make NaN of the bias there
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (first + step * i >= end) low[i] = -kInfinity;
        if (first + step * i + 1 >= end) high[i] = -kInfinity;
      }
    }
    const int64_t row = first_row + 8 * r;
    if constexpr (kMode == Mode::kKeys) {
      if (row >= p.n_rows) return;
      int64_t* keys = p.keys + row * p.weights_stride + first;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        store_keys(keys + 8 * i, sort_key(low[i], p.first_token + first + step * i),
                   sort_key(high[i], p.first_token + first + step * i + 1));
      return;
    }
    noisy[r].take(low, high, p.first_token + first, step);
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        even[r].take(low[i], p.first_token + first + step * i),
            odd[r].take(high[i], p.first_token + first + step * i + 1);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = hopper::exp2_approx(low[i]), b = hopper::exp2_approx(high[i]);
      sum += a + b;
      if (kWeights) weights[i] = hopper::pack<T>(a, b);
    }
    total[r] += sum;
    if constexpr (kMode == Mode::kWeights) store_weights(weights, row, first);
  }

  // Four threads have two columns each of four groups of eight. Each gets one whole group: 16 bytes, 64 with the
  // others.
  __device__ void store_weights(uint32_t (&packed)[4], int64_t row, int first) {
    const bool odd_lane = column & 2, upper = column & 4;
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t kept = odd_lane ? packed[i + 1] : packed[i];
      const uint32_t got = hopper::shuffle_xor(odd_lane ? packed[i] : packed[i + 1], 1);
      pair[i] = odd_lane ? got : kept, pair[i + 1] = odd_lane ? kept : got;
    }
    uint32_t group[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t kept = upper ? pair[2 + i] : pair[i];
      const uint32_t got = hopper::shuffle_xor(upper ? pair[i] : pair[2 + i], 2);
      group[i] = upper ? got : kept, group[2 + i] = upper ? kept : got;
    }
    if (row >= p.n_rows) return;
    // first is that of this thread's columns, 2 t; its group begins at 8 t.
    T* weights = static_cast<T*>(p.weights) + row * p.weights_stride + (first - column + 4 * column);
    store_words(weights, group);
  }

  // What the buckets of a part have kept; then they are empty again.
  __device__ void end_part(int part) {
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first_row + 8 * r;
        if (row < p.n_rows) {
          int64_t* keys = p.keys + (row * p.parts + part) * kKeep * kBucketsOfPart + column;
#pragma unroll
          for (int i = 0; i < kKeep; ++i)
            store_keys(keys + i * kBucketsOfPart, key_of(even[r].value[i], even[r].token[i], r),
                       key_of(odd[r].value[i], odd[r].token[i], r));
        }
        even[r].clear(), odd[r].clear();
      }
    }
  }

  __device__ void store_statistics() {
    if constexpr (!kStatistics) return;
    const int64_t plane = int64_t(p.chunks) * p.n_rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      nearest[r].merge_lanes(3), noisy[r].merge_lanes(3);
      total[r] += hopper::shuffle_xor(total[r], 1);
      total[r] += hopper::shuffle_xor(total[r], 2);
      const int64_t row = first_row + 8 * r, at = int64_t(blockIdx.y) * p.n_rows + row;
      if (column != 0 || row >= p.n_rows) continue;
      p.numbers[at] = nearest[r].value, p.tokens[at] = nearest[r].token;
      if (!kLogits) continue;
      p.numbers[plane + at] = kLn2 * noisy[r].value, p.tokens[plane + at] = noisy[r].token;
      p.numbers[2 * plane + at] = total[r];
    }
  }

 private:
  __device__ int64_t key_of(float logit, int token, int r) const {
    return sort_key(kLn2 * (logit - rows[r].minus_highest), token);
  }
};

}  // namespace cuda
}  // namespace smoothie
