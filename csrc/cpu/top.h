// The K largest logits of a row, exact: what is above a threshold is written down; where the room for that is full, the
// K largest stay, and a few more, and the threshold rises to the smallest of them. Of V logits a row writes down about
// K (1 + log(V / K)).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "step_panel.h"

namespace smoothie {
namespace {  // one copy per tier

// A logit and its column as one number: larger logits first, then lower columns.
using TopKey = uint64_t;

inline TopKey top_key(float logit, int32_t column) {
  int32_t bits;
  std::memcpy(&bits, &logit, 4);
  const uint32_t ordered = uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
  return TopKey(ordered) << 32 | uint32_t(~column);
}

inline float logit_of(TopKey key) {
  const uint32_t ordered = uint32_t(key >> 32);
  const uint32_t bits = ordered ^ (ordered >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float logit;
  std::memcpy(&logit, &bits, 4);
  return logit;
}

inline int32_t column_of(TopKey key) { return int32_t(~uint32_t(key)); }

// Room of a row: with 6 K instead of 2 K a row takes half as long again.
inline int64_t top_room(int64_t k, int64_t n_vocab) {
  const int64_t room = k + (k > 64 ? k : 64);
  return k == 0 ? 0 : room < n_vocab ? room : n_vocab;
}

// Keeps the best k of count > k keys and at most k / 4 more, in any order. Returns a bound: what is kept is not below
// it, all else is. Bisection, because its passes over the keys have no branches: with std::nth_element all of top-k
// took twice as long at K = 64.
inline TopKey keep_best(TopKey* keys, int64_t k, int64_t* count) {
  TopKey low = keys[0], high = keys[0];  // at least k keys are not below low, fewer are not below high + 1
  for (int64_t i = 1; i < *count; ++i) low = std::min(low, keys[i]), high = std::max(high, keys[i]);
  for (int64_t kept = *count; kept > k + k / 4;) {
    const TopKey middle = high - (high - low) / 2;
    int64_t above = 0;
    for (int64_t i = 0; i < *count; ++i) above += keys[i] >= middle;
    if (above >= k)
      low = middle, kept = above;
    else
      high = middle - 1;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < *count; ++i) {
    const TopKey key = keys[i];
    keys[kept] = key;
    kept += key >= low;
  }
  *count = kept;
  return low;
}

// Candidates of a vector of rows, by lane.
template <class S>
struct TopRows {
  static constexpr int kLanes = S::kLanes;
  float threshold[kLanes];  // infinity in lanes that keep nothing
  int64_t count[kLanes];
  int64_t k, room;
  TopKey* keys;  // [lane][room]

  void begin(int64_t lane, bool keeps) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    threshold[lane] = keeps ? -kInfinity : kInfinity;
    count[lane] = 0;
  }

  void take(int64_t lane, float logit, int32_t column) {
    TopKey* of_lane = keys + lane * room;
    of_lane[count[lane]++] = top_key(logit, column);
    if (count[lane] < room) return;
    // A later column with the same logit comes after all k of them.
    threshold[lane] = logit_of(keep_best(of_lane, k, &count[lane]));
  }

  // The lane's largest logit and its column, as weigh would have found them.
  void best(int64_t lane, RowState<S>& rows) const {
    if (count[lane] == 0) return;
    const TopKey key = *std::max_element(keys + lane * room, keys + lane * room + count[lane]);
    rows.best_logit[lane] = logit_of(key), rows.noisy_token[lane] = column_of(key);
  }
};

// Takes what is above the threshold among logits [column][lanes] of one vector of rows.
template <class S>
void keep_largest(const float* logits, int64_t first_column, int64_t count, TopRows<S>& rows) {
  auto threshold = S::load(rows.threshold);
  for (int64_t v = 0; v < count; ++v, logits += S::kLanes) {
    uint32_t above = S::bits(S::greater(S::load(logits), threshold));
    if (!above) continue;
    for (; above; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      rows.take(lane, logits[lane], int32_t(first_column + v));
    }
    threshold = S::load(rows.threshold);
  }
}

}  // namespace
}  // namespace smoothie
