// The backward, in one pass as well: the weights P are made again, tile by tile, from what the forward kept of a row.
//
//   for rows (all, or as many as fit in kMemory):   x, g = grad_smoothed packed to xt, gt [panel][D][lanes]
//     for a tile of kTile tokens:
//       for a panel of rows:
//         score       p[v][lanes]  = col E[tile] xt + bias
//         score       ds[v][lanes] = values[tile] gt
//         weigh_grad  p = P, ds = col dS, dS = scale P (ds - delta + grad_lse)    delta = g . smoothed
//         gather      ot[D][lanes] += E[tile]^T ds
//       spread        out[v][D] = P^T g + (col dS)^T x                       over kGroupRows rows at a time
//       grad_table[tile] += out - E[tile] sum_rows dS
//     sum = sum_tokens P, missing = scale grad_lse - sum_tokens dS           of every row
//     grad_table[t] += P_t / sum ((x - E[t]) missing + g (1 - sum))          t: its noisy token
//     grad_x = ot + smoothed missing - x scale grad_lse                      without g: ot / sum - x scale grad_lse
//
// That is of distances. Other scores have no -E and no -x; they have col[t] E[t] in the place of smoothed, and what
// comes through the mean in grad_values, where the mean is one of values. grad_bias = sum_rows dS.
//
// `missing` and 1 - sum are rounding: of delta, and of log_sum in P. Where one token has all the weight of a row, its
// dS is nothing but the rounding of delta, which is subtracted here.
//
// Five products of N x V x D; four where x needs no gradient, three where the table needs none. Tokens are shared out
// among threads, so that nobody else adds to a tile's rows of grad_table; every thread has its own ot. Sums have a
// fixed order: the same call gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sweep.h"

namespace smoothie {
namespace {  // one copy per tier

// Bytes of packed rows and of their gradients in all threads: where rows are more, they go in several goes.
constexpr int64_t kMemory = 32 << 20;
// Rows of one sum in `spread`: out is loaded and stored once for so many. N = 512, V = 30,522, D = 384, two AVX-512
// threads, all gradients: 64 rows 221 ms, 128 rows 213, 256 rows 207; five products take MKL 202.
constexpr int64_t kGroupRows = 256;

template <class S, bool kNoise, bool kMean>
class StepBackward {
 public:
  static constexpr int kLanes = S::kLanes, kPanel = 2 * S::kLanes, kColumns = 2 * S::kLanes;

  static void run(const StepBwdParams& p, const Threads& threads) {
    const int64_t splits = least(threads.count, ceil_div(p.n_vocab, kTile));
    const int64_t fit = kMemory / (int64_t(sizeof(float)) * p.width * (4 + splits)) / kGroupRows * kGroupRows;
    const int64_t at_once = most(fit, kGroupRows);
    for (int64_t first = 0; first < p.n_rows; first += at_once)
      StepBackward(p, threads, first, least(at_once, p.n_rows - first), splits).run();
  }

 private:
  StepBackward(const StepBwdParams& params, const Threads& threads, int64_t first, int64_t n_rows, int64_t splits)
      : p_(params),
        threads_(threads),
        first_(first),
        n_rows_(n_rows),
        splits_(splits),
        panels_(ceil_div(n_rows, kPanel)),
        padded_width_(ceil_div(params.width, kColumns) * kColumns),
        noise_(params),
        layout_(params.n_rows, params.width),
        xt_(panels_ * kPanel * params.width),
        gt_(kMean ? panels_ * kPanel * params.width : 0),
        of_mean_(params.values ? params.grad_values : params.grad_table),
        of_tokens_(params.grad_table || params.grad_values || params.grad_bias),
        x_columns_(params.grad_table ? n_rows * padded_width_ : 0),
        g_columns_(kMean && of_mean_ ? n_rows * padded_width_ : 0),
        rows_(panels_ * 2) {}

  // What a thread makes of its tokens.
  struct Split {
    Buffer<float> ot;            // [panel][D][lanes]
    Buffer<RowGrads<S>> rows;    // [vector of rows]
    Buffer<float> p, ds;         // [panel of a group][kTile][lanes]
    Buffer<float> eps, columns;  // [kTile][lanes]
    double sums[kTile];          // of dS over all rows
    Buffer<float> out;           // [kTile][D, padded]
    Buffer<float> out_values;
    Buffer<float> tile, values;

