// What the launchers take: pointers with their shapes, all in device memory, strides in elements. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace smoothie {
namespace cuda {

enum class Type : int { kBFloat16, kFloat16 };

// What a pass over the table is for.
enum class Mode : int {
  kNearest,     // the nearest token, and nothing of the logits
  kStatistics,  // that, the largest noisy logit, the sum of weights
  kKeep1,       // that, and the 1, 2 or 4 largest logits of every bucket: kBucketsOfPart buckets a part
  kKeep2,
  kKeep4,
  kWeights,  // the statistics, and all weights
  kKeys,     // all logits, as keys; nothing else
  kMean,     // the statistics, and the sums of weights times the table: narrow tables
};

// Weights are exp(logit - highest), logit = scale (score - ref_score) + std eps,
// score = x . E - ||E||^2 / 2. Every part of the table takes the same ref_score and highest of a row, so parts add.
struct StepParams {
  const void* x;           // [N, D] contiguous, type
  const void* table;       // [V, D], type
  const float* bias;       // [V]
  const float* scale;      // [N]  nullptr in kNearest
  const float* std;        // [N]  nullptr without noise
  const int64_t* row_ids;  // [N]  nullptr: row_offset + i
  const NoiseField* fields;
  const float* ref_score;  // [N]  of the two in kKeys only ref_score is read
  const float* highest;    // [N]
  const bool* only;        // [N]  stream: rows that are wanted; nullptr: all
  int64_t n_rows, table_stride;
  uint32_t row_offset;
  int n_fields, width;         // F, D; D is a multiple of 8
  int first_token, end_token;  // of the table, for this call; the first is a multiple of the tile
  Type type;

  // A call takes the tiles of tokens in `parts` parts, part p having tiles p, p + parts, ...; each of `chunks` blocks
  // for the same rows takes parts c, c + chunks, ... and writes one result for all of them.
  int strided_tiles;  // kKeep*: so many tiles have pairs of tokens that lie as many pairs apart; the rest is as it is
  int parts, chunks;  // chunks <= parts <= tiles; equal but with kKeep*
  int resident;       // score: boxes of 64 columns of x that stay in shared memory
  int cluster;        // score: neighbouring blocks that share the table's boxes: 1, 2 or 4

  float* numbers;   // [3, C, N]  best score, best logit (less highest), sum of weights
  int32_t* tokens;  // [2, C, N]  of the best score, of the best logit
  void* weights;    // [N, weights_stride] type: kWeights, columns from first_token on, to a whole tile
  int64_t* keys;    // [N, P, keep, kBucketsOfPart] in kKeep*; [N, weights_stride] in kKeys
  int64_t weights_stride;
  float* acc;  // [C, N, D]  stream: sums of weights times the table; nullptr: not wanted
};

constexpr int kSharedBytes = 232448;  // 227 KiB: what a block of Hopper can have

// Neighbours in a table are alike, and winners in one bucket are lost: so no tile has neighbours, but for pairs. Column
// c of a tile lies in bucket c mod 8 of its part.
constexpr int kBucketsOfPart = 8;

// A row's reference lies so far below the highest logit that there can be: see backends/cuda.py.
struct PrepareParams {
  const void* x;               // [N, D]
  const float* std;            // [N] or nullptr
  const int64_t* seed;         // []
  const int64_t* offsets;      // [F]
  const float* field_weights;  // [F] or nullptr
  int64_t n_rows;
  int width, n_fields;
  Type type;
  float headroom;
  float* ref_score;    // [N]  ||x||^2 / 2
  float* highest;      // [N]
  NoiseField* fields;  // [F]
};

struct MergeParams {
  const void *x, *table;  // [N, D], [V, D]
  const float *scale, *ref_score, *highest;
  const float* numbers;   // [3, C, N]
  const int32_t* tokens;  // [2, C, N]
  const float* acc;       // [A, N, D] or nullptr; A = C, or 1: the sums of all
  const bool* only;       // [N] or nullptr: rows that are written
  int64_t n_rows, table_stride;
  int width, chunks, sums;    // D, C, A
  float lowest, highest_fit;  // a best logit outside is far: its weights are not sound
  Type type;
  void* smoothed;                                  // [N, D] or nullptr
  bool wide;                                       // smoothed is float32
  int64_t *nearest, *noisy;                        // [N]
  float *lse, *best_score, *log_sum, *best_logit;  // [N]
  bool* far;                                       // [N] or nullptr
};

struct NearestParams {
  const void *x, *table;
  const float* numbers;   // [1, C, N]
  const int32_t* tokens;  // [1, C, N]
  int64_t n_rows, table_stride;
  int width, chunks;
  Type type;
  int64_t* nearest;  // [N]
  float* distance;   // [N]
};

struct GaussianParams {
  const int64_t *row_ids, *seed, *offset;
  uint32_t row_offset;
  int64_t n_rows, columns;
  float* out;  // [N, columns]
};

}  // namespace cuda
}  // namespace smoothie
