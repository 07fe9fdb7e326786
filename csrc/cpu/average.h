// The mean of a few tokens a row: out_i = sum_k weights_ik E[tokens_ik]. Rows are read where they stand, the next ones
// fetched meanwhile.
#pragma once

#include "convert.h"
#include "step_panel.h"
#include "sweep.h"

namespace smoothie {
namespace {  // one copy per tier

constexpr int64_t kAhead = 4;  // tokens

// M vectors of columns, the first at column d.
template <class S, int M>
void average_columns(const AverageParams& p, int64_t row, int64_t d, float* out) {
  const int64_t* tokens = p.tokens + row * p.k;
  const float* weights = p.weights + row * p.k;
  typename S::F acc[M];
  for (int i = 0; i < M; ++i) acc[i] = S::set(0.0f);
  for (int64_t k = 0; k < p.k; ++k) {
    const void* from = at(p.table, p.table_dtype, tokens[k] * p.table_stride + d);
    const void* later = at(p.table, p.table_dtype, tokens[least(k + kAhead, p.k - 1)] * p.table_stride + d);
    const auto weight = S::set(weights[k]);
    for (int i = 0; i < M; ++i) {
      __builtin_prefetch(at(later, p.table_dtype, i * S::kLanes));
      acc[i] = S::fma(weight, load_lanes<S>(at(from, p.table_dtype, i * S::kLanes), p.table_dtype), acc[i]);
    }
  }
  for (int i = 0; i < M; ++i) S::store(out + d + i * S::kLanes, acc[i]);
}

template <class S>
void average(const AverageParams& p, const Threads& threads) {
  constexpr int64_t kRows = 8;  // a task
  std::vector<Buffer<float>> sums;
  for (int64_t i = 0; i < threads.count; ++i) sums.emplace_back(p.width);
  const int64_t whole = p.width / S::kLanes * S::kLanes;
  share(threads, ceil_div(p.n_rows, kRows), [&](int64_t worker, int64_t task) {
    float* sum = sums[size_t(worker)];
    for (int64_t r = task * kRows; r < least(p.n_rows, (task + 1) * kRows); ++r) {
      in_steps<S::kBroadcasts>(0, whole / S::kLanes,
                               [&](auto m, int64_t v) { average_columns<S, m()>(p, r, v * S::kLanes, sum); });
      for (int64_t d = whole; d < p.width; ++d) sum[d] = 0.0f;
      for (int64_t k = 0; k < p.k && whole < p.width; ++k) {
        float tail[S::kLanes];
        widen<S>(at(p.table, p.table_dtype, p.tokens[r * p.k + k] * p.table_stride + whole), p.table_dtype,
                 p.width - whole, tail);
        for (int64_t d = whole; d < p.width; ++d) sum[d] = S::fma(p.weights[r * p.k + k], tail[d - whole], sum[d]);
      }
      for (int64_t d = 0; d < p.width; ++d) narrow(sum[d], p.out_dtype, p.out, r * p.width + d);
    }
  });
}

}  // namespace
}  // namespace smoothie
