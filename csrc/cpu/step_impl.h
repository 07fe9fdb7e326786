// The streaming step of one tier.
//
//   for a block of rows:                        x packed to xt [panel][D][lanes]
//     for a tile of kTile tokens:               E[tile] straight from the table, or widened to fp32 once
//       for a panel of rows:                    (step_panel.h)
//         score   p[v][lanes]  = E[tile] xt + bias             product over D
//         weigh   p            = exp(mu D + std eps - ref)     noise, argmax twice, row sum: all in cache
//         gather  ot[D][lanes] += E[tile]^T p                  product over the tile
//     finish: smoothed = ot / sum, lse = ref + log(sum)
//
// Logits are at most 6.77 std (distances are never positive), so no running maximum: `ref` is fixed beforehand and
// partial sums of any tiles add. Rows whose largest logit turns out far from it are done again: exact for every input,
// another pass only for the rows that need one.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "convert.h"
#include "step_panel.h"
#include "step_params.h"

namespace smoothie {
namespace {  // one copy per tier

constexpr int kTile = 128;       // tokens; a panel's weights (16 KiB at 32 lanes) stay in L1
constexpr int kBlockPanels = 8;  // panels that share a tile: xt and ot of 256 rows x 384 columns take 0.8 MB of L2
constexpr float kMaxNormal = 6.77f;
// Where a row's maximum may lie over its reference: fp32 holds all that counts.
constexpr float kLargest = 20.0f, kSmallest = -50.0f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
class Buffer {  // aligned to a cache line, never initialised
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kAlign))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlign); }
  operator T*() { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

inline double sum_of_squares(const float* v, int64_t count) {
  double lanes[8] = {};
  int64_t d = 0;
  for (; d + 8 <= count; d += 8)
    for (int i = 0; i < 8; ++i) lanes[i] += double(v[d + i]) * v[d + i];
  for (; d < count; ++d) lanes[0] += double(v[d]) * v[d];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

inline double squared_distance(const float* a, const float* b, int64_t count) {
  double sum = 0.0;
  for (int64_t d = 0; d < count; ++d) sum += (double(a[d]) - b[d]) * (double(a[d]) - b[d]);
  return sum;
}

inline uint32_t row_id(const int64_t* row_ids, int64_t row_offset, int64_t i) {
  return uint32_t(row_ids ? row_ids[i] : row_offset + i);
}

// Runs work(worker, task) for every task; threads take the next one as they come free.
template <class Work>
void share(const Threads& threads, int64_t tasks, const Work& work) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Work& work;
  } context{{}, tasks, work};
  threads.run(
      least(threads.count, tasks),
      [](void* raw, int64_t worker) {
        auto& c = *static_cast<Context*>(raw);
        for (int64_t task; (task = c.next.fetch_add(1)) < c.tasks;) c.work(worker, task);
      },
      &context);
}

// What is taken off a row's scores and logits so that fp32 holds its weights:
// exp(scale (score_j - score) + std eps_j - logit).
struct Reference {
  // By pass: the score at distance zero; the nearest token's, for rows far from all tokens; the largest logit as well,
  // for noise so loud that its largest value is far below what it could be. Nothing finite needs a fourth.
  static constexpr int kPasses = 3;

  float score, logit;
  double half_square;  // ||x||^2 / 2
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

  Partial(int64_t vectors, int64_t width) : ot(vectors * S::kLanes * width), state(vectors) {}
};

template <class S>
struct Scratch {
  Buffer<float> xt;    // [panel][D][lanes of the panel]
  Buffer<float> p;     // [kTile][lanes of the panel]
  Buffer<float> eps;   // [kTile][kLanes]
  Buffer<float> row;   // [D]
  Buffer<float> row2;  // [D]
  Buffer<float> tile;  // [kTile][D, padded], only where the table is not fp32

  Scratch(int64_t vectors, int64_t width, int64_t tile_size)
      : xt(vectors * S::kLanes * width),
        p(kTile * 2 * S::kLanes),
        eps(kTile * S::kLanes),
        row(width),
        row2(width),
        tile(tile_size) {}
};