    explicit Split(const StepBackward& b)
        : ot(b.p_.grad_x ? b.panels_ * kPanel * b.p_.width : 0),
          rows(b.panels_ * 2),
          p(kGroupRows * kTile),
          ds(kGroupRows * kTile),
          eps(kTile * kLanes),
          columns(kTile * kLanes),
          out(b.p_.grad_table ? kTile * b.padded_width_ : 0),
          out_values(b.p_.grad_values ? kTile * b.padded_width_ : 0),
          tile(tile_room(b.p_)),
          values(b.p_.values ? tile_room(b.p_) : 0) {}
  };

  void run() {
    std::vector<Split> splits;
    for (int64_t i = 0; i < splits_; ++i) splits.emplace_back(*this);
    std::vector<Buffer<float>> wide;  // two rows
    for (int64_t i = 0; i < threads_.count; ++i) wide.emplace_back(2 * p_.width);
    share(threads_, panels_, [&](int64_t worker, int64_t panel) { pack(panel, wide[size_t(worker)]); });
    share(threads_, splits_, [&](int64_t, int64_t split) { stream(split, splits[size_t(split)]); });
    if (of_tokens_) {
      std::vector<Sums> rows;
      for (int64_t i = 0; i < n_rows_; ++i) rows.push_back(sums_of(i, splits));
      share(threads_, threads_.count, [&](int64_t worker, int64_t part) { correct(part, rows, wide[size_t(worker)]); });
    }
    if (!p_.grad_x) return;
    share(threads_, panels_, [&](int64_t worker, int64_t panel) { finish(panel, splits, wide[size_t(worker)]); });
  }

  int64_t count_of(int64_t panel) const { return least(kPanel, n_rows_ - panel * kPanel); }
  int64_t lanes_of(int64_t panel) const { return layout_.vectors_of(count_of(panel)) * kLanes; }
  int64_t start_of(int64_t panel) const { return panel * kPanel * p_.width; }
  float grad_lse(int64_t r) const { return p_.grad_lse ? p_.grad_lse[r] : 0.0f; }

  // Row r of x, smoothed or grad_smoothed in fp32.
  const float* row_of(const void* matrix, DType dtype, int64_t r, float* room) const {
    widen<S>(at(matrix, dtype, r * p_.width), dtype, p_.width, room);
    return room;
  }

  void pack(int64_t panel, float* room) {
    const int64_t first = first_ + panel * kPanel, count = count_of(panel);
    pack_rows(p_.x, panel, room, xt_, p_.grad_table ? static_cast<float*>(x_columns_) : nullptr);
    if constexpr (kMean)
      pack_rows(p_.grad_smoothed, panel, room, gt_, of_mean_ ? static_cast<float*>(g_columns_) : nullptr);
    for (int64_t lane = 0; lane < lanes_of(panel); ++lane) {
      const int64_t i = layout_.row_of(lane);
      RowGrads<S>& rows = rows_[panel * 2 + lane / kLanes];
      if (i < count)
        rows.begin(lane % kLanes, constants_of(first + i), grad_lse(first + i) - delta(first + i, room));
      else
        rows.begin(lane % kLanes, RowConstants{}, 0.0f);
    }
  }

  void pack_rows(const void* matrix, int64_t panel, float* room, float* transposed, float* columns) const {
    const auto row = [&](int64_t i) { return row_of(matrix, p_.x_dtype, first_ + panel * kPanel + i, room); };
    layout_.pack(count_of(panel), p_.width, row, transposed + start_of(panel));
    if (!columns) return;
    for (int64_t i = 0; i < count_of(panel); ++i) {
      const float* values = row(i);
      for (int64_t d = 0; d < padded_width_; ++d)
        columns[column(d / kColumns, panel * kPanel + i) + d % kColumns] = d < p_.width ? values[d] : 0.0f;
    }
  }

  // Where kColumns columns of a row stand in x_columns_ and g_columns_, [D / kColumns][row][kColumns].
  int64_t column(int64_t group, int64_t row) const { return (group * n_rows_ + row) * kColumns; }

