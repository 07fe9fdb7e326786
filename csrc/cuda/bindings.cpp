// Private launch ops over the LibTorch stable ABI: tensors to pointers, nothing else. A stream comes as the number that
// torch gives it, so that no header of a CUDA build of torch is needed; what to launch is decided in Python
// (smoothie_kernels/backends/cuda.py), where all tensors are allocated too.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "../torch_tensors.h"
#include "launchers.h"

#ifdef SMOOTHIE_EMULATED
#define SMOOTHIE_DISPATCH_KEY CPU
#else
#define SMOOTHIE_DISPATCH_KEY CUDA
#endif

namespace {

using smoothie::pointer;
using smoothie::pointer_or_null;
using smoothie::cuda::StepParams;
using smoothie::cuda::Type;
using smoothie::hopper::Stream;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A kernel goes to the current device, which need not be that of the tensors.
#ifdef SMOOTHIE_EMULATED
struct DeviceOf {
  explicit DeviceOf(const Tensor&) {}
};
#else
struct DeviceOf : torch::stable::accelerator::DeviceGuard {
  explicit DeviceOf(const Tensor& t) : DeviceGuard(t.get_device_index()) {}
};
#endif

void check(const char* wrong, const char* op) {
  STD_TORCH_CHECK(wrong == nullptr, "smoothie_kernels_cuda::", op, ": ", wrong);
}

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be bfloat16 or float16");
  }
}

// Kernels read eight numbers at once, and boxes begin at multiples of 16 bytes.
Type type_of_rows(const Tensor& t, const char* name) {
  const Type type = type_of(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) % 8 == 0, name, " must have rows of a multiple of 8 numbers");
  STD_TORCH_CHECK(t.size(1) == 0 || t.stride(1) == 1, name, " must have rows without gaps");
  STD_TORCH_CHECK(t.stride(0) % 8 == 0, name, " must have rows a multiple of 8 numbers apart, not ", t.stride(0));
  STD_TORCH_CHECK(uintptr_t(t.data_ptr()) % 16 == 0, name, " must begin at a multiple of 16 bytes");
  return type;
}

Type type_of_x(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  return type_of_rows(x, "x");
}

Type type_of_both(const Tensor& x, const Tensor& embeddings) {
  const Type type = type_of_x(x);
  STD_TORCH_CHECK(type_of_rows(embeddings, "embeddings") == type, "x and embeddings must be of one type");
  STD_TORCH_CHECK(embeddings.size(1) == x.size(1), "x and embeddings must have rows of one width");
  return type;
}

float inverse_variance(double sigma_min) { return float(1 / (sigma_min * sigma_min)); }

StepParams inputs(const Tensor& x, const Tensor& embeddings, const Tensor& bias, const std::optional<Tensor>& mu,
                  const std::optional<Tensor>& std, const std::optional<Tensor>& row_ids, int64_t row_offset,
                  const std::optional<Tensor>& fields, const std::optional<Tensor>& ref_score,
                  const std::optional<Tensor>& highest, double sigma_min) {
  StepParams p{};
  p.type = type_of_both(x, embeddings);
  p.x = pointer<void>(x), p.table = pointer<void>(embeddings), p.bias = pointer<float>(bias);
  p.n_rows = x.size(0), p.width = int(x.size(1)), p.table_stride = embeddings.stride(0);
  p.mu = pointer_or_null<float>(mu), p.std = pointer_or_null<float>(std);
  p.row_ids = pointer_or_null<int64_t>(row_ids), p.row_offset = uint32_t(row_offset);
  p.fields = pointer_or_null<smoothie::NoiseField>(fields), p.n_fields = fields ? int(fields->size(0)) : 0;
  p.ref_score = pointer_or_null<float>(ref_score), p.highest = pointer_or_null<float>(highest);
  p.inverse_variance = inverse_variance(sigma_min);
  return p;
}

void prepare(Tensor x, std::optional<Tensor> std, Tensor seed, Tensor offsets, std::optional<Tensor> field_weights,
             double headroom, Tensor ref_score, Tensor highest, Tensor fields, int64_t stream) {
  static_assert(sizeof(smoothie::NoiseField) == 3 * sizeof(int32_t), "fields is int32 [F, 3]");
  smoothie::cuda::PrepareParams p{};
  p.type = type_of_x(x);
  p.x = pointer<void>(x), p.std = pointer_or_null<float>(std);
  p.seed = pointer<int64_t>(seed), p.offsets = pointer<int64_t>(offsets);
  p.field_weights = pointer_or_null<float>(field_weights);
  p.n_rows = x.size(0), p.width = int(x.size(1)), p.n_fields = int(offsets.size(0));
  p.headroom = float(headroom);
  p.ref_score = pointer<float>(ref_score), p.highest = pointer<float>(highest);
  p.fields = pointer<smoothie::NoiseField>(fields);
  const DeviceOf device(x);
  check(smoothie::cuda::prepare(p, Stream(stream)), "prepare");
}

