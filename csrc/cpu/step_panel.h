// One panel of rows against one tile of tokens: score, weigh, gather. Rows lie along the vector lanes, so that all that
// happens to a row - noise, exp, sum, argmax - is vertical; both products read the table as it stands, as broadcasts.
//
// Why not packed: the products below reach 155-171 of 175 GFLOP/s a core (AVX-512) and 80-86 of 94 (AVX2) at D = 384 on
// a table in its natural layout; MKL on its own packed copies reaches 139-151 and 76-78 there.
#pragma once

#include <cstdint>
#include <type_traits>

#include "step_params.h"
#include "vector_math.h"

namespace smoothie {
namespace {  // one copy per tier: a template shared between translation units could be linked from the wrong one

// acc[i][n] = sum_k a[i a_i + k a_k] b[k][n]: M broadcasts times kVectors vectors of lanes, k in order.
template <class S, int M, int kVectors>
inline void multiply(const float* a, int64_t a_i, int64_t a_k, const float* b, int64_t count,
                     typename S::F (&acc)[M][kVectors]) {
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) acc[i][n] = S::set(0.0f);
#pragma GCC unroll 8  // 6 % of a step with AVX-512, 1 % with AVX2
  for (int64_t k = 0; k < count; ++k, a += a_k, b += kVectors * S::kLanes) {
    typename S::F lanes[kVectors];
    for (int n = 0; n < kVectors; ++n) lanes[n] = S::load(b + n * S::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto scalar = S::set(a[i * a_i]);
      for (int n = 0; n < kVectors; ++n) acc[i][n] = S::fma(scalar, lanes[n], acc[i][n]);
    }
  }
}

// p[v][lanes] = E[v] . x + bias[v] for `count` tokens of a tile.
template <class S, int M, int kVectors>
inline void score_rows(const float* tile, int64_t tile_stride, const float* bias, const float* xt, int64_t width,
                       float* p) {
  typename S::F acc[M][kVectors];
  multiply<S, M, kVectors>(tile, tile_stride, 1, xt, width, acc);
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) S::store(p + (i * kVectors + n) * S::kLanes, S::add(acc[i][n], S::set(bias[i])));
}

// ot[d][lanes] += sum_v E[v][d] p[v][lanes] for M columns d. From zero in every tile: two short sums round less than
// one of length V.
template <class S, int M, int kVectors>
inline void gather_columns(const float* tile, int64_t tile_stride, const float* p, int64_t count, float* ot) {
  typename S::F acc[M][kVectors];
  multiply<S, M, kVectors>(tile, 1, tile_stride, p, count, acc);
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) {
      float* o = ot + (i * kVectors + n) * S::kLanes;
      S::store(o, S::add(S::load(o), acc[i][n]));
    }
}

// Calls body<M>(first) over [0, count) in steps of kBroadcasts, and for what is left in steps of 4, 2, 1.
template <int M, class Body>
inline void in_steps(int64_t first, int64_t count, const Body& body) {
  for (; first + M <= count; first += M) body(std::integral_constant<int, M>{}, first);
  if constexpr (M > 1) in_steps<(M > 4 ? 4 : M / 2)>(first, count, body);
}

template <class S, int kVectors>
void score(const float* tile, int64_t tile_stride, const float* bias, const float* xt, int64_t width, int64_t count,
           float* p) {
  in_steps<S::kBroadcasts>(0, count, [&](auto m, int64_t v) {
    score_rows<S, m(), kVectors>(tile + v * tile_stride, tile_stride, bias + v, xt, width,
                                 p + v * kVectors * S::kLanes);
  });
}

template <class S, int kVectors>
void gather(const float* tile, int64_t tile_stride, const float* p, int64_t width, int64_t count, float* ot) {
  in_steps<S::kBroadcasts>(0, width, [&](auto m, int64_t d) {
    gather_columns<S, m(), kVectors>(tile + d, tile_stride, p, count, ot + d * kVectors * S::kLanes);
  });
}

// What is known of a vector of rows: constants, then running results. Stored as [vector][lanes].
template <class S>
struct RowState {
  static constexpr int kLanes = S::kLanes;
  float scale[kLanes], std[kLanes];
  float ref_score[kLanes], ref_logit[kLanes];  // weight = exp(scale (score - ref_score) + std eps - ref_logit)
  int32_t noise_row[kLanes];                   // row id + row_shift
  float best_score[kLanes], best_logit[kLanes], sum[kLanes];
  int32_t token[kLanes], noisy_token[kLanes];
};

// The running maximum of some lanes and the first column that has it.
template <class S>
struct Best {
  typename S::F value;
  typename S::I column;

  void take(typename S::F v, typename S::I v_column) {
    column = S::select(S::greater(v, value), v_column, column);
    value = S::greater_or_second(v, value);
  }
};

// The scores p[v][lanes] of one vector of rows become weights; statistics go to `rows`. first_column is even, eps is
// room for kTile columns of noise.
template <class S, bool kLogits, bool kNoise>
void weigh(float* p, int64_t stride, int64_t first_column, int64_t count, const RoundKeys<S>& keys, float* eps,
           RowState<S>& rows) {
  using F = typename S::F;
  const F scale = S::load(rows.scale), std = S::load(rows.std);
  const F ref_score = S::load(rows.ref_score), shift = S::sub(S::set(0.0f), S::load(rows.ref_logit));
  Best<S> nearest{S::load(rows.best_score), S::load_int(rows.token)};
  Best<S> noisy{S::load(rows.best_logit), S::load_int(rows.noisy_token)};
  F sum = S::set(0.0f);
  if constexpr (kNoise)
    normals<S>(uint32_t(first_column) >> 1, (count + 1) / 2, S::load_int(rows.noise_row), keys, eps);
  for (int64_t v = 0; v < count; ++v, p += stride, eps += S::kLanes) {
    const auto column = S::set_int(int32_t(first_column + v));
    const F score = S::load(p);
    nearest.take(score, column);
    if constexpr (kLogits) {
      F logit = S::fma(scale, S::sub(score, ref_score), shift);
      if constexpr (kNoise) logit = S::fma(std, S::load(eps), logit);
      noisy.take(logit, column);
      const F weight = exp<S>(logit);
      sum = S::add(sum, weight);
      S::store(p, weight);
    }
  }
  S::store(rows.best_score, nearest.value);
  S::store_int(rows.token, nearest.column);
  if constexpr (kLogits) {
    S::store(rows.best_logit, noisy.value);
    S::store_int(rows.noisy_token, noisy.column);
    S::store(rows.sum, S::add(S::load(rows.sum), sum));
  }
}
}  // namespace
}  // namespace smoothie