  RowConstants constants_of(int64_t r) const {
    RowConstants row{p_.scale[r], 0.0f, p_.best_score[r], p_.log_sum[r], 0};
    if (kNoise) {
      row.std = p_.std[r];
      row.row_id = int32_t(row_id(p_.row_ids, p_.row_offset, r));
    }
    return row;
  }

  float delta(int64_t r, float* room) const {
    double sum = 0.0;
    if constexpr (kMean) {
      const float* g = row_of(p_.grad_smoothed, p_.x_dtype, r, room);
      const float* smoothed = row_of(p_.smoothed, p_.smoothed_dtype, r, room + p_.width);
      for (int64_t d = 0; d < p_.width; ++d) sum = S::fma(double(g[d]), double(smoothed[d]), sum);
    }
    return float(sum);
  }

  void stream(int64_t split, Split& s) const {
    const int64_t tiles = ceil_div(p_.n_vocab, kTile);
    if (p_.grad_x) std::memset(s.ot, 0, size_t(panels_ * kPanel * p_.width) * sizeof(float));
    for (int64_t i = 0; i < panels_ * 2; ++i) s.rows[i] = rows_[i];
    for (int64_t t = split * tiles / splits_; t < (split + 1) * tiles / splits_; ++t) {
      const Tiles tiles = read_tiles<S>(p_, t, s.tile, s.values);
      const Tile& tile = tiles.scores;
      std::fill(s.sums, s.sums + kTile, 0.0);
      for (int64_t group = 0; group < panels_; group += kGroupRows / kPanel) {
        const int64_t last = least(panels_, group + kGroupRows / kPanel);
        std::memset(s.columns, 0, size_t(kTile * kLanes) * sizeof(float));
        for (int64_t panel = group; panel < last; ++panel)
          layout_.with(count_of(panel), [&](auto vectors, auto lanes) {
            one_panel<vectors(), lanes()>(panel, weights_of(panel - group), tiles, s);
          });
        if (!of_tokens_) continue;
        add_columns(s);
        spread(group, last, tile.count, s);
      }
      if (of_tokens_) finish_tile(tile, s);
    }
  }

  // Where a panel's weights stand. `spread` needs those of a whole group; else one place, in L1, does for all.
  int64_t weights_of(int64_t panel_in_group) const { return of_tokens_ ? panel_in_group * kTile * kPanel : 0; }

  template <int kVectors, int kGroup>
  void one_panel(int64_t panel, int64_t at, const Tiles& tiles, Split& s) const {
    const int64_t start = start_of(panel), stride = kVectors * kLanes;
    const Tile &tile = tiles.scores, &mean = tiles.mean;
    const Columns columns = Columns{p_.col, p_.bias}.of(tile.first);
    float *p = s.p + at, *ds = s.ds + at;
    score<S, kVectors, kGroup>(tile.rows, tile.stride, columns, xt_ + start, p_.width, tile.count, p);
    if constexpr (kMean) score<S, kVectors, kGroup>(mean.rows, mean.stride, {}, gt_ + start, p_.width, mean.count, ds);
    const auto weigh = [&](auto col, int n) {
      weigh_grad<S, kNoise, kMean, col()>(p + n * kLanes, ds + n * kLanes, columns.col, stride, tile.first, tile.count,
                                          noise_, s.eps, s.rows[panel * 2 + n], s.columns);
    };
    for (int n = 0; n < kVectors; ++n) columns.col ? weigh(std::true_type{}, n) : weigh(std::false_type{}, n);
    if (p_.grad_x) gather<S, kVectors, kGroup>(tile.rows, tile.stride, ds, p_.width, tile.count, s.ot + start);
  }