void score(int64_t mode, Tensor x, Tensor embeddings, Tensor bias, std::optional<Tensor> mu, std::optional<Tensor> std,
           std::optional<Tensor> row_ids, int64_t row_offset, std::optional<Tensor> fields,
           std::optional<Tensor> ref_score, std::optional<Tensor> highest, double sigma_min, int64_t first_token,
           int64_t end_token, int64_t parts, int64_t chunks, int64_t resident, int64_t cluster,
           std::optional<Tensor> numbers, std::optional<Tensor> tokens, std::optional<Tensor> weights,
           std::optional<Tensor> keys, int64_t stream) {
  StepParams p = inputs(x, embeddings, bias, mu, std, row_ids, row_offset, fields, ref_score, highest, sigma_min);
  p.first_token = int(first_token), p.end_token = int(end_token);
  p.parts = int(parts), p.chunks = int(chunks), p.resident = int(resident), p.cluster = int(cluster);
  p.numbers = pointer_or_null<float>(numbers), p.tokens = pointer_or_null<int32_t>(tokens);
  p.weights = pointer_or_null<void>(weights), p.keys = pointer_or_null<int64_t>(keys);
  STD_TORCH_CHECK(!weights || type_of(*weights, "weights") == p.type, "weights must be of the type of x");
  if (weights) p.weights_stride = weights->stride(0);
  if (keys && keys->dim() == 2) p.weights_stride = keys->stride(0);
  const DeviceOf device(x);
  check(smoothie::cuda::score(smoothie::cuda::Mode(mode), p, Stream(stream)), "score");
}

void narrow(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, std::optional<Tensor> std,
            std::optional<Tensor> row_ids, int64_t row_offset, Tensor fields, Tensor ref_score, Tensor highest,
            double sigma_min, int64_t chunks, int64_t cluster, Tensor numbers, Tensor tokens, Tensor acc,
            int64_t stream) {
  StepParams p = inputs(x, embeddings, bias, mu, std, row_ids, row_offset, fields, ref_score, highest, sigma_min);
  p.end_token = int(embeddings.size(0));
  p.parts = p.chunks = int(chunks), p.cluster = int(cluster);
  p.numbers = pointer<float>(numbers), p.tokens = pointer<int32_t>(tokens), p.acc = pointer<float>(acc);
  const DeviceOf device(x);
  check(smoothie::cuda::narrow(p, Stream(stream)), "narrow");
}

void stream(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, std::optional<Tensor> std,
            std::optional<Tensor> row_ids, int64_t row_offset, Tensor fields, Tensor ref_score, Tensor highest,
            double sigma_min, int64_t chunks, std::optional<Tensor> only, Tensor numbers, Tensor tokens,
            std::optional<Tensor> acc, int64_t stream) {
  StepParams p = inputs(x, embeddings, bias, mu, std, row_ids, row_offset, fields, ref_score, highest, sigma_min);
  p.end_token = int(embeddings.size(0));
  p.parts = p.chunks = int(chunks), p.cluster = 1;
  p.only = pointer_or_null<bool>(only);
  p.numbers = pointer<float>(numbers), p.tokens = pointer<int32_t>(tokens), p.acc = pointer_or_null<float>(acc);
  const DeviceOf device(x);
  check(smoothie::cuda::stream(p, Stream(stream)), "stream");
}

void merge(Tensor x, Tensor embeddings, Tensor mu, Tensor ref_score, Tensor highest, double sigma_min, double lowest,
           double highest_fit, Tensor numbers, Tensor tokens, std::optional<Tensor> acc, std::optional<Tensor> only,
           std::optional<Tensor> smoothed, Tensor nearest, Tensor noisy, Tensor lse, Tensor best_score, Tensor log_sum,
           Tensor best_logit, std::optional<Tensor> far, int64_t stream) {
  smoothie::cuda::MergeParams p{};
  p.type = type_of_both(x, embeddings);
  p.x = pointer<void>(x), p.table = pointer<void>(embeddings);
  p.n_rows = x.size(0), p.width = int(x.size(1)), p.table_stride = embeddings.stride(0);
  p.mu = pointer<float>(mu), p.ref_score = pointer<float>(ref_score), p.highest = pointer<float>(highest);
  p.inverse_variance = inverse_variance(sigma_min), p.lowest = float(lowest), p.highest_fit = float(highest_fit);
  p.numbers = pointer<float>(numbers), p.tokens = pointer<int32_t>(tokens), p.chunks = int(numbers.size(1));
  p.acc = pointer_or_null<float>(acc), p.sums = acc ? int(acc->size(0)) : 0;
  p.only = pointer_or_null<bool>(only);
  STD_TORCH_CHECK(!smoothed || type_of(*smoothed, "smoothed") == p.type, "smoothed must be of the type of x");
  p.smoothed = pointer_or_null<void>(smoothed);
  p.nearest = pointer<int64_t>(nearest), p.noisy = pointer<int64_t>(noisy);
  p.lse = pointer<float>(lse), p.best_score = pointer<float>(best_score), p.log_sum = pointer<float>(log_sum);
  p.best_logit = pointer<float>(best_logit), p.far = pointer_or_null<bool>(far);
  const DeviceOf device(x);
  check(smoothie::cuda::merge(p, Stream(stream)), "merge");
}

