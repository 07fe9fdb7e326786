// All that one tier does.
#pragma once

#include "average.h"
#include "step_bwd.h"
#include "step_fwd.h"
#include "sweep.h"

namespace smoothie {
namespace {  // one copy per tier

// bias[j] = -||E_j||^2 / 2
template <class S>
void bias(const void* table, DType dtype, int64_t table_stride, int64_t n_vocab, int64_t width, float* out,
          const Threads& threads) {
  half_squares<S>(table, dtype, table_stride, n_vocab, width, threads,
                  [&](int64_t j, double half_square) { out[j] = float(-half_square); });
}

// out[i][j] = eps_ij, the noise field itself.
template <class S>
void gaussian(const int64_t* row_ids, int64_t row_offset, int64_t n_rows, int64_t n_cols, uint32_t key,
              uint32_t row_shift, float* out, const Threads& threads) {
  const RoundKeys<S> keys(key);
  share(threads, ceil_div(n_rows, S::kLanes), [&](int64_t, int64_t task) {
    const int64_t first = task * S::kLanes, count = least(S::kLanes, n_rows - first);
    alignas(64) int32_t rows[S::kLanes] = {};
    alignas(64) float eps[kTile * S::kLanes];
    for (int64_t i = 0; i < count; ++i) rows[i] = int32_t(row_id(row_ids, row_offset, first + i) + row_shift);
    for (int64_t j = 0; j < n_cols; j += kTile) {
      const int64_t cols = least(kTile, n_cols - j);
      normals<S>(uint32_t(j >> 1), (cols + 1) / 2, S::load_int(rows), keys, eps,
                 [&](int64_t k, typename S::F normal) { S::store(eps + k * S::kLanes, normal); });
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < cols; ++k) out[(first + i) * n_cols + j + k] = eps[k * S::kLanes + i];
    }
  });
}

}  // namespace
}  // namespace smoothie