  // P^T g + dS^T x over the rows of some panels, in one go, or each for itself where the mean is one of other values.
  void spread(int64_t first_panel, int64_t last_panel, int64_t count, Split& s) const {
    const auto add = [&](const float* weights, int64_t stride, const float* rows, int64_t n_rows, auto& acc) {
      constexpr int M = std::extent_v<std::remove_reference_t<decltype(acc)>, 0>;
      multiply<S, M, 2, 1>(weights, stride, layout_.group(), rows, n_rows, acc);
    };
    const auto through_mean = [&](int64_t at, int64_t stride, int64_t from, int64_t n_rows, auto& acc) {
      if constexpr (kMean) add(s.p + at, stride, g_columns_ + from, n_rows, acc);
    };
    const auto through_scores = [&](int64_t at, int64_t stride, int64_t from, int64_t n_rows, auto& acc) {
      add(s.ds + at, stride, x_columns_ + from, n_rows, acc);
    };
    const auto through_both = [&](int64_t at, int64_t stride, int64_t from, int64_t n_rows, auto& acc) {
      through_mean(at, stride, from, n_rows, acc);
      through_scores(at, stride, from, n_rows, acc);
    };
    if (p_.values) {
      if (p_.grad_values) spread_to(s.out_values, first_panel, last_panel, count, through_mean);
      if (p_.grad_table) spread_to(s.out, first_panel, last_panel, count, through_scores);
    } else if (p_.grad_table) {
      spread_to(s.out, first_panel, last_panel, count, through_both);
    }
  }

  // out[v][d] = what `add` gives of every panel; on top of what out has for all but the first panels.
  template <class Add>
  void spread_to(float* all, int64_t first_panel, int64_t last_panel, int64_t count, const Add& add) const {
    for (int64_t c = 0; c < padded_width_ / kColumns; ++c)
      in_steps<S::kBroadcasts>(0, count, [&](auto m, int64_t v) {
        constexpr int M = decltype(m)::value;
        typename S::F acc[M][2];
        clear<S>(acc);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t lanes = lanes_of(panel), at = weights_of(panel - first_panel) + v * lanes;
          add(at, lanes, column(c, panel * kPanel), count_of(panel), acc);
        }
        for (int i = 0; i < M; ++i)
          for (int n = 0; n < 2; ++n) {
            float* out = all + (v + i) * padded_width_ + c * kColumns + n * kLanes;
            S::store(out, first_panel > 0 ? S::add(S::load(out), acc[i][n]) : acc[i][n]);
          }
      });
  }

  // In double: thousands of groups of equal rows would round a float one way.
  void add_columns(Split& s) const {
    for (int64_t v = 0; v < kTile; ++v)
      for (int64_t lane = 0; lane < kLanes; lane += layout_.group()) s.sums[v] += s.columns[v * kLanes + lane];
  }

  void finish_tile(const Tile& tile, Split& s) const {
    const auto add_to = [&](float& total, float value) { total = (first_ > 0 ? total : 0.0f) + value; };
    for (int64_t v = 0; v < tile.count; ++v) {
      const float sum = float(s.sums[v]), of_table = p_.bound ? 0.0f : -sum, *e = tile.rows + v * tile.stride;
      const int64_t row = (tile.first + v) * p_.width, out = v * padded_width_;
      for (int64_t d = 0; p_.grad_table && d < p_.width; ++d)
        add_to(p_.grad_table[row + d], S::fma(of_table, e[d], s.out[out + d]));
      for (int64_t d = 0; p_.grad_values && d < p_.width; ++d) add_to(p_.grad_values[row + d], s.out_values[out + d]);
      if (p_.grad_bias) add_to(p_.grad_bias[tile.first + v], sum);
    }
  }

  // What the dS of a row lack, the sum of its P, and the share of its noisy token in that.
  struct Sums {
    float missing, p, share;
  };

  Sums sums_of(int64_t i, const std::vector<Split>& splits) const {
    const int64_t lane = layout_.lane_of(i % kPanel), r = first_ + i;
    double ds = 0.0, p = 0.0;
    float largest = 0.0f;
    for (const Split& split : splits) {
      const RowGrads<S>& rows = split.rows[i / kPanel * 2 + lane / kLanes];
      ds += double(rows.sum[lane % kLanes]) + rows.sum_low[lane % kLanes];
      p += double(rows.sum_p[lane % kLanes]) + rows.sum_p_low[lane % kLanes];
      largest = std::fmax(largest, rows.largest[lane % kLanes]);
    }
    return {float(p_.scale[r] * grad_lse(r) - ds), float(p), p == 0.0 ? 1.0f : float(largest / p)};
  }

