// Private launch ops over the LibTorch stable ABI: tensors to pointers, torch's threads, nothing else. The public op,
// its fake kernel and all checks with messages for users are in Python (smoothie_kernels/library.py, checks.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "../philox.h"
#include "../torch_tensors.h"
#include "tiers.h"

namespace {

using smoothie::DType;
using smoothie::pointer;
using smoothie::pointer_or_null;
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

const smoothie::Tier& tier(const std::string& name) {
  const smoothie::Tier* found = smoothie::find_tier(name.c_str());
  STD_TORCH_CHECK(found != nullptr, "this processor does not run the tier ", name);
  return *found;
}

template <class Params>
Params inputs(const Tensor& x, const Tensor& embeddings, const Tensor& bias) {
  Params p{};
  p.x = pointer<void>(x), p.x_dtype = dtype_of(x);
  p.table = pointer<void>(embeddings), p.table_dtype = dtype_of(embeddings);
  p.bias = pointer<float>(bias);
  p.n_rows = x.size(0), p.n_vocab = embeddings.size(0), p.width = x.size(1);
  p.table_stride = embeddings.stride(0);
  return p;
}

// The keys of all fields, once per call.
std::vector<smoothie::NoiseField> noise_fields(int64_t seed, const Tensor& offsets,
                                               const std::optional<Tensor>& weights) {
  std::vector<smoothie::NoiseField> fields;
  for (int64_t f = 0; f < offsets.size(0); ++f) {
    const auto key = smoothie::noise_key(uint64_t(seed), uint64_t(pointer<int64_t>(offsets)[f]));
    fields.push_back({key.key, key.row_shift, weights ? pointer<float>(*weights)[f] : 1.0f});
  }
  return fields;
}

template <class Params>
Params inputs(const Tensor& x, const Tensor& embeddings, const Tensor& bias, const Tensor& mu,
              const std::optional<Tensor>& std, const std::optional<Tensor>& row_ids, int64_t row_offset,
              const std::vector<smoothie::NoiseField>& fields, double sigma_min) {
  Params p = inputs<Params>(x, embeddings, bias);
  p.mu = pointer<float>(mu);
  p.std = pointer_or_null<float>(std);
  p.row_ids = pointer_or_null<int64_t>(row_ids), p.row_offset = row_offset;
  p.sigma_min = float(sigma_min);
  p.fields = fields.data(), p.n_fields = int64_t(fields.size());
  return p;
}

void step_fwd(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, std::optional<Tensor> std,
              std::optional<Tensor> row_ids, int64_t row_offset, int64_t seed, Tensor offsets,
              std::optional<Tensor> field_weights, double sigma_min, std::string tier_name,
              std::optional<Tensor> smoothed, Tensor tokens, Tensor noisy_tokens, Tensor lse, Tensor best_score,
              Tensor log_sum, Tensor top_logits, Tensor top_tokens) {
  const auto fields = noise_fields(seed, offsets, field_weights);
  auto p = inputs<smoothie::StepParams>(x, embeddings, bias, mu, std, row_ids, row_offset, fields, sigma_min);
  p.smoothed = pointer_or_null<void>(smoothed);
  p.tokens = pointer<int64_t>(tokens), p.noisy_tokens = pointer<int64_t>(noisy_tokens);
  p.lse = pointer<float>(lse), p.best_score = pointer<float>(best_score), p.log_sum = pointer<float>(log_sum);
  p.topk = top_logits.size(1);
  p.top_logits = pointer<float>(top_logits), p.top_tokens = pointer<int64_t>(top_tokens);
  tier(tier_name).step_fwd(p, torch_threads());
}

void step_bwd(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, std::optional<Tensor> std,
              std::optional<Tensor> row_ids, int64_t row_offset, int64_t seed, Tensor offsets,
              std::optional<Tensor> field_weights, double sigma_min, std::string tier_name, Tensor smoothed,
              Tensor best_score, Tensor log_sum, std::optional<Tensor> grad_smoothed, std::optional<Tensor> grad_lse,
              std::optional<Tensor> grad_x, std::optional<Tensor> grad_embeddings) {
  const auto fields = noise_fields(seed, offsets, field_weights);
  auto p = inputs<smoothie::StepBwdParams>(x, embeddings, bias, mu, std, row_ids, row_offset, fields, sigma_min);
  p.smoothed = pointer<void>(smoothed);
  p.best_score = pointer<float>(best_score), p.log_sum = pointer<float>(log_sum);
  p.grad_smoothed = pointer_or_null<void>(grad_smoothed), p.grad_lse = pointer_or_null<float>(grad_lse);
  p.grad_x = pointer_or_null<void>(grad_x), p.grad_table = pointer_or_null<float>(grad_embeddings);
  tier(tier_name).step_bwd(p, torch_threads());
}

void average(Tensor weights, Tensor tokens, Tensor embeddings, std::string tier_name, Tensor out) {
  smoothie::AverageParams p{};
  p.weights = pointer<float>(weights), p.tokens = pointer<int64_t>(tokens);
  p.table = pointer<void>(embeddings), p.table_dtype = dtype_of(embeddings), p.table_stride = embeddings.stride(0);
  p.out = pointer<void>(out), p.out_dtype = dtype_of(out);
  p.n_rows = weights.size(0), p.k = weights.size(1), p.width = embeddings.size(1);
  tier(tier_name).average(p, torch_threads());
}

void nearest_fwd(Tensor x, Tensor embeddings, Tensor bias, std::string tier_name, Tensor tokens, Tensor distance) {
  auto p = inputs<smoothie::StepParams>(x, embeddings, bias);
  p.tokens = pointer<int64_t>(tokens), p.distance = pointer<float>(distance);
  tier(tier_name).step_fwd(p, torch_threads());
}

void column_bias(Tensor embeddings, std::string tier_name, Tensor bias) {
  tier(tier_name).bias(pointer<void>(embeddings), dtype_of(embeddings), embeddings.stride(0), embeddings.size(0),
                       embeddings.size(1), pointer<float>(bias), torch_threads());
}

void gaussian(std::optional<Tensor> row_ids, int64_t row_offset, int64_t seed, int64_t offset, std::string tier_name,
              Tensor out) {
  const auto key = smoothie::noise_key(uint64_t(seed), uint64_t(offset));
  tier(tier_name).gaussian(pointer_or_null<int64_t>(row_ids), row_offset, out.size(0), out.size(1), key.key,
                           key.row_shift, pointer<float>(out), torch_threads());
}

// The tiers that this processor runs, best first: "avx512 avx2 scalar".
std::string supported_tiers() {
  std::string names;
  for (int i = smoothie::kTierCount - 1; i >= 0; --i)
    if (smoothie::kTiers[i]->supported()) names += (names.empty() ? "" : " ") + std::string(smoothie::kTiers[i]->name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(smoothie_kernels_cpu, m) {
  m.def(
      "step_fwd(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, Tensor? std, Tensor? row_ids, int row_offset, "
      "int seed, Tensor offsets, Tensor? field_weights, float sigma_min, str tier, Tensor(a!)? smoothed, "
      "Tensor(b!) tokens, Tensor(c!) noisy_tokens, Tensor(d!) lse, Tensor(e!) best_score, Tensor(f!) log_sum, "
      "Tensor(g!) top_logits, Tensor(h!) top_tokens) -> ()");
  m.def(
      "step_bwd(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, Tensor? std, Tensor? row_ids, int row_offset, "
      "int seed, Tensor offsets, Tensor? field_weights, float sigma_min, str tier, Tensor smoothed, Tensor best_score, "
      "Tensor log_sum, Tensor? grad_smoothed, Tensor? grad_lse, Tensor(a!)? grad_x, Tensor(b!)? grad_embeddings) -> "
      "()");
  m.def(
      "nearest_fwd(Tensor x, Tensor embeddings, Tensor bias, str tier, Tensor(a!) tokens, Tensor(b!) distance) -> ()");
  m.def("average(Tensor weights, Tensor tokens, Tensor embeddings, str tier, Tensor(a!) out) -> ()");
  m.def("column_bias(Tensor embeddings, str tier, Tensor(a!) bias) -> ()");
  m.def("gaussian(Tensor? row_ids, int row_offset, int seed, int offset, str tier, Tensor(a!) out) -> ()");
  m.def("supported_tiers() -> str");
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