template <class S, bool kLogits, bool kNoise>
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
        keys_(params.noise_key),
        plan_(make_plan(ceil_div(n_rows, kPanel), ceil_div(params.n_vocab, kTile), threads.count)) {
    while (n_rows << (group_log_ + 1) <= kLanes && p_.width % (2 << group_log_) == 0) ++group_log_;
    tile_stride_ = (p_.width + 15) / 16 * 16 + 16;  // an odd number of cache lines: rows of a tile spread over all sets
  }

  void run() {
    const int64_t tasks = plan_.blocks * plan_.splits, workers = least(threads_.count, tasks);
    const int64_t vectors = 2 * ceil_div(plan_.panels, plan_.blocks);
    const int64_t tile_size = p_.table_dtype == DType::kFloat32 ? 0 : kTile * tile_stride_;
    std::vector<Scratch<S>> scratch;
    std::vector<Partial<S>> partials;
    for (int64_t i = 0; i < workers; ++i) scratch.emplace_back(vectors, p_.width, tile_size);
    for (int64_t i = 0; i < (plan_.splits == 1 ? workers : tasks); ++i)
      partials.emplace_back(vectors, smoothed_width());

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
  int64_t smoothed_width() const { return kLogits ? p_.width : 0; }
  int64_t row(int64_t i) const { return rows_ ? rows_[i] : i; }
  float scale(int64_t r) const { return float(double(p_.mu[r]) / (double(p_.sigma_min) * p_.sigma_min)); }
  // Where column d of a panel's row i stands in its xt and ot.
  int64_t element(int64_t i, int64_t d, int64_t lanes) const {
    return (d >> group_log_) * lanes + (i << group_log_) + (d & ((1 << group_log_) - 1));
  }
  static int vectors_of(int64_t n_rows) { return n_rows > kLanes ? 2 : 1; }  // of the panel that these rows begin

  // Calls body(panel in block, its first row, how many rows) for the panels of a block.
  template <class Body>
  void for_panels(int64_t block, const Body& body) const {
    const int64_t first = first_panel(block), last = first_panel(block + 1);
    for (int64_t panel = first; panel < last; ++panel)
      body(panel - first, panel * kPanel, least(kPanel, n_rows_ - panel * kPanel));
  }

  void pack(int64_t block, Scratch<S>& s, Partial<S>& partial) const {
    for_panels(block, [&](int64_t panel, int64_t first, int64_t count) {
      const int64_t lanes = vectors_of(count) * kLanes, start = panel * p_.width * kPanel;
      std::memset(s.xt + start, 0, size_t(p_.width * lanes) * sizeof(float));
      if (kLogits) std::memset(partial.ot + start, 0, size_t(p_.width * lanes) * sizeof(float));
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t i = lane >> group_log_;  // lanes behind the last row hold a row of zeros
        const RowConstants constants = kLogits && i < count ? constants_of(row(first + i)) : RowConstants{};
        partial.state[panel * 2 + lane / kLanes].begin(lane % kLanes, constants);
      }
      for (int64_t i = 0; i < count; ++i) {
        widen<S>(at(p_.x, p_.x_dtype, row(first + i) * p_.width), p_.x_dtype, p_.width, s.row);
        for (int64_t d = 0; d < p_.width; ++d) s.xt[start + element(i, d, lanes)] = s.row[d];
      }
    });
  }

  RowConstants constants_of(int64_t r) const {
    const Reference& ref = references_[r];
    RowConstants row{scale(r), 0.0f, ref.score, ref.logit, 0};
    if (kNoise) {
      row.std = p_.std[r];
      row.noise_row = int32_t(row_id(p_.row_ids, p_.row_offset, r) + p_.noise_row_shift);
    }
    return row;
  }

  void stream(int64_t block, int64_t split, Scratch<S>& s, Partial<S>& partial) const {
    for (int64_t t = split * plan_.tiles / plan_.splits; t < (split + 1) * plan_.tiles / plan_.splits; ++t) {
      const int64_t first = t * kTile, count = least(kTile, p_.n_vocab - first);
      const float* tile = static_cast<const float*>(p_.table) + first * p_.table_stride;
      int64_t stride = p_.table_stride;
      if (p_.table_dtype != DType::kFloat32) {
        for (int64_t v = 0; v < count; ++v)
          widen<S>(at(p_.table, p_.table_dtype, (first + v) * p_.table_stride), p_.table_dtype, p_.width,
                   s.tile + v * tile_stride_);
        tile = s.tile, stride = tile_stride_;
      }
      for_panels(block, [&](int64_t panel, int64_t, int64_t n_rows) {
        if (vectors_of(n_rows) == 2)
          one_panel<2, 1>(panel, tile, stride, first, count, s, partial);
        else
          one_panel_of_group<1>(panel, tile, stride, first, count, s, partial);
      });
    }
  }

  template <int kGroup, class... Arguments>
  void one_panel_of_group(Arguments&&... arguments) const {
    if (1 << group_log_ == kGroup)
      one_panel<1, kGroup>(arguments...);
    else if constexpr (kGroup < kLanes)
      one_panel_of_group<2 * kGroup>(arguments...);
  }

  template <int kVectors, int kGroup>
  void one_panel(int64_t panel, const float* tile, int64_t stride, int64_t first, int64_t count, Scratch<S>& s,
                 Partial<S>& partial) const {
    const int64_t start = panel * p_.width * kPanel;
    score<S, kVectors, kGroup>(tile, stride, p_.bias + first, s.xt + start, p_.width, count, s.p);
    for (int n = 0; n < kVectors; ++n)
      weigh<S, kLogits, kNoise>(s.p + n * kLanes, kVectors * kLanes, first, count, keys_, s.eps,
                                partial.state[panel * 2 + n]);
    if constexpr (kLogits) gather<S, kVectors, kGroup>(tile, stride, s.p, p_.width, count, partial.ot + start);
  }

  // Merges the splits of a block in their order (the same sums in every run) and writes its rows.
  void finish(int64_t block, Partial<S>* parts, Scratch<S>& s) const {
    for_panels(block, [&](int64_t panel, int64_t first, int64_t count) {
      const int lanes = vectors_of(count) * kLanes;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t vector = panel * 2 + (i << group_log_) / kLanes, lane = (i << group_log_) % kLanes;
        const int64_t r = row(first + i);
        RowState<S>& total = parts[0].state[vector];
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
        if (kLogits)
          finish_logits(parts, panel * p_.width * kPanel, i, lanes, r, total, lane, sum);
        else
          p_.distance[r] = distance(r, total.token[lane], s);
      }
    });
  }

  void finish_logits(Partial<S>* parts, int64_t start, int64_t i, int lanes, int64_t r, const RowState<S>& total,
                     int64_t lane, double sum) const {
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
    const double offset = ref.logit + double(scale(r)) * (ref.score - ref.half_square);
    p_.lse[r] = fits ? float(offset + std::log(sum)) : kNaN;
    const float inverse = fits ? float(1.0 / sum) : kNaN;
    for (int64_t d = 0; d < p_.width; ++d) {
      const int64_t at = start + element(i, d, lanes);
      float value = parts[0].ot[at];
      for (int64_t k = 1; k < plan_.splits; ++k) value += parts[k].ot[at];
      narrow(value * inverse, p_.x_dtype, p_.smoothed, r * p_.width + d);
    }
  }

  // The winner's distance directly: the scores' difference of large numbers would cancel.
  float distance(int64_t r, int64_t token, Scratch<S>& s) const {
    widen<S>(at(p_.x, p_.x_dtype, r * p_.width), p_.x_dtype, p_.width, s.row);
    widen<S>(at(p_.table, p_.table_dtype, token * p_.table_stride), p_.table_dtype, p_.width, s.row2);
    return float(squared_distance(s.row, s.row2, p_.width));
  }

  const StepParams& p_;
  const Threads& threads_;
  const int64_t* rows_;
  int64_t n_rows_;
  Reference* references_;
  int pass_;
  RoundKeys<S> keys_;
  Plan plan_;
  int64_t tile_stride_;
  int group_log_ = 0;  // log2 of the lanes of a row
};

