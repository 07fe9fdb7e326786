// The streaming step.
//
//   for a block of rows:                        x packed to xt [panel][D][lanes]
//     for a tile of kTile tokens:               E[tile] straight from the table, or widened to fp32 once
//       for a panel of rows:                    (step_panel.h)
//         score   p[v][lanes]  = E[tile] xt + bias             product over D
//         weigh   p            = exp(scale D + std eps - ref)     noise, argmax twice, row sum: all in cache
//         gather  ot[D][lanes] += E[tile]^T p                  product over the tile
//     finish: smoothed = ot / sum, lse = ref + log(sum), of the nearest token's distance
//
// Logits are at most scale bound + 6.77 std sum_f |weight_f|, so no running maximum: `ref` is fixed
// beforehand and partial sums of any tiles add. Rows whose largest logit turns out far from it are done again: exact
// for every input, another pass only for the rows that need one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "sweep.h"
#include "top.h"

namespace smoothie {
namespace {  // one copy per tier

constexpr int kBlockPanels = 8;      // panels that share a tile: xt and ot of 256 rows x 384 columns take 0.8 MB of L2
constexpr float kMaxNormal = 6.77f;  // of one field
// Where a row's maximum may lie over its reference: fp32 holds all that counts.
constexpr float kLargest = 20.0f, kSmallest = -50.0f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class S>
inline double squared_distance(const float* a, const float* b, int64_t count) {
  double sums[4] = {};  // one alone would be a chain
  for (int64_t d = 0; d < count; ++d) {
    const double apart = double(a[d]) - b[d];
    sums[d % 4] = S::fma(apart, apart, sums[d % 4]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// What is taken off a row's scores and logits so that fp32 holds its weights:
// exp(scale (score_j - score) + std eps_j - logit).
struct Reference {
  // By pass: the bound, of distances the score at distance zero; the nearest token's, for rows far from all tokens; the
  // largest logit as well, for noise so loud that its largest value is far below what it could be. Nothing finite needs
  // a fourth.
  static constexpr int kPasses = 3;

  float score, logit;
  bool done;
};

// How the work is cut: tasks = blocks of rows x splits of the vocabulary.
struct Plan {
  int64_t panels, tiles, blocks, splits;
};

// Rows are shared out. Where that leaves threads idle for more than 8 % of the time, the vocabulary is split as well,
// in as few parts as will do: each part has sums of its own, so splits take memory (and only few rows need them).
inline Plan make_plan(int64_t panels, int64_t tiles, int64_t threads) {
  int64_t splits = 1;
  while (splits < least(threads, tiles) && ceil_div(panels * splits, threads) * threads * 100 > panels * splits * 108)
    ++splits;
  int64_t blocks = panels;  // of one panel each: the finest sharing
  if (splits == threads) blocks = ceil_div(panels, kBlockPanels);
  if (splits == 1) blocks = least(panels, ceil_div(ceil_div(panels, kBlockPanels), threads) * threads);
  return {panels, tiles, blocks, splits};
}

// The results of some rows over some of the vocabulary: what a task makes, and what is merged.
template <class S>
struct Partial {
  Buffer<float> ot;           // [panel][D][lanes of the panel]
  Buffer<RowState<S>> state;  // [vector of rows]
  Buffer<TopRows<S>> top;     // [vector of rows]
  Buffer<TopKey> keys;        // [vector of rows][lane][room]

  Partial(int64_t vectors, int64_t width, int64_t k, int64_t room)
      : ot(vectors * S::kLanes * width),
        state(vectors),
        top(k ? vectors : 0),
        keys(k ? vectors * S::kLanes * room : 0) {
    for (int64_t i = 0; i < (k ? vectors : 0); ++i)
      top[i].k = k, top[i].room = room, top[i].keys = keys + i * S::kLanes * room;
  }
};

template <class S>
struct Scratch {
  Buffer<float> xt;    // [panel][D][lanes of the panel]
  Buffer<float> p;     // [kTile][lanes of the panel]
  Buffer<float> eps;   // [kTile][kLanes]
  Buffer<float> row;   // [D]
  Buffer<float> row2;  // [D]
  Buffer<float> tile;  // [kTile][D, padded], only where the table is not fp32
  Buffer<float> values;
  Buffer<TopKey> keys;  // of a row, all splits

  Scratch(int64_t vectors, int64_t width, int64_t tile_size, int64_t values_size, int64_t key_count)
      : xt(vectors * S::kLanes * width),
        p(kTile * 2 * S::kLanes),
        eps(kTile * S::kLanes),
        row(width),
        row2(width),
        tile(tile_size),
        values(values_size),
        keys(key_count) {}
};

template <class S, bool kLogits, bool kNoise, bool kTop>
class Step {
 public:
  static constexpr int kLanes = S::kLanes, kPanel = 2 * S::kLanes;

  // rows: which rows of the call, nullptr for all. references: [N], nullptr where there are no logits.
  Step(const StepParams& params, const Threads& threads, const int64_t* rows, int64_t n_rows, Reference* references,
       int pass)
      : p_(params),
        threads_(threads),
        rows_(rows),
        n_rows_(n_rows),
        references_(references),
        pass_(pass),
        noise_(params),
        plan_(make_plan(ceil_div(n_rows, kPanel), ceil_div(params.n_vocab, kTile), threads.count)),
        layout_(params.n_rows, params.width) {}

  void run() {
    const int64_t tasks = plan_.blocks * plan_.splits, workers = least(threads_.count, tasks);
    const int64_t vectors = 2 * ceil_div(plan_.panels, plan_.blocks);
    std::vector<Scratch<S>> scratch;
    std::vector<Partial<S>> partials;
    for (int64_t i = 0; i < workers; ++i)
      scratch.emplace_back(vectors, p_.width, tile_room(p_), p_.values ? tile_room(p_) : 0,
                           top_room(p_.topk, p_.n_vocab) * plan_.splits);
    for (int64_t i = 0; i < (plan_.splits == 1 ? workers : tasks); ++i)
      partials.emplace_back(vectors, smoothed_width(), p_.topk, top_room(p_.topk, p_.n_vocab));

    share(threads_, tasks, [&](int64_t worker, int64_t task) {
      const int64_t block = task / plan_.splits, split = task % plan_.splits;
      Partial<S>& partial = partials[size_t(plan_.splits == 1 ? worker : task)];
      pack(block, scratch[size_t(worker)], partial);
      stream(block, split, scratch[size_t(worker)], partial);
      if (plan_.splits == 1) finish(block, &partial, scratch[size_t(worker)]);
    });
    if (plan_.splits == 1) return;
    share(threads_, plan_.blocks, [&](int64_t worker, int64_t block) {
      finish(block, &partials[size_t(block * plan_.splits)], scratch[size_t(worker)]);
    });
  }

 private:
  int64_t first_panel(int64_t block) const { return block * plan_.panels / plan_.blocks; }
  int64_t smoothed_width() const { return p_.smoothed ? p_.width : 0; }
  int64_t row(int64_t i) const { return rows_ ? rows_[i] : i; }
  // Calls body(panel in block, its first row, how many rows) for the panels of a block.
  template <class Body>
  void for_panels(int64_t block, const Body& body) const {
    const int64_t first = first_panel(block), last = first_panel(block + 1);
    for (int64_t panel = first; panel < last; ++panel)
      body(panel - first, panel * kPanel, least(kPanel, n_rows_ - panel * kPanel));
  }

  void pack(int64_t block, Scratch<S>& s, Partial<S>& partial) const {
    for_panels(block, [&](int64_t panel, int64_t first, int64_t count) {
      const int64_t lanes = layout_.vectors_of(count) * kLanes, start = panel * p_.width * kPanel;
      if (p_.smoothed) std::memset(partial.ot + start, 0, size_t(p_.width * lanes) * sizeof(float));
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t i = layout_.row_of(lane);  // lanes behind the last row hold a row of zeros
        const RowConstants constants = kLogits && i < count ? constants_of(row(first + i)) : RowConstants{};
        partial.state[panel * 2 + lane / kLanes].begin(lane % kLanes, constants);
        if (kTop) partial.top[panel * 2 + lane / kLanes].begin(lane % kLanes, i < count && layout_.lane_of(i) == lane);
      }
      const auto row_in_fp32 = [&](int64_t i) -> const float* {
        widen<S>(at(p_.x, p_.x_dtype, row(first + i) * p_.width), p_.x_dtype, p_.width, s.row);
        return s.row;
      };
      layout_.pack(count, p_.width, row_in_fp32, s.xt + start);
    });
  }

  RowConstants constants_of(int64_t r) const {
    const Reference& ref = references_[r];
    RowConstants row{p_.scale[r], 0.0f, ref.score, ref.logit, 0};
    if (kNoise) {
      row.std = p_.std[r];
      row.row_id = int32_t(row_id(p_.row_ids, p_.row_offset, r));
    }
    return row;
  }

  void stream(int64_t block, int64_t split, Scratch<S>& s, Partial<S>& partial) const {
    for (int64_t t = split * plan_.tiles / plan_.splits; t < (split + 1) * plan_.tiles / plan_.splits; ++t) {
      const Tiles tiles = read_tiles<S>(p_, t, s.tile, s.values);
      for_panels(block, [&](int64_t panel, int64_t, int64_t n_rows) {
        layout_.with(n_rows,
                     [&](auto vectors, auto group) { one_panel<vectors(), group()>(panel, tiles, s, partial); });
      });
    }
  }

  template <int kVectors, int kGroup>
  void one_panel(int64_t panel, const Tiles& tiles, Scratch<S>& s, Partial<S>& partial) const {
    const int64_t start = panel * p_.width * kPanel;
    const Tile &tile = tiles.scores, &mean = tiles.mean;
    const Columns columns = Columns{p_.col, p_.bias}.of(tile.first);
    score<S, kVectors, kGroup>(tile.rows, tile.stride, columns, s.xt + start, p_.width, tile.count, s.p);
    for (int n = 0; n < kVectors; ++n) {
      weigh<S, kLogits, kNoise, kTop>(s.p + n * kLanes, kVectors * kLanes, tile.first, tile.count, noise_, s.eps,
                                      partial.state[panel * 2 + n]);
      if constexpr (kTop) keep_largest<S>(s.eps, tile.first, tile.count, partial.top[panel * 2 + n]);
    }
    if (p_.smoothed) gather<S, kVectors, kGroup>(mean.rows, mean.stride, s.p, p_.width, mean.count, partial.ot + start);
  }

  // Merges the splits of a block in their order (the same sums in every run) and writes its rows.
  void finish(int64_t block, Partial<S>* parts, Scratch<S>& s) const {
    for_panels(block, [&](int64_t panel, int64_t first, int64_t count) {
      const int lanes = layout_.vectors_of(count) * kLanes;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t vector = panel * 2 + layout_.lane_of(i) / kLanes, lane = layout_.lane_of(i) % kLanes;
        const int64_t r = row(first + i);
        RowState<S>& total = parts[0].state[vector];
        if constexpr (kTop)
          for (int64_t k = 0; k < plan_.splits; ++k) parts[k].top[vector].best(lane, parts[k].state[vector]);
        double sum = double(total.sum[lane]) + total.sum_low[lane];
        for (int64_t k = 1; k < plan_.splits; ++k) {
          const RowState<S>& part = parts[k].state[vector];
          sum += double(part.sum[lane]) + part.sum_low[lane];
          if (part.best_score[lane] > total.best_score[lane])
            total.best_score[lane] = part.best_score[lane], total.token[lane] = part.token[lane];
          if (part.best_logit[lane] > total.best_logit[lane])
            total.best_logit[lane] = part.best_logit[lane], total.noisy_token[lane] = part.noisy_token[lane];
        }
        p_.tokens[r] = total.token[lane];
        if (kLogits) {
          finish_logits(parts, panel * p_.width * kPanel, i, lanes, r, total, lane, sum, s);
          if (kTop && references_[r].done) finish_top(parts, vector, lane, r, s.keys);
        } else
          p_.distance[r] = float(distance(r, total.token[lane], s));
      }
    });
  }

  void finish_logits(Partial<S>* parts, int64_t start, int64_t i, int lanes, int64_t r, const RowState<S>& total,
                     int64_t lane, double sum, Scratch<S>& s) const {
    Reference& ref = references_[r];
    const float best = total.best_logit[lane];
    const bool fits = best >= kSmallest && best <= kLargest;
    ref.done = fits || !std::isfinite(best) || pass_ + 1 == Reference::kPasses;
    if (!ref.done) {
      if (pass_ == 0)
        ref.score = total.best_score[lane];
      else
        ref.logit += best;
      return;
    }
    p_.noisy_tokens[r] = total.noisy_token[lane];
    const double scale = p_.scale[r], nearest = total.best_score[lane];
    const double log_sum = S::fma(scale, double(ref.score) - nearest, ref.logit + std::log(sum));
    const double score = p_.bound ? nearest : score_of(r, total, lane, sum, log_sum, s);
    p_.lse[r] = fits ? float(S::fma(scale, score, log_sum)) : kNaN;
    p_.best_score[r] = float(nearest);
    p_.log_sum[r] = fits ? float(log_sum) : kNaN;
    const float inverse = fits ? float(1.0 / sum) : kNaN;
    for (int64_t d = 0; d < smoothed_width(); ++d) {
      const int64_t at = start + layout_.element(i, d, lanes);
      float value = parts[0].ot[at];
      for (int64_t k = 1; k < plan_.splits; ++k) value += parts[k].ot[at];
      narrow(value * inverse, p_.smoothed_dtype, p_.smoothed, r * p_.width + d);
    }
  }

  void finish_top(Partial<S>* parts, int64_t vector, int64_t lane, int64_t r, TopKey* keys) const {
    int64_t count = 0;
    for (int64_t k = 0; k < plan_.splits; ++k) {
      const TopRows<S>& part = parts[k].top[vector];
      std::memcpy(keys + count, part.keys + lane * part.room, size_t(part.count[lane]) * sizeof(TopKey));
      count += part.count[lane];
    }
    const bool known = !std::isnan(p_.lse[r]) && count >= p_.topk;
    if (known) {
      keep_best(keys, p_.topk, &count);
      std::sort(keys, keys + count, std::greater<TopKey>());
    }
    const Reference& ref = references_[r];
    const double moved = S::fma(double(p_.scale[r]), double(ref.score) - p_.best_score[r], double(ref.logit));
    for (int64_t k = 0; k < p_.topk; ++k) {
      p_.top_logits[r * p_.topk + k] = known ? float(logit_of(keys[k]) + moved) : kNaN;
      p_.top_tokens[r * p_.topk + k] = known ? column_of(keys[k]) : k;
    }
  }

  // The nearest token's score less ||x||^2 / 2: as it came out, because lse averages the errors of all scores, but for
  // the token's share of the weight (without noise, where that is not known), because its distance has no error.
  double score_of(int64_t r, const RowState<S>& total, int64_t lane, double sum, double log_sum, Scratch<S>& s) const {
    const int64_t token = total.token[lane];
    const bool known = token == total.noisy_token[lane];
    const double share = known ? std::exp(double(total.best_logit[lane])) / sum : std::exp(-std::fmax(log_sum, 0.0));
    const double near = -distance(r, token, s) / 2;
    const double came_out = total.best_score[lane] - sum_of_squares<S>(s.row, p_.width) / 2;
    return S::fma(std::fmin(share, 1.0), near - came_out, came_out);
  }

  // The winner's distance directly: the scores' difference of large numbers would cancel.
  double distance(int64_t r, int64_t token, Scratch<S>& s) const {
    widen<S>(at(p_.x, p_.x_dtype, r * p_.width), p_.x_dtype, p_.width, s.row);
    widen<S>(at(p_.table, p_.table_dtype, token * p_.table_stride), p_.table_dtype, p_.width, s.row2);
    return squared_distance<S>(s.row, s.row2, p_.width);
  }

  const StepParams& p_;
  const Threads& threads_;
  const int64_t* rows_;
  int64_t n_rows_;
  Reference* references_;
  int pass_;
  Noise<S> noise_;
  Plan plan_;
  Layout<S> layout_;
};

// No |eps| is larger.
inline float loudest(const StepInputs& p) {
  double sum = 0.0;
  for (int64_t f = 0; f < p.n_fields; ++f) sum += std::fabs(double(p.fields[f].weight));
  return float(kMaxNormal * sum);
}

template <class S, bool kNoise, bool kTop>
void step_with_logits(const StepParams& p, const Threads& threads) {
  Buffer<Reference> references(p.n_rows);
  const float most_noise = loudest(p);
  const auto begin = [&](int64_t i, double bound) {
    const float highest = kNoise ? most_noise * p.std[i] : 0.0f;
    references[i] = {float(bound), highest > kLargest ? highest - kLargest : 0.0f, false};
  };
  if (p.bound)
    for (int64_t i = 0; i < p.n_rows; ++i) begin(i, p.bound[i]);
  else
    half_squares<S>(p.x, p.x_dtype, p.width, p.n_rows, p.width, threads, begin);
  Buffer<int64_t> rows(p.n_rows);
  int64_t n_rows = p.n_rows;
  for (int pass = 0; n_rows > 0; ++pass) {
    Step<S, true, kNoise, kTop>(p, threads, pass == 0 ? nullptr : static_cast<int64_t*>(rows), n_rows, references, pass)
        .run();
    n_rows = 0;
    for (int64_t i = 0; i < p.n_rows; ++i)
      if (!references[i].done) rows[n_rows++] = i;
  }
}

template <class S>
void step_fwd(const StepParams& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  if (!p.scale)
    Step<S, false, false, false>(p, threads, nullptr, p.n_rows, nullptr, 0).run();
  else if (p.std)
    p.topk ? step_with_logits<S, true, true>(p, threads) : step_with_logits<S, true, false>(p, threads);
  else
    p.topk ? step_with_logits<S, false, true>(p, threads) : step_with_logits<S, false, false>(p, threads);
}

}  // namespace
}  // namespace smoothie
