// What is made of a tile's sums: scores, logits with their noise, weights, and what is kept of them.
#pragma once

#include "tiles.h"

namespace smoothie {
namespace cuda {

constexpr int kept_in(Mode mode) {
  return mode == Mode::kKeep1 ? 1 : mode == Mode::kKeep2 ? 2 : mode == Mode::kKeep4 ? 4 : 0;
}

// Pairs of warpgroups that take tiles in turn. The largest logits that buckets keep, and several fields, leave no
// registers for two.
constexpr int phases_of(Mode mode, Noise noise) {
  return kept_in(mode) || mode == Mode::kMean || noise == Noise::kAny ? 1 : 2;
}

// Two rows of a thread, and a quarter of the columns: 8 j + 2 t and the next, t the thread's place among four.
template <class T, Mode kMode, Noise kNoise, int kTokens>
struct Epilogue {
  static constexpr int kKeep = kept_in(kMode), kPhases = phases_of(kMode, kNoise);
  static constexpr int kSharing = kPhases * kWarpgroup;  // threads that share the bias of a tile
  static constexpr bool kLogits = kMode != Mode::kNearest, kStatistics = kMode != Mode::kKeys;
  static constexpr bool kWeights = kMode == Mode::kWeights || kMode == Mode::kMean;
  static constexpr int kPairs = kMode == Mode::kMean ? 4 : 2;  // of columns of a piece, of a thread and row
  static constexpr int kPieces = kTokens / (8 * kPairs);       // of a tile
  static constexpr float kUnit = kMode == Mode::kKeys ? 1.0f : kLog2E;

  const StepParams& p;
  int column;  // 2 t
  NoiseField field{};
  Row rows[2];
  Best nearest[2], noisy[2];
  float total[2] = {};
  Kept<kKeep> even[2], odd[2];  // logits of even and of odd columns
  float* bias;                  // two tiles' in turn
  float next_bias = 0;
  int turn = 0;
  T* weights_of_tile = nullptr;  // where this thread's begin, of its first row

  __device__ Epilogue(const StepParams& params, ScoreShared& shared) : p(params) {
    column = hopper::column_of(threadIdx.x, 0);
    bias = shared.bias[threadIdx.x / kSharing][0];
    if (kLogits) {
      for (int r = 0; r < 2; ++r) rows[r] = Row::of<kNoise>(p, first_row() + 8 * r, kUnit);
      if (kNoise != Noise::kNone && p.std) field = p.fields[0];
      if (kNoise == Noise::kOne) field.key = hopper::same_for_warp(field.key);  // ten round keys in uniform registers
    }
  }

  __device__ static int row_in_block() {
    return threadIdx.x / kWarpgroup % kConsumers * 64 + hopper::row_of(threadIdx.x, 0);
  }

  // Of this thread's two rows; the other is 8 further. With two phases it is calculated when it is asked for: registers
  // are few.
  __device__ static int64_t first_row() {
    int block = blockIdx.x, row = row_in_block();
    if (kPhases == 2) hopper::hide(block), hopper::hide(row);
    return int64_t(block) * kTileRows + row;
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

  __device__ void begin_tile(int tile) {
    if constexpr (kMode == Mode::kWeights) {
      weights_of_tile = static_cast<T*>(p.weights) + int(first_row()) * p.weights_stride + tile * kTokens +
                        (column & 4) + (column & 2) * 4;
      hopper::hide(weights_of_tile);  // else every store would calculate it
    }
    turn ^= 1;
    if (threadIdx.x % kSharing < kWarpgroup) bias[turn * kWarpgroup + threadIdx.x % kWarpgroup] = next_bias;
    hopper::sync_threads(1 + threadIdx.x / kSharing, kSharing);
  }

  // A piece of a tile's sums. Its weights, of both rows: two of neighbouring columns a word.
  __device__ void take(const float (&sums)[kTokens / 2], int tile, int piece, uint32_t (&weights)[2][kPairs]) {
    const Columns columns = columns_of(tile, piece * (8 * kPairs) + column);
    const int at = turn * kWarpgroup + piece * (8 * kPairs) + column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float low[kPairs], high[kPairs];  // of the even and of the odd columns: scores, logits, weights
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float* sum = &sums[(piece * kPairs + i) * 4 + r * 2];
        float low_bias = bias[at + 8 * i], high_bias = bias[at + 8 * i + 1];
        if (kPhases == 2) hopper::load_pair(bias + at + 8 * i, low_bias, high_bias);
        low[i] = sum[0] + low_bias, high[i] = sum[1] + high_bias;
      }
      if (kStatistics) nearest[r].take(low, high, p.first_token + columns.first, columns.step);
      if (kLogits) take_logits(low, high, r, columns, tile, piece, weights[r]);
    }
  }

