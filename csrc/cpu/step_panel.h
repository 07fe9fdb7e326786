// One panel of rows against one tile of tokens: score, weigh (backward: weigh_grad), gather. Rows lie along the vector
// lanes, so that all that happens to a row - noise, exp, sum, argmax - is vertical; both products read the table as it
// stands, as broadcasts.
//
// Why not packed: the products below reach 155-171 of 175 GFLOP/s a core (AVX-512) and 80-86 of 94 (AVX2) at D = 384 on
// a table in its natural layout; MKL on its own packed copies reaches 139-151 and 76-78 there.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "step_params.h"
#include "vector_math.h"

namespace smoothie {
namespace {  // one copy per tier: a template shared between translation units could be linked from the wrong one

constexpr int kTile = 128;       // tokens; a panel's weights (16 KiB at 32 lanes) stay in L1
constexpr int64_t kDepth = 128;  // columns in one fp32 sum: in one chain of 384 the scores round 3 times as much

template <class S, int M, int kVectors>
inline void clear(typename S::F (&acc)[M][kVectors]) {
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) acc[i][n] = S::set(0.0f);
}

// acc[i][n] += sum_k a[i a_i + k a_k] b[k][n]: M broadcasts times kVectors vectors of lanes, k in order.
//
// A row has kGroup neighbouring lanes, which share out its columns. With one row all lanes of a vector are its own and
// the broadcasts are plain loads; with enough rows to fill the lanes a group is one lane. Layouts: x and the result are
// [D / kGroup][row][kGroup], weights [token][row][kGroup], the same in all lanes of a group.
template <class S, int M, int kVectors, int kGroup>
inline void multiply(const float* a, int64_t a_i, int64_t a_k, const float* b, int64_t count,
                     typename S::F (&acc)[M][kVectors]) {
#pragma GCC unroll 8  // 6 % of a step with AVX-512, 1 % with AVX2
  for (int64_t k = 0; k < count; ++k, a += a_k, b += kVectors * S::kLanes) {
    typename S::F lanes[kVectors];
    for (int n = 0; n < kVectors; ++n) lanes[n] = S::load(b + n * S::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto values = S::template broadcast<kGroup>(a + i * a_i);
      for (int n = 0; n < kVectors; ++n) acc[i][n] = S::fma(values, lanes[n], acc[i][n]);
    }
  }
}

// What products of some tokens are multiplied by, and what is added: nullptr for ones, for zeros.
struct Columns {
  const float *col, *bias;

  Columns of(int64_t token) const { return {col ? col + token : nullptr, bias ? bias + token : nullptr}; }
};

// M tokens of `score`, `depth` columns of them; on top of what p has where `more`.
template <class S, int M, int kVectors, int kGroup, bool kCol>
inline void score_rows(const float* tile, int64_t tile_stride, const float* col, const float* bias, const float* xt,
                       int64_t depth, bool more, float* p) {
  typename S::F acc[M][kVectors];
  clear<S>(acc);
  multiply<S, M, kVectors, kGroup>(tile, tile_stride, kGroup, xt, depth / kGroup, acc);
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) {
      float* out = p + (i * kVectors + n) * S::kLanes;
      auto sum = S::template sum_groups<kGroup>(acc[i][n]);
      if (more) sum = S::add(S::load(out), sum);
      if (kCol && bias) sum = S::mul(sum, S::set(col[i]));
      S::store(out, bias ? S::add(sum, S::set(bias[i])) : sum);
    }
}

// M columns (groups of columns) of `gather`.
template <class S, int M, int kVectors, int kGroup>
inline void gather_columns(const float* tile, int64_t tile_stride, const float* p, int64_t count, float* ot) {
  typename S::F acc[M][kVectors];
  clear<S>(acc);
  multiply<S, M, kVectors, kGroup>(tile, kGroup, tile_stride, p, count, acc);
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) {
      float* out = ot + (i * kVectors + n) * S::kLanes;
      S::store(out, S::add(S::load(out), acc[i][n]));
    }
}

// Calls body<M>(first) over [0, count) in steps of kBroadcasts, and for what is left in steps of 4, 2, 1.
template <int M, class Body>
inline void in_steps(int64_t first, int64_t count, const Body& body) {
  for (; first + M <= count; first += M) body(std::integral_constant<int, M>{}, first);
  if constexpr (M > 1) in_steps<(M > 4 ? 4 : M / 2)>(first, count, body);
}

