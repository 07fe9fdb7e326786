// What surrounds the two passes: references and keys before, merging after; bias, distances, the field itself.
#pragma once

#include "rows.h"

namespace smoothie {
namespace cuda {

constexpr float kMaxAbsNormal = 6.77f;  // of the noise field: noise.py
constexpr int kSmallThreads = 128, kSmallWarps = kSmallThreads / 32;

__device__ inline int64_t warp_index() { return int64_t(blockIdx.x) * kSmallWarps + threadIdx.x / 32; }

template <class X>
__device__ inline X sum_of_warp(X x) {
  for (int bit = 1; bit < 32; bit *= 2) x += hopper::shuffle_xor(x, bit);
  return x;
}

// ||a - b||^2 of two rows, by a warp, in double: next to it the scores of near tokens cancel.
template <class T>
__device__ inline double squared_distance(const T* a, const T* b, int width) {
  double sum = 0;
  for (int d = threadIdx.x % 32; d < width; d += 32) {
    const double difference = double(hopper::widen(a[d])) - (b ? double(hopper::widen(b[d])) : 0.0);
    sum += difference * difference;
  }
  return sum_of_warp(sum);
}

// The same of a row of p.x and a token of p.table.
template <class T, class Params>
__device__ inline double squared_distance_to(const Params& p, int64_t row, int64_t token) {
  return squared_distance<T>(static_cast<const T*>(p.x) + row * p.width,
                             static_cast<const T*>(p.table) + token * p.table_stride, p.width);
}

__device__ inline NoiseKey key_of(const int64_t* seed, const int64_t* offset) {
  return noise_key(uint64_t(*seed), uint64_t(*offset));
}

template <class T>
__global__ void prepare_kernel(const __grid_constant__ PrepareParams p) {
  if (blockIdx.x == 0) {
    for (int f = threadIdx.x; f < p.n_fields; f += kSmallThreads) {
      const NoiseKey key = key_of(p.seed, p.offsets + f);
      p.fields[f] = {key.key, key.row_shift, p.field_weights ? p.field_weights[f] : 1.0f};
    }
  }
  const int64_t row = warp_index();
  if (row >= p.n_rows) return;
  const double squares = squared_distance<T>(static_cast<const T*>(p.x) + row * p.width, nullptr, p.width);
  float loudest = 1;
  if (p.field_weights) {
    loudest = 0;
    for (int f = threadIdx.x % 32; f < p.n_fields; f += 32) loudest += fabsf(p.field_weights[f]);
    loudest = sum_of_warp(loudest);
  }
  if (threadIdx.x % 32) return;
  p.ref_score[row] = float(squares / 2);
  p.highest[row] = (p.std ? kMaxAbsNormal * loudest * p.std[row] : 0.0f) - p.headroom;
}

// Of a row's parts the best of a plane of numbers, with its token; by a warp, every thread gets it.
__device__ inline Best best_part(const float* numbers, const int32_t* tokens, int chunks, int64_t rows, int64_t row) {
  Best best;
  for (int c = threadIdx.x % 32; c < chunks; c += 32) best.merge(numbers[c * rows + row], tokens[c * rows + row]);
  best.merge_lanes(31);
  return best;
}

// A block has one row and some of its columns, four a thread. Sums of many parts are shared out among the warps.
template <class T>
__global__ void merge_kernel(const __grid_constant__ MergeParams p) {
  const int64_t row = blockIdx.x, plane = int64_t(p.chunks) * p.n_rows;
  if (p.only && !p.only[row]) return;
  const Best nearest = best_part(p.numbers, p.tokens, p.chunks, p.n_rows, row);
  const Best noisy = best_part(p.numbers + plane, p.tokens + plane, p.chunks, p.n_rows, row);
  float total = 0;
  for (int c = threadIdx.x % 32; c < p.chunks; c += 32) total += p.numbers[2 * plane + c * p.n_rows + row];
  total = sum_of_warp(total);

  if (blockIdx.y == 0 && threadIdx.x < 32) {
    const double distance = squared_distance_to<T>(p, row, nearest.token);
    if (threadIdx.x == 0) {
      const float scale = p.scale[row];
      const float moved = scale * (p.ref_score[row] - nearest.value);
      const float log_sum = p.highest[row] + logf(total) + moved;
      p.nearest[row] = nearest.token, p.noisy[row] = noisy.token;
      p.best_score[row] = nearest.value, p.log_sum[row] = log_sum;
      p.best_logit[row] = noisy.value + p.highest[row] + moved;
      // Not scale (nearest.value - ||x||^2 / 2): matrix units truncate, so every score is off by about as much, to the
      // same side. log_sum has only differences of scores, in which most of that cancels.
      p.lse[row] = float(double(log_sum) - double(scale) * distance / 2);
      // NaN is far; so is a sum that has overflown.
      if (p.far) p.far[row] = !(noisy.value > p.lowest && noisy.value < p.highest_fit);
    }
  }
  if (!p.smoothed) return;

  auto& partial = *reinterpret_cast<float (*)[kSmallThreads][4]>(hopper::shared_memory());
  const int sharing = p.sums > 1 ? kSmallWarps : 1, columns = kSmallThreads / sharing;
  const int d = (int(blockIdx.y) * columns + threadIdx.x % columns) * 4;
  float sum[4] = {};
  if (d < p.width) {
    for (int a = threadIdx.x / columns; a < p.sums; a += sharing) {
      const float* acc = p.acc + (a * p.n_rows + row) * p.width + d;
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += acc[k];
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) partial[threadIdx.x][k] = sum[k];
  __syncthreads();
  if (int(threadIdx.x) >= columns || d >= p.width) return;
  const int64_t at = row * p.width + d;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float mean = 0;
    for (int w = 0; w < sharing; ++w) mean += partial[w * columns + threadIdx.x][k];
    if (p.wide)
      static_cast<float*>(p.smoothed)[at + k] = mean / total;
    else
      hopper::narrow(mean / total, static_cast<T*>(p.smoothed)[at + k]);
  }
}

template <class T>
__global__ void nearest_kernel(const __grid_constant__ NearestParams p) {
  const int64_t row = warp_index();
  if (row >= p.n_rows) return;
  const Best best = best_part(p.numbers, p.tokens, p.chunks, p.n_rows, row);
  // The winner's distance directly: the difference of scores, large numbers, would cancel.
  const double distance = squared_distance_to<T>(p, row, best.token);
  if (threadIdx.x % 32) return;
  p.nearest[row] = best.token, p.distance[row] = float(distance);
}

// A thread has a pair of columns.
__global__ void gaussian_kernel(const __grid_constant__ GaussianParams p) {
  const int64_t pairs = (p.columns + 1) / 2, at = int64_t(blockIdx.x) * kSmallThreads + threadIdx.x;
  const int64_t row = at / pairs, pair = at % pairs;
  if (row >= p.n_rows) return;
  const NoiseKey key = key_of(p.seed, p.offset);
  const Normals eps = normals(uint32_t(pair), row_id_of(p.row_ids, p.row_offset, row) + key.row_shift, key.key);
  float* out = p.out + row * p.columns + 2 * pair;
  out[0] = eps.even;
  if (2 * pair + 1 < p.columns) out[1] = eps.odd;
}

}  // namespace cuda
}  // namespace smoothie