  // Some columns of what is missing, for the noisy tokens of all rows, which may share one.
  void correct(int64_t part, const std::vector<Sums>& rows, float* room) const {
    const int64_t d = part * p_.width / threads_.count, count = (part + 1) * p_.width / threads_.count - d;
    const auto add = [&](const void* matrix, DType dtype, int64_t from, float weight, float* grad) {
      widen<S>(at(matrix, dtype, from + d), dtype, count, room);
      for (int64_t k = 0; k < count; ++k) grad[k] = S::fma(weight, room[k], grad[k]);
    };
    for (int64_t i = 0; i < n_rows_; ++i) {
      const int64_t r = first_ + i, token = noisy_token(r);
      const auto [missing, sum, share] = rows[size_t(i)];
      const float of_s = share * missing;
      const int64_t row = token * p_.width + d;
      if (p_.grad_bias && part == 0) p_.grad_bias[token] += of_s;
      if (p_.grad_table) add(p_.x, p_.x_dtype, r * p_.width, col(token) * of_s, p_.grad_table + row);
      if (p_.grad_table && !p_.bound)
        add(p_.table, p_.table_dtype, token * p_.table_stride, -of_s, p_.grad_table + row);
      if (kMean && of_mean_) add(p_.grad_smoothed, p_.x_dtype, r * p_.width, share * (1.0f - sum), of_mean_ + row);
    }
  }

  void finish(int64_t panel, const std::vector<Split>& splits, float* room) const {
    const int64_t lanes = lanes_of(panel);
    for (int64_t i = 0; i < count_of(panel); ++i) {
      const int64_t r = first_ + panel * kPanel + i;
      const auto [missing, sum, share] = sums_of(panel * kPanel + i, splits);
      const float of_lse = p_.bound ? 0.0f : p_.scale[r] * grad_lse(r);
      const float of_tokens = kMean || sum == 0.0f ? 1.0f : 1.0f / sum;
      const float* x = row_of(p_.x, p_.x_dtype, r, room);
      const float* instead = kMean ? instead_of_missing(r, room + p_.width) : nullptr;
      const float lacking = p_.bound ? missing * col(noisy_token(r)) : missing;
      for (int64_t d = 0; d < p_.width; ++d) {
        const int64_t at = start_of(panel) + layout_.element(i, d, lanes);
        float tokens = 0.0f;
        for (const Split& split : splits) tokens += split.ot[at];
        if constexpr (kMean) tokens = S::fma(lacking, instead[d], tokens);
        narrow(S::fma(of_tokens, tokens, -(of_lse * x[d])), p_.grad_x_dtype, p_.grad_x, r * p_.width + d);
      }
    }
  }

  int64_t noisy_token(int64_t r) const { return most(0, least(p_.noisy_tokens[r], p_.n_vocab - 1)); }

  float col(int64_t token) const { return p_.col ? p_.col[token] : 1.0f; }

  // What the dS that a row lacks would have been multiplied by: of distances, the mean; else the noisy token's E.
  const float* instead_of_missing(int64_t r, float* room) const {
    if (!p_.bound) return row_of(p_.smoothed, p_.smoothed_dtype, r, room);
    widen<S>(at(p_.table, p_.table_dtype, noisy_token(r) * p_.table_stride), p_.table_dtype, p_.width, room);
    return room;
  }

  const StepBwdParams& p_;
  const Threads& threads_;
  int64_t first_, n_rows_, splits_, panels_, padded_width_;
  Noise<S> noise_;
  Layout<S> layout_;
  Buffer<float> xt_, gt_;                // [panel][D][lanes]
  float* of_mean_;                       // the gradient that the mean's goes to, nullptr where it is not needed
  bool of_tokens_;                       // whether any is that has rows for tokens
  Buffer<float> x_columns_, g_columns_;  // [D / kColumns][row][kColumns]
  Buffer<RowGrads<S>> rows_;             // [vector of rows]
};

template <class S>
void step_bwd(const StepBwdParams& p, const Threads& threads) {
  if (p.std)
    p.grad_smoothed ? StepBackward<S, true, true>::run(p, threads) : StepBackward<S, true, false>::run(p, threads);
  else
    p.grad_smoothed ? StepBackward<S, false, true>::run(p, threads) : StepBackward<S, false, false>::run(p, threads);
}

}  // namespace
}  // namespace smoothie