// p[v][lanes] = col[v] (E[v] . x) + bias[v] for `count` tokens of a tile.
template <class S, int kVectors, int kGroup, bool kCol>
void score_tile(const float* tile, int64_t tile_stride, Columns columns, const float* xt, int64_t width, int64_t count,
                float* p) {
  for (int64_t first = 0; first < width; first += kDepth * kGroup) {
    const int64_t depth = width - first < kDepth * kGroup ? width - first : kDepth * kGroup;
    const bool last = columns.bias && first + depth == width;  // the bias joins last: it is large
    in_steps<S::kBroadcasts>(0, count, [&](auto m, int64_t v) {
      score_rows<S, m(), kVectors, kGroup, kCol>(tile + v * tile_stride + first, tile_stride,
                                                 kCol ? columns.col + v : nullptr, last ? columns.bias + v : nullptr,
                                                 xt + first / kGroup * kVectors * S::kLanes, depth, first > 0,
                                                 p + v * kVectors * S::kLanes);
    });
  }
}

template <class S, int kVectors, int kGroup>
void score(const float* tile, int64_t tile_stride, Columns columns, const float* xt, int64_t width, int64_t count,
           float* p) {
  if (columns.col)
    score_tile<S, kVectors, kGroup, true>(tile, tile_stride, columns, xt, width, count, p);
  else
    score_tile<S, kVectors, kGroup, false>(tile, tile_stride, columns, xt, width, count, p);
}

// ot[d][lanes] += sum_v E[v][d] p[v][lanes]. From zero in every tile: two short sums round less than one of length V.
template <class S, int kVectors, int kGroup>
void gather(const float* tile, int64_t tile_stride, const float* p, int64_t width, int64_t count, float* ot) {
  in_steps<S::kBroadcasts>(0, width / kGroup, [&](auto m, int64_t d) {
    gather_columns<S, m(), kVectors, kGroup>(tile + d * kGroup, tile_stride, p, count, ot + d * kVectors * S::kLanes);
  });
}

// The noise of a call: the weighted sum of its fields.
template <class S>
class Noise {
 public:
  explicit Noise(const StepInputs& p) {
    for (int64_t f = 0; f < p.n_fields; ++f)
      fields_.push_back({RoundKeys<S>(p.fields[f].key), int32_t(p.fields[f].row_shift), p.fields[f].weight});
  }

  // eps [column][lanes] of `count` columns of a tile, for one vector of rows by their ids. first_column is even.
  void make(int64_t first_column, int64_t count, typename S::I row_ids, float* eps) const {
    using F = typename S::F;
    const auto first_pair = uint32_t(first_column) >> 1;
    const int64_t pairs = (count + 1) / 2;
    const auto of_field = [&](const Field& field, float* words, const auto& put) {
      normals<S>(first_pair, pairs, S::add_int(row_ids, S::set_int(field.row_shift)), field.keys, words, put);
    };
    const auto at = [&](int64_t column) { return eps + column * S::kLanes; };
    if (fields_.size() == 1 && fields_[0].weight == 1.0f)
      return of_field(fields_[0], eps, [&](int64_t column, F normal) { S::store(at(column), normal); });
    const F first_weight = S::set(fields_[0].weight);
    of_field(fields_[0], eps, [&](int64_t column, F normal) { S::store(at(column), S::mul(first_weight, normal)); });
    alignas(64) float words[kTile * S::kLanes];
    for (size_t f = 1; f < fields_.size(); ++f) {
      const F weight = S::set(fields_[f].weight);
      of_field(fields_[f], words,
               [&](int64_t column, F normal) { S::store(at(column), S::fma(weight, normal, S::load(at(column)))); });
    }
  }

 private:
  struct Field {
    RoundKeys<S> keys;
    int32_t row_shift;
    float weight;
  };
  std::vector<Field> fields_;
};

// What a row brings: weight = exp(scale (score - ref_score) + std eps - ref_logit).
struct RowConstants {
  float scale = 0.0f, std = 0.0f, ref_score = 0.0f, ref_logit = 0.0f;
  int32_t row_id = 0;  // of the noise
};

// The constants of a vector of rows and its running results, by lane.
template <class S>
struct RowState {
  static constexpr int kLanes = S::kLanes;
  float scale[kLanes], std[kLanes], ref_score[kLanes], ref_logit[kLanes];
  int32_t row_id[kLanes];
  float best_score[kLanes], best_logit[kLanes];
  float sum[kLanes], sum_low[kLanes];  // of the weights, in two parts
  int32_t token[kLanes], noisy_token[kLanes];