// use(i, ||row_i||^2 / 2), summed in float64: next to it the scores of near tokens cancel.
template <class S, class Use>
void half_squares(const void* matrix, DType dtype, int64_t stride, int64_t n_rows, int64_t width,
                  const Threads& threads, const Use& use) {
  constexpr int64_t kRows = 256;  // a task
  std::vector<Buffer<float>> widened;
  for (int64_t i = 0; i < threads.count; ++i) widened.emplace_back(width);
  share(threads, ceil_div(n_rows, kRows), [&](int64_t worker, int64_t task) {
    for (int64_t i = task * kRows; i < least(n_rows, (task + 1) * kRows); ++i) {
      const void* row = at(matrix, dtype, i * stride);
      if (dtype != DType::kFloat32) widen<S>(row, dtype, width, widened[size_t(worker)]);
      use(i,
          sum_of_squares(dtype == DType::kFloat32 ? static_cast<const float*>(row) : widened[size_t(worker)], width) /
              2);
    }
  });
}

template <class S, bool kNoise>
void step_with_logits(const StepParams& p, const Threads& threads) {
  Buffer<Reference> references(p.n_rows);
  half_squares<S>(p.x, p.x_dtype, p.width, p.n_rows, p.width, threads, [&](int64_t i, double half_square) {
    const float highest = kNoise ? kMaxNormal * p.std[i] : 0.0f;
    references[i] = {float(half_square), highest > kLargest ? highest - kLargest : 0.0f, half_square, false};
  });
  Buffer<int64_t> rows(p.n_rows);
  int64_t n_rows = p.n_rows;
  for (int pass = 0; n_rows > 0; ++pass) {
    Step<S, true, kNoise>(p, threads, pass == 0 ? nullptr : static_cast<int64_t*>(rows), n_rows, references, pass)
        .run();
    n_rows = 0;
    for (int64_t i = 0; i < p.n_rows; ++i)
      if (!references[i].done) rows[n_rows++] = i;
  }
}

template <class S>
void step_fwd(const StepParams& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  if (!p.mu)
    Step<S, false, false>(p, threads, nullptr, p.n_rows, nullptr, 0).run();
  else if (p.std)
    step_with_logits<S, true>(p, threads);
  else
    step_with_logits<S, false>(p, threads);
}

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
      normals<S>(uint32_t(j >> 1), (cols + 1) / 2, S::load_int(rows), keys, eps);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < cols; ++k) out[(first + i) * n_cols + j + k] = eps[k * S::kLanes + i];
    }
  });
}

}  // namespace
}  // namespace smoothie