  __device__ void take_logits(float (&low)[kPairs], float (&high)[kPairs], int r, Columns columns, int tile, int piece,
                              uint32_t (&weights)[kPairs]) {
    const int first = columns.first, step = columns.step;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low[i] = rows[r].logit(low[i]), high[i] = rows[r].logit(high[i]);
    add_noise<kNoise>(low, high, rows[r], uint32_t(p.first_token + first) / 2, step / 2, field, p);
    const int end = p.end_token - p.first_token;
    if ((tile + 1) * kTokens > end) {  // a scale of zero would make NaN of the bias there
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (first + step * i >= end) low[i] = -kInfinity;
        if (first + step * i + 1 >= end) high[i] = -kInfinity;
      }
    }
    if constexpr (kMode == Mode::kKeys) {
      if (first_row() + 8 * r >= p.n_rows) return;
      int64_t* keys = p.keys + (first_row() + 8 * r) * p.weights_stride + first;
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
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = hopper::exp2_approx(low[i]), b = hopper::exp2_approx(high[i]);
      total[r] += a + b;
      if (kWeights) weights[i] = hopper::pack<T>(a, b);
    }
    if constexpr (kMode == Mode::kWeights) store_weights(weights, r, piece);
  }

  // Four threads have two columns each of two groups of eight. A thread gets four columns of one group: 8 bytes, of the
  // 32 that the four write together.
  __device__ void store_weights(const uint32_t (&packed)[2], int r, int piece) {
    const bool odd_lane = column & 2;
    const uint32_t kept = odd_lane ? packed[1] : packed[0];
    const uint32_t got = hopper::shuffle_xor(odd_lane ? packed[0] : packed[1], 1);
    T* weights = weights_of_tile + 8 * r * p.weights_stride + piece * (8 * kPairs);
    hopper::store_global(weights, odd_lane ? got : kept, odd_lane ? kept : got);
  }

  // What the buckets of a part have kept; then they are empty again.
  __device__ void end_part(int part) {
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first_row() + 8 * r;
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

  // Of all phases: the second hands its own to the first. Then all tiles have been read, and their memory is free.
  __device__ void store_statistics(ScoreShared& shared) {
    static_assert(kStatistics);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      nearest[r].merge_lanes(3), noisy[r].merge_lanes(3);
      total[r] += hopper::shuffle_xor(total[r], 1);
      total[r] += hopper::shuffle_xor(total[r], 2);
    }
    if constexpr (kPhases == 2) {
      struct Found {
        Best nearest, noisy;
        float total;
      };
      auto* found = reinterpret_cast<Found*>(shared.boxes) + row_in_block();
      constexpr int kAll = 3, kThreads = kPhases * kConsumers * kWarpgroup;  // a barrier; its threads
      const bool second = threadIdx.x >= kConsumers * kWarpgroup;
      hopper::sync_threads(kAll, kThreads);
      if (second && column == 0)
        for (int r = 0; r < 2; ++r) found[8 * r] = {nearest[r], noisy[r], total[r]};
      hopper::sync_threads(kAll, kThreads);
      if (second) return;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        nearest[r].merge(found[8 * r].nearest.value, found[8 * r].nearest.token);
        noisy[r].merge(found[8 * r].noisy.value, found[8 * r].noisy.token);
        total[r] += found[8 * r].total;
      }
    }
    const int64_t plane = int64_t(p.chunks) * p.n_rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first_row() + 8 * r, at = int64_t(blockIdx.y) * p.n_rows + row;
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
