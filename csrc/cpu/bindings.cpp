// Private launch ops over the LibTorch stable ABI: tensors to pointers, torch's threads, nothing else. The public op,
// its fake kernel and all checks with messages for users are in Python (smoothie_kernels/library.py, checks.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../philox.h"
#include "../torch_tensors.h"
#include "tiers.h"

namespace {

using smoothie::data;
using smoothie::DType;
using smoothie::pointer;
using smoothie::rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// torch's own threads, so that torch.set_num_threads rules and a call inside a parallel region stays serial.
smoothie::Threads torch_threads() {
  return {int(torch::stable::get_num_threads()), [](int64_t count, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

// Tiers go by number: the stable ABI of torch 2.13 leaks every std::string that an operator takes.
const smoothie::Tier& tier(int64_t index) {
  const smoothie::Tier* found = smoothie::find_tier(index);
  STD_TORCH_CHECK(found != nullptr, "this processor does not run tier ", index);
  return *found;
}

template <class Params>
Params inputs(const Tensor& x, const Tensor& embeddings, const Tensor& bias, const std::optional<Tensor>& col) {
  Params p{};
  p.n_rows = x.size(0), p.n_vocab = embeddings.size(0), p.width = x.size(1);
  p.x = data(x, "x", {p.n_rows, p.width}), p.x_dtype = dtype_of(x);
  p.table = rows(embeddings, "embeddings", {p.n_vocab, p.width}), p.table_dtype = dtype_of(embeddings);
  p.bias = pointer<float>(bias, "bias", {p.n_vocab}), p.col = pointer<float>(col, "col", {p.n_vocab});
  p.table_stride = embeddings.stride(0);
  return p;
}

// The keys of all fields, once per call.
std::vector<smoothie::NoiseField> noise_fields(int64_t seed, const Tensor& offsets,
                                               const std::optional<Tensor>& weights) {
  const int64_t count = offsets.size(0);
  const int64_t* offset = pointer<int64_t>(offsets, "offsets", {count});
  const float* weight = pointer<float>(weights, "field_weights", {count});
  std::vector<smoothie::NoiseField> fields;
  for (int64_t f = 0; f < count; ++f) {
    const auto key = smoothie::noise_key(uint64_t(seed), uint64_t(offset[f]));
    fields.push_back({key.key, key.row_shift, weight ? weight[f] : 1.0f});
  }
  return fields;
}

template <class Params>
Params inputs(const Tensor& x, const Tensor& embeddings, const Tensor& bias, const Tensor& scale,
              const std::optional<Tensor>& std, const std::optional<Tensor>& row_ids, int64_t row_offset,
              const std::vector<smoothie::NoiseField>& fields, const std::optional<Tensor>& bound,
              const std::optional<Tensor>& col, const std::optional<Tensor>& values) {
  Params p = inputs<Params>(x, embeddings, bias, col);
  p.scale = pointer<float>(scale, "scale", {p.n_rows});
  p.std = pointer<float>(std, "std", {p.n_rows});
  p.row_ids = pointer<int64_t>(row_ids, "row_ids", {p.n_rows}), p.row_offset = row_offset;
  p.fields = fields.data(), p.n_fields = int64_t(fields.size());
  p.bound = pointer<float>(bound, "bound", {p.n_rows});
  if (values) {
    STD_TORCH_CHECK(values->scalar_type() == embeddings.scalar_type(), "values must be of the type of embeddings");
    p.values = rows(*values, "values", {p.n_vocab, p.width}), p.values_stride = values->stride(0);
  }
  return p;
}

void* like_x(const std::optional<Tensor>& t, const char* name, const Tensor& x) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), name, " must be of the type of x");
  return data(*t, name, {x.size(0), x.size(1)});
}

// Of x's shape, in any type.
void* rows_of_x(const std::optional<Tensor>& t, const char* name, const Tensor& x, DType& dtype) {
  if (!t) return nullptr;
  dtype = dtype_of(*t);
  return data(*t, name, {x.size(0), x.size(1)});
}

void step_fwd(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, std::optional<Tensor> std,
              std::optional<Tensor> row_ids, int64_t row_offset, int64_t seed, Tensor offsets,
              std::optional<Tensor> field_weights, std::optional<Tensor> bound, std::optional<Tensor> col,
              std::optional<Tensor> values, int64_t tier_index, std::optional<Tensor> smoothed, Tensor tokens,
              Tensor noisy_tokens, Tensor lse, Tensor best_score, Tensor log_sum, Tensor top_logits,
              Tensor top_tokens) {
  const auto fields = noise_fields(seed, offsets, field_weights);
  auto p =
      inputs<smoothie::StepParams>(x, embeddings, bias, scale, std, row_ids, row_offset, fields, bound, col, values);
  const int64_t n = p.n_rows;
  p.smoothed = rows_of_x(smoothed, "smoothed", x, p.smoothed_dtype);
  p.tokens = pointer<int64_t>(tokens, "tokens", {n});
  p.noisy_tokens = pointer<int64_t>(noisy_tokens, "noisy_tokens", {n});
  p.lse = pointer<float>(lse, "lse", {n}), p.best_score = pointer<float>(best_score, "best_score", {n});
  p.log_sum = pointer<float>(log_sum, "log_sum", {n});
  p.topk = top_logits.size(1);
  STD_TORCH_CHECK(p.topk <= p.n_vocab, "top_logits must have at most as many columns as there are tokens");
  p.top_logits = pointer<float>(top_logits, "top_logits", {n, p.topk});
  p.top_tokens = pointer<int64_t>(top_tokens, "top_tokens", {n, p.topk});
  tier(tier_index).step_fwd(p, torch_threads());
}

void step_bwd(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, std::optional<Tensor> std,
              std::optional<Tensor> row_ids, int64_t row_offset, int64_t seed, Tensor offsets,
              std::optional<Tensor> field_weights, std::optional<Tensor> bound, std::optional<Tensor> col,
              std::optional<Tensor> values, int64_t tier_index, std::optional<Tensor> smoothed, Tensor noisy_tokens,
              Tensor best_score, Tensor log_sum, std::optional<Tensor> grad_smoothed, std::optional<Tensor> grad_lse,
              std::optional<Tensor> grad_x, std::optional<Tensor> grad_embeddings, std::optional<Tensor> grad_bias,
              std::optional<Tensor> grad_values) {
  const auto fields = noise_fields(seed, offsets, field_weights);
  auto p =
      inputs<smoothie::StepBwdParams>(x, embeddings, bias, scale, std, row_ids, row_offset, fields, bound, col, values);
  const int64_t n = p.n_rows;
  p.smoothed = rows_of_x(smoothed, "smoothed", x, p.smoothed_dtype);
  p.noisy_tokens = pointer<int64_t>(noisy_tokens, "noisy_tokens", {n});
  p.best_score = pointer<float>(best_score, "best_score", {n}), p.log_sum = pointer<float>(log_sum, "log_sum", {n});
  p.grad_smoothed = like_x(grad_smoothed, "grad_smoothed", x);
  STD_TORCH_CHECK(p.smoothed || !p.grad_smoothed, "smoothed must come with grad_smoothed");
  p.grad_lse = pointer<float>(grad_lse, "grad_lse", {n});
  p.grad_x = rows_of_x(grad_x, "grad_x", x, p.grad_x_dtype);
  p.grad_table = pointer<float>(grad_embeddings, "grad_embeddings", {p.n_vocab, p.width});
  p.grad_bias = pointer<float>(grad_bias, "grad_bias", {p.n_vocab});
  p.grad_values = pointer<float>(grad_values, "grad_values", {p.n_vocab, p.width});
  STD_TORCH_CHECK(p.values || !p.grad_values, "values must come with grad_values");
  tier(tier_index).step_bwd(p, torch_threads());
}

void average(Tensor weights, Tensor tokens, Tensor embeddings, int64_t tier_index, Tensor out) {
  smoothie::AverageParams p{};
  p.n_rows = weights.size(0), p.k = weights.size(1), p.width = embeddings.size(1);
  p.weights = pointer<float>(weights, "weights", {p.n_rows, p.k});
  p.tokens = pointer<int64_t>(tokens, "tokens", {p.n_rows, p.k});
  p.table = rows(embeddings, "embeddings", {embeddings.size(0), p.width});
  p.table_dtype = dtype_of(embeddings), p.table_stride = embeddings.stride(0);
  p.out = data(out, "out", {p.n_rows, p.width}), p.out_dtype = dtype_of(out);
  tier(tier_index).average(p, torch_threads());
}

void nearest_fwd(Tensor x, Tensor embeddings, Tensor bias, std::optional<Tensor> col, int64_t tier_index, Tensor tokens,
                 Tensor distance) {
  auto p = inputs<smoothie::StepParams>(x, embeddings, bias, col);
  p.tokens = pointer<int64_t>(tokens, "tokens", {p.n_rows});
  p.distance = pointer<float>(distance, "distance", {p.n_rows});
  tier(tier_index).step_fwd(p, torch_threads());
}

void column_bias(Tensor embeddings, int64_t tier_index, Tensor bias) {
  const int64_t v = embeddings.size(0), d = embeddings.size(1);
  tier(tier_index)
      .bias(rows(embeddings, "embeddings", {v, d}), dtype_of(embeddings), embeddings.stride(0), v, d,
            pointer<float>(bias, "bias", {v}), torch_threads());
}

void gaussian(std::optional<Tensor> row_ids, int64_t row_offset, int64_t seed, int64_t offset, int64_t tier_index,
              Tensor out) {
  const auto key = smoothie::noise_key(uint64_t(seed), uint64_t(offset));
  const int64_t n = out.size(0), columns = out.size(1);
  tier(tier_index)
      .gaussian(pointer<int64_t>(row_ids, "row_ids", {n}), row_offset, n, columns, key.key, key.row_shift,
                pointer<float>(out, "out", {n, columns}), torch_threads());
}

// Bit i: this processor runs kTiers[i].
int64_t supported_tiers() {
  int64_t bits = 0;
  for (int i = 0; i < smoothie::kTierCount; ++i) bits |= int64_t(smoothie::kTiers[i]->supported()) << i;
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY(smoothie_kernels_cpu, m) {
  m.def(
      "step_fwd(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, Tensor? std, Tensor? row_ids, int row_offset, "
      "int seed, Tensor offsets, Tensor? field_weights, Tensor? bound, Tensor? col, Tensor? values, int tier, "
      "Tensor(a!)? smoothed, "
      "Tensor(b!) tokens, Tensor(c!) noisy_tokens, Tensor(d!) lse, Tensor(e!) best_score, Tensor(f!) log_sum, "
      "Tensor(g!) top_logits, Tensor(h!) top_tokens) -> ()");
  m.def(
      "step_bwd(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, Tensor? std, Tensor? row_ids, int row_offset, "
      "int seed, Tensor offsets, Tensor? field_weights, Tensor? bound, Tensor? col, Tensor? values, int tier, "
      "Tensor? smoothed, "
      "Tensor noisy_tokens, Tensor best_score, Tensor log_sum, Tensor? grad_smoothed, Tensor? grad_lse, "
      "Tensor(a!)? grad_x, Tensor(b!)? grad_embeddings, Tensor(c!)? grad_bias, Tensor(d!)? grad_values) -> ()");
  m.def(
      "nearest_fwd(Tensor x, Tensor embeddings, Tensor bias, Tensor? col, int tier, Tensor(a!) tokens, "
      "Tensor(b!) distance) -> ()");
  m.def("average(Tensor weights, Tensor tokens, Tensor embeddings, int tier, Tensor(a!) out) -> ()");
  m.def("column_bias(Tensor embeddings, int tier, Tensor(a!) bias) -> ()");
  m.def("gaussian(Tensor? row_ids, int row_offset, int seed, int offset, int tier, Tensor(a!) out) -> ()");
  m.def("supported_tiers() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(smoothie_kernels_cpu, CPU, m) {
  m.impl("step_fwd", TORCH_BOX(&step_fwd));
  m.impl("step_bwd", TORCH_BOX(&step_bwd));
  m.impl("average", TORCH_BOX(&average));
  m.impl("nearest_fwd", TORCH_BOX(&nearest_fwd));
  m.impl("column_bias", TORCH_BOX(&column_bias));
  m.impl("gaussian", TORCH_BOX(&gaussian));
}

STABLE_TORCH_LIBRARY_IMPL(smoothie_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("supported_tiers", TORCH_BOX(&supported_tiers));
}