  void begin(int64_t lane, const RowConstants& row) {
    scale[lane] = row.scale, std[lane] = row.std, row_id[lane] = row.row_id;
    ref_score[lane] = row.ref_score, ref_logit[lane] = row.ref_logit;
    best_score[lane] = best_logit[lane] = -std::numeric_limits<float>::infinity();
    sum[lane] = sum_low[lane] = 0.0f;
    token[lane] = noisy_token[lane] = 0;
  }
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

// Adds to a sum in two parts. Beside one near token the sums of thousands of tiles with far ones would each round to
// nothing: `low` keeps what is lost.
template <class S>
void add_to(float* sum, float* low, typename S::F value) {
  const auto before = S::load(sum), after = S::add(before, value), added = S::sub(after, before);
  const auto lost = S::add(S::sub(before, S::sub(after, added)), S::sub(value, added));
  S::store(sum, after);
  S::store(low, S::add(S::load(low), lost));
}

// The scores p[v][lanes] of one vector of rows become weights; statistics go to `rows`. first_column is even, eps is
// room for kTile columns of noise; where kTop it ends up with the logits, and their largest is left to whoever keeps
// more of them.
template <class S, bool kLogits, bool kNoise, bool kTop>
void weigh(float* p, int64_t stride, int64_t first_column, int64_t count, const Noise<S>& noise, float* eps,
           RowState<S>& rows) {
  using F = typename S::F;
  const F scale = S::load(rows.scale), std = S::load(rows.std);
  const F ref_score = S::load(rows.ref_score), minus_ref = S::sub(S::set(0.0f), S::load(rows.ref_logit));
  Best<S> nearest{S::load(rows.best_score), S::load_int(rows.token)};
  Best<S> noisy{S::load(rows.best_logit), S::load_int(rows.noisy_token)};
  F sum = S::set(0.0f);
  if constexpr (kNoise) noise.make(first_column, count, S::load_int(rows.row_id), eps);
  for (int64_t v = 0; v < count; ++v, p += stride, eps += S::kLanes) {
    const auto column = S::set_int(int32_t(first_column + v));
    const F score = S::load(p);
    nearest.take(score, column);
    if constexpr (kLogits) {
      F logit = S::fma(scale, S::sub(score, ref_score), minus_ref);
      if constexpr (kNoise) logit = S::fma(std, S::load(eps), logit);
      if constexpr (kTop)
        S::store(eps, logit);
      else
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
    add_to<S>(rows.sum, rows.sum_low, sum);
  }
}

// What a row brings to its backward: P = exp(scale (score - ref_score) + std eps - ref_logit), and
// dS = scale P (dP + shift), where dP_j = grad . E_j and shift = grad_lse - grad . smoothed.
template <class S>
struct RowGrads {
  static constexpr int kLanes = S::kLanes;
  float scale[kLanes], std[kLanes], ref_score[kLanes], ref_logit[kLanes], shift[kLanes];
  int32_t row_id[kLanes];
  float sum[kLanes], sum_low[kLanes], sum_p[kLanes], sum_p_low[kLanes];  // of dS and of P, in two parts
  float largest[kLanes];                                                 // P

  void begin(int64_t lane, const RowConstants& row, float row_shift) {
    scale[lane] = row.scale, std[lane] = row.std, row_id[lane] = row.row_id;
    ref_score[lane] = row.ref_score, ref_logit[lane] = row.ref_logit;
    shift[lane] = row_shift;
    sum[lane] = sum_low[lane] = sum_p[lane] = sum_p_low[lane] = largest[lane] = 0.0f;
  }
};

// The scores p[v][lanes] of one vector of rows become P, and ds, which holds dP where kMean, becomes dS times col;
// columns[v][lanes] takes the sum of dS over vectors of rows. No weight is above 1, however coarsely ref_logit is
// rounded.
template <class S, bool kNoise, bool kMean, bool kCol>
void weigh_grad(float* p, float* ds, const float* col, int64_t stride, int64_t first_column, int64_t count,
                const Noise<S>& noise, float* eps, RowGrads<S>& rows, float* columns) {
  using F = typename S::F;
  const F scale = S::load(rows.scale), std = S::load(rows.std), shift = S::load(rows.shift);
  const F ref_score = S::load(rows.ref_score), minus_ref = S::sub(S::set(0.0f), S::load(rows.ref_logit));
  F sum = S::set(0.0f), sum_p = S::set(0.0f), largest = S::load(rows.largest);
  if constexpr (kNoise) noise.make(first_column, count, S::load_int(rows.row_id), eps);
  for (int64_t v = 0; v < count; ++v, p += stride, ds += stride, eps += S::kLanes, columns += S::kLanes) {
    F logit = S::fma(scale, S::sub(S::load(p), ref_score), minus_ref);
    if constexpr (kNoise) logit = S::fma(std, S::load(eps), logit);
    const F weight = exp<S>(logit, 0.0f);
    sum_p = S::add(sum_p, weight);
    largest = S::greater_or_second(weight, largest);
    F grad = shift;
    if constexpr (kMean) grad = S::add(S::load(ds), shift);
    grad = S::mul(S::mul(scale, weight), grad);
    sum = S::add(sum, grad);
    S::store(p, weight);
    S::store(ds, kCol ? S::mul(grad, S::set(col[v])) : grad);
    S::store(columns, S::add(S::load(columns), grad));
  }
  add_to<S>(rows.sum, rows.sum_low, sum);
  add_to<S>(rows.sum_p, rows.sum_p_low, sum_p);
  S::store(rows.largest, largest);
}

}  // namespace
}  // namespace smoothie
