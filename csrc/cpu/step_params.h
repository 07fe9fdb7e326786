// What one call needs, as plain data: pointers with their shapes, strides in elements.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace smoothie {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// score = col (x . E) + bias. Without a bound scores are those of squared distances: bias is -||E||^2 / 2, and lse and
// the derivatives of a score have -||x||^2 / 2 as well.
struct StepInputs {
  const void* x;           // [N, D] contiguous, x_dtype
  const void* table;       // [V, D] unit inner stride, table_dtype
  const void* values;      // [V, D] likewise: what the mean is one of    nullptr: the table
  const float* bias;       // [V]
  const float* col;        // [V]    nullptr: ones
  const float* bound;      // [N]    no score is above it
  const float* scale;      // [N]    nullptr: nearest token only
  const float* std;        // [N]    nullptr: no noise anywhere
  const int64_t* row_ids;  // [N]  nullptr: row_offset + i
  int64_t row_offset;
  int64_t n_rows, n_vocab, width;  // N, V, D
  int64_t table_stride, values_stride;
  DType x_dtype, table_dtype;
  const NoiseField* fields;  // [F]  the noise: eps_ij = sum_f weight_f normal_ij(key_f, row_shift_f)
  int64_t n_fields;
};

struct StepParams : StepInputs {
  void* smoothed;  // [N, D] contiguous, smoothed_dtype    nullptr: not wanted
  DType smoothed_dtype;
  int64_t* tokens;        // [N]
  int64_t* noisy_tokens;  // [N]
  float* lse;             // [N]
  float* best_score;      // [N]    x_i . E_tokens_i - ||E_tokens_i||^2 / 2
  float* log_sum;         // [N]    lse - scale (best_score - ||x_i||^2 / 2)
  float* distance;        // [N]    nearest token only: ||x_i - E_tokens_i||^2
  int64_t topk;           // K, 0 for none
  float* top_logits;      // [N, K] scale (score - best_score) + std eps, descending; NaN where lse is
  int64_t* top_tokens;    // [N, K] of equal logits the lowest first
};

struct StepBwdParams : StepInputs {
  const void* smoothed;         // [N, D] contiguous, smoothed_dtype    nullptr where grad_smoothed is
  const int64_t* noisy_tokens;  // [N]
  const float* best_score;
  const float* log_sum;
  const void* grad_smoothed;  // [N, D] contiguous, x_dtype    nullptr: zero
  const float* grad_lse;      // [N]                           nullptr: zero
  void* grad_x;               // [N, D] contiguous, grad_x_dtype    nullptr: not needed
  float* grad_table;          // [V, D] contiguous                  nullptr: not needed, as the other two
  float* grad_values;         // [V, D] contiguous, where values are: else the table's has it
  float* grad_bias;           // [V]
  DType smoothed_dtype, grad_x_dtype;
};

struct AverageParams {
  const float* weights;   // [N, K]
  const int64_t* tokens;  // [N, K]
  const void* table;      // [V, D] unit inner stride, table_dtype
  void* out;              // [N, D] contiguous, out_dtype
  int64_t n_rows, k, width, table_stride;
  DType table_dtype, out_dtype;
};

// Runs body(context, i) for i in [0, count), on as many threads as the host program lends.
struct Threads {
  int count;
  void (*run)(int64_t count, void (*body)(void* context, int64_t i), void* context);
};

// One tier of the kernel: the same source built for one instruction set.
struct Tier {
  const char* name;
  bool (*supported)();
  void (*step_fwd)(const StepParams&, const Threads&);
  void (*step_bwd)(const StepBwdParams&, const Threads&);
  void (*average)(const AverageParams&, const Threads&);
  void (*bias)(const void* table, DType dtype, int64_t table_stride, int64_t n_vocab, int64_t width, float* bias,
               const Threads&);
  void (*gaussian)(const int64_t* row_ids, int64_t row_offset, int64_t n_rows, int64_t n_cols, uint32_t key,
                   uint32_t row_shift, float* out, const Threads&);
};

extern const Tier kTierScalar;
extern const Tier kTierAvx2;
extern const Tier kTierAvx512;

}  // namespace smoothie