void nearest(Tensor x, Tensor embeddings, Tensor numbers, Tensor tokens, Tensor nearest, Tensor distance,
             int64_t stream) {
  smoothie::cuda::NearestParams p{};
  p.type = type_of_both(x, embeddings);
  p.x = pointer<void>(x), p.table = pointer<void>(embeddings);
  p.n_rows = x.size(0), p.width = int(x.size(1)), p.table_stride = embeddings.stride(0);
  p.numbers = pointer<float>(numbers), p.tokens = pointer<int32_t>(tokens), p.chunks = int(numbers.size(1));
  p.nearest = pointer<int64_t>(nearest), p.distance = pointer<float>(distance);
  const DeviceOf device(x);
  check(smoothie::cuda::nearest(p, Stream(stream)), "nearest");
}

void gaussian(std::optional<Tensor> row_ids, int64_t row_offset, Tensor seed, Tensor offset, Tensor out,
              int64_t stream) {
  smoothie::cuda::GaussianParams p{};
  p.row_ids = pointer_or_null<int64_t>(row_ids), p.row_offset = uint32_t(row_offset);
  p.seed = pointer<int64_t>(seed), p.offset = pointer<int64_t>(offset);
  p.n_rows = out.size(0), p.columns = out.size(1), p.out = pointer<float>(out);
  const DeviceOf device(out);
  check(smoothie::cuda::gaussian(p, Stream(stream)), "gaussian");
}

void column_bias(Tensor embeddings, Tensor bias, int64_t stream) {
  smoothie::cuda::BiasParams p{};
  p.type = type_of_rows(embeddings, "embeddings");
  p.table = pointer<void>(embeddings), p.n_rows = embeddings.size(0), p.stride = embeddings.stride(0);
  p.width = int(embeddings.size(1)), p.bias = pointer<float>(bias);
  const DeviceOf device(embeddings);
  check(smoothie::cuda::column_bias(p, Stream(stream)), "column_bias");
}

}  // namespace

STABLE_TORCH_LIBRARY(smoothie_kernels_cuda, m) {
  m.def(
      "prepare(Tensor x, Tensor? std, Tensor seed, Tensor offsets, Tensor? field_weights, float headroom, "
      "Tensor(a!) ref_score, Tensor(b!) highest, Tensor(c!) fields, int stream) -> ()");
  m.def(
      "score(int mode, Tensor x, Tensor embeddings, Tensor bias, Tensor? mu, Tensor? std, Tensor? row_ids, "
      "int row_offset, Tensor? fields, Tensor? ref_score, Tensor? highest, float sigma_min, int first_token, "
      "int end_token, int parts, int chunks, int resident, int cluster, Tensor(a!)? numbers, Tensor(b!)? tokens, "
      "Tensor(c!)? weights, Tensor(d!)? keys, int stream) -> ()");
  m.def(
      "narrow(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, Tensor? std, Tensor? row_ids, int row_offset, "
      "Tensor fields, Tensor ref_score, Tensor highest, float sigma_min, int chunks, int cluster, "
      "Tensor(a!) numbers, Tensor(b!) tokens, Tensor(c!) acc, int stream) -> ()");
  m.def(
      "stream(Tensor x, Tensor embeddings, Tensor bias, Tensor mu, Tensor? std, Tensor? row_ids, int row_offset, "
      "Tensor fields, Tensor ref_score, Tensor highest, float sigma_min, int chunks, Tensor? only, "
      "Tensor(a!) numbers, Tensor(b!) tokens, Tensor(c!)? acc, int stream) -> ()");
  m.def(
      "merge(Tensor x, Tensor embeddings, Tensor mu, Tensor ref_score, Tensor highest, float sigma_min, float lowest, "
      "float highest_fit, Tensor numbers, Tensor tokens, Tensor? acc, Tensor? only, Tensor(a!)? smoothed, "
      "Tensor(b!) nearest, Tensor(c!) noisy, Tensor(d!) lse, Tensor(e!) best_score, Tensor(f!) log_sum, "
      "Tensor(g!) best_logit, Tensor(h!)? far, int stream) -> ()");
  m.def(
      "nearest(Tensor x, Tensor embeddings, Tensor numbers, Tensor tokens, Tensor(a!) nearest, Tensor(b!) distance, "
      "int stream) -> ()");
  m.def("gaussian(Tensor? row_ids, int row_offset, Tensor seed, Tensor offset, Tensor(a!) out, int stream) -> ()");
  m.def("column_bias(Tensor embeddings, Tensor(a!) bias, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(smoothie_kernels_cuda, SMOOTHIE_DISPATCH_KEY, m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("score", TORCH_BOX(&score));
  m.impl("narrow", TORCH_BOX(&narrow));
  m.impl("stream", TORCH_BOX(&stream));
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("gaussian", TORCH_BOX(&gaussian));
  m.impl("column_bias", TORCH_BOX(&column_bias));
}
