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

using smoothie::data;
using smoothie::pointer;
using smoothie::rows;
using smoothie::cuda::StepParams;
using smoothie::cuda::Type;
using smoothie::hopper::Stream;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 128;  // tokens that the score kernel writes at a time

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

// Kernels follow pointers on x's device.
bool is_elsewhere(const Tensor& x, const Tensor& t) {
  return t.is_cuda() != x.is_cuda() || t.get_device_index() != x.get_device_index();
}
bool is_elsewhere(const Tensor& x, const std::optional<Tensor>& t) { return t && is_elsewhere(x, *t); }

template <class... Tensors>
void check_devices(const Tensor& x, const Tensors&... others) {
  STD_TORCH_CHECK(!(is_elsewhere(x, others) || ...), "all tensors must be on the device of the first");
}

smoothie::NoiseField* fields_of(const Tensor& fields) {
  static_assert(sizeof(smoothie::NoiseField) == 3 * sizeof(int32_t), "fields is int32 [F, 3]");
  return reinterpret_cast<smoothie::NoiseField*>(pointer<int32_t>(fields, "fields", {fields.size(0), 3}));
}

StepParams inputs(const Tensor& x, const Tensor& embeddings, const Tensor& bias, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& std, const std::optional<Tensor>& row_ids, int64_t row_offset,
                  const std::optional<Tensor>& fields, const std::optional<Tensor>& ref_score,
                  const std::optional<Tensor>& highest) {
  check_devices(x, embeddings, bias, scale, std, row_ids, fields, ref_score, highest);
  StepParams p{};
  const int64_t n = x.size(0), v = embeddings.size(0), d = x.size(1);
  p.type = type_of_both(x, embeddings);
  p.x = data(x, "x", {n, d}), p.table = rows(embeddings, "embeddings", {v, d});
  p.bias = pointer<float>(bias, "bias", {v});
  p.n_rows = n, p.width = int(d), p.table_stride = embeddings.stride(0);
  p.scale = pointer<float>(scale, "scale", {n}), p.std = pointer<float>(std, "std", {n});
  p.row_ids = pointer<int64_t>(row_ids, "row_ids", {n}), p.row_offset = uint32_t(row_offset);
  p.fields = fields ? fields_of(*fields) : nullptr, p.n_fields = fields ? int(fields->size(0)) : 0;
  p.ref_score = pointer<float>(ref_score, "ref_score", {n}), p.highest = pointer<float>(highest, "highest", {n});
  return p;
}

void prepare(Tensor x, std::optional<Tensor> std, Tensor seed, Tensor offsets, std::optional<Tensor> field_weights,
             double headroom, Tensor ref_score, Tensor highest, Tensor fields, int64_t stream) {
  check_devices(x, std, seed, offsets, field_weights, ref_score, highest, fields);
  smoothie::cuda::PrepareParams p{};
  const int64_t n = x.size(0), f = offsets.size(0);
  p.type = type_of_x(x);
  p.x = data(x, "x", {n, x.size(1)}), p.std = pointer<float>(std, "std", {n});
  p.seed = pointer<int64_t>(seed, "seed", {}), p.offsets = pointer<int64_t>(offsets, "offsets", {f});
  p.field_weights = pointer<float>(field_weights, "field_weights", {f});
  p.n_rows = n, p.width = int(x.size(1)), p.n_fields = int(f);
  p.headroom = float(headroom);
  p.ref_score = pointer<float>(ref_score, "ref_score", {n}), p.highest = pointer<float>(highest, "highest", {n});
  STD_TORCH_CHECK(fields.size(0) == f, "fields must have as many rows as offsets");
  p.fields = fields_of(fields);
  const DeviceOf device(x);
  check(smoothie::cuda::prepare(p, Stream(stream)), "prepare");
}

void score(int64_t mode, Tensor x, Tensor embeddings, Tensor bias, std::optional<Tensor> scale,
           std::optional<Tensor> std, std::optional<Tensor> row_ids, int64_t row_offset, std::optional<Tensor> fields,
           std::optional<Tensor> ref_score, std::optional<Tensor> highest, int64_t first_token, int64_t end_token,
           int64_t parts, int64_t chunks, int64_t resident, int64_t cluster, std::optional<Tensor> numbers,
           std::optional<Tensor> tokens, std::optional<Tensor> weights, std::optional<Tensor> keys, int64_t stream) {
  StepParams p = inputs(x, embeddings, bias, scale, std, row_ids, row_offset, fields, ref_score, highest);
  check_devices(x, numbers, tokens, weights, keys);
  const int64_t n = p.n_rows, columns = (end_token - first_token + kTile - 1) / kTile * kTile;
  p.first_token = int(first_token), p.end_token = int(end_token);
  p.parts = int(parts), p.chunks = int(chunks), p.resident = int(resident), p.cluster = int(cluster);
  p.numbers = pointer<float>(numbers, "numbers", {3, chunks, n});
  p.tokens = pointer<int32_t>(tokens, "tokens", {2, chunks, n});
  if (weights) {
    STD_TORCH_CHECK(type_of(*weights, "weights") == p.type, "weights must be of the type of x");
    STD_TORCH_CHECK(weights->size(1) >= columns, "weights must have room for ", columns, " columns");
    const int64_t tall = cluster * kTile;  // rows of a cluster: all of them are written
    p.weights = rows(*weights, "weights", {(n + tall - 1) / tall * tall, weights->size(1)});
    p.weights_stride = weights->stride(0);
  }
  if (keys) {
    STD_TORCH_CHECK(keys->scalar_type() == ScalarType::Long, "keys must be int64");
    if (keys->dim() == 2) {
      STD_TORCH_CHECK(keys->size(1) >= columns, "keys must have room for ", columns, " columns");
      p.keys = static_cast<int64_t*>(rows(*keys, "keys", {n, keys->size(1)})), p.weights_stride = keys->stride(0);
    } else {
      p.keys = pointer<int64_t>(*keys, "keys", {n, parts, keys->size(2), smoothie::cuda::kBucketsOfPart});
    }
  }
  const DeviceOf device(x);
  check(smoothie::cuda::score(smoothie::cuda::Mode(mode), p, Stream(stream)), "score");
}

void narrow(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, std::optional<Tensor> std,
            std::optional<Tensor> row_ids, int64_t row_offset, Tensor fields, Tensor ref_score, Tensor highest,
            int64_t chunks, int64_t cluster, Tensor numbers, Tensor tokens, Tensor acc, int64_t stream) {
  StepParams p = inputs(x, embeddings, bias, scale, std, row_ids, row_offset, fields, ref_score, highest);
  check_devices(x, numbers, tokens, acc);
  p.end_token = int(embeddings.size(0));
  p.parts = p.chunks = int(chunks), p.cluster = int(cluster);
  p.numbers = pointer<float>(numbers, "numbers", {3, chunks, p.n_rows});
  p.tokens = pointer<int32_t>(tokens, "tokens", {2, chunks, p.n_rows});
  p.acc = pointer<float>(acc, "acc", {chunks, p.n_rows, p.width});
  const DeviceOf device(x);
  check(smoothie::cuda::narrow(p, Stream(stream)), "narrow");
}

void stream(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, std::optional<Tensor> std,
            std::optional<Tensor> row_ids, int64_t row_offset, Tensor fields, Tensor ref_score, Tensor highest,
            int64_t chunks, std::optional<Tensor> only, Tensor numbers, Tensor tokens, std::optional<Tensor> acc,
            int64_t stream) {
  StepParams p = inputs(x, embeddings, bias, scale, std, row_ids, row_offset, fields, ref_score, highest);
  check_devices(x, only, numbers, tokens, acc);
  p.end_token = int(embeddings.size(0));
  p.parts = p.chunks = int(chunks), p.cluster = 1;
  p.only = pointer<bool>(only, "only", {p.n_rows});
  p.numbers = pointer<float>(numbers, "numbers", {3, chunks, p.n_rows});
  p.tokens = pointer<int32_t>(tokens, "tokens", {2, chunks, p.n_rows});
  p.acc = pointer<float>(acc, "acc", {chunks, p.n_rows, p.width});
  const DeviceOf device(x);
  check(smoothie::cuda::stream(p, Stream(stream)), "stream");
}

void merge(Tensor x, Tensor embeddings, Tensor scale, Tensor ref_score, Tensor highest, double lowest,
           double highest_fit, Tensor numbers, Tensor tokens, std::optional<Tensor> acc, std::optional<Tensor> only,
           std::optional<Tensor> smoothed, Tensor nearest, Tensor noisy, Tensor lse, Tensor best_score, Tensor log_sum,
           Tensor best_logit, std::optional<Tensor> far, int64_t stream) {
  check_devices(x, embeddings, scale, ref_score, highest, numbers, tokens, acc, only, smoothed, nearest, noisy, lse,
                best_score, log_sum, best_logit, far);
  smoothie::cuda::MergeParams p{};
  const int64_t n = x.size(0), d = x.size(1), chunks = numbers.size(1);
  p.type = type_of_both(x, embeddings);
  p.x = data(x, "x", {n, d}), p.table = rows(embeddings, "embeddings", {embeddings.size(0), d});
  p.n_rows = n, p.width = int(d), p.table_stride = embeddings.stride(0);
  p.scale = pointer<float>(scale, "scale", {n}), p.ref_score = pointer<float>(ref_score, "ref_score", {n});
  p.highest = pointer<float>(highest, "highest", {n});
  p.lowest = float(lowest), p.highest_fit = float(highest_fit);
  p.numbers = pointer<float>(numbers, "numbers", {3, chunks, n});
  p.tokens = pointer<int32_t>(tokens, "tokens", {2, chunks, n}), p.chunks = int(chunks);
  p.sums = acc ? int(acc->size(0)) : 0, p.acc = pointer<float>(acc, "acc", {p.sums, n, d});
  p.only = pointer<bool>(only, "only", {n});
  p.wide = smoothed && smoothed->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(!smoothed || p.wide || type_of(*smoothed, "smoothed") == p.type,
                  "smoothed must be float32 or of the type of x");
  p.smoothed = smoothed ? data(*smoothed, "smoothed", {n, d}) : nullptr;
  p.nearest = pointer<int64_t>(nearest, "nearest", {n}), p.noisy = pointer<int64_t>(noisy, "noisy", {n});
  p.lse = pointer<float>(lse, "lse", {n}), p.best_score = pointer<float>(best_score, "best_score", {n});
  p.log_sum = pointer<float>(log_sum, "log_sum", {n}), p.best_logit = pointer<float>(best_logit, "best_logit", {n});
  p.far = pointer<bool>(far, "far", {n});
  const DeviceOf device(x);
  check(smoothie::cuda::merge(p, Stream(stream)), "merge");
}

void nearest(Tensor x, Tensor embeddings, Tensor numbers, Tensor tokens, Tensor nearest, Tensor distance,
             int64_t stream) {
  check_devices(x, embeddings, numbers, tokens, nearest, distance);
  smoothie::cuda::NearestParams p{};
  const int64_t n = x.size(0), d = x.size(1), chunks = numbers.size(1);
  p.type = type_of_both(x, embeddings);
  p.x = data(x, "x", {n, d}), p.table = rows(embeddings, "embeddings", {embeddings.size(0), d});
  p.n_rows = n, p.width = int(d), p.table_stride = embeddings.stride(0);
  p.numbers = pointer<float>(numbers, "numbers", {1, chunks, n});
  p.tokens = pointer<int32_t>(tokens, "tokens", {1, chunks, n}), p.chunks = int(chunks);
  p.nearest = pointer<int64_t>(nearest, "nearest", {n}), p.distance = pointer<float>(distance, "distance", {n});
  const DeviceOf device(x);
  check(smoothie::cuda::nearest(p, Stream(stream)), "nearest");
}

void gaussian(std::optional<Tensor> row_ids, int64_t row_offset, Tensor seed, Tensor offset, Tensor out,
              int64_t stream) {
  check_devices(out, row_ids, seed, offset);
  smoothie::cuda::GaussianParams p{};
  p.n_rows = out.size(0), p.columns = out.size(1), p.out = pointer<float>(out, "out", {p.n_rows, p.columns});
  p.row_ids = pointer<int64_t>(row_ids, "row_ids", {p.n_rows}), p.row_offset = uint32_t(row_offset);
  p.seed = pointer<int64_t>(seed, "seed", {}), p.offset = pointer<int64_t>(offset, "offset", {});
  const DeviceOf device(out);
  check(smoothie::cuda::gaussian(p, Stream(stream)), "gaussian");
}

}  // namespace

STABLE_TORCH_LIBRARY(smoothie_kernels_cuda, m) {
  m.def(
      "prepare(Tensor x, Tensor? std, Tensor seed, Tensor offsets, Tensor? field_weights, float headroom, "
      "Tensor(a!) ref_score, Tensor(b!) highest, Tensor(c!) fields, int stream) -> ()");
  m.def(
      "score(int mode, Tensor x, Tensor embeddings, Tensor bias, Tensor? scale, Tensor? std, Tensor? row_ids, "
      "int row_offset, Tensor? fields, Tensor? ref_score, Tensor? highest, int first_token, "
      "int end_token, int parts, int chunks, int resident, int cluster, Tensor(a!)? numbers, Tensor(b!)? tokens, "
      "Tensor(c!)? weights, Tensor(d!)? keys, int stream) -> ()");
  m.def(
      "narrow(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, Tensor? std, Tensor? row_ids, int row_offset, "
      "Tensor fields, Tensor ref_score, Tensor highest, int chunks, int cluster, "
      "Tensor(a!) numbers, Tensor(b!) tokens, Tensor(c!) acc, int stream) -> ()");
  m.def(
      "stream(Tensor x, Tensor embeddings, Tensor bias, Tensor scale, Tensor? std, Tensor? row_ids, int row_offset, "
      "Tensor fields, Tensor ref_score, Tensor highest, int chunks, Tensor? only, "
      "Tensor(a!) numbers, Tensor(b!) tokens, Tensor(c!)? acc, int stream) -> ()");
  m.def(
      "merge(Tensor x, Tensor embeddings, Tensor scale, Tensor ref_score, Tensor highest, float lowest, "
      "float highest_fit, Tensor numbers, Tensor tokens, Tensor? acc, Tensor? only, Tensor(a!)? smoothed, "
      "Tensor(b!) nearest, Tensor(c!) noisy, Tensor(d!) lse, Tensor(e!) best_score, Tensor(f!) log_sum, "
      "Tensor(g!) best_logit, Tensor(h!)? far, int stream) -> ()");
  m.def(
      "nearest(Tensor x, Tensor embeddings, Tensor numbers, Tensor tokens, Tensor(a!) nearest, Tensor(b!) distance, "
      "int stream) -> ()");
  m.def("gaussian(Tensor? row_ids, int row_offset, Tensor seed, Tensor offset, Tensor(a!) out, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(smoothie_kernels_cuda, SMOOTHIE_DISPATCH_KEY, m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("score", TORCH_BOX(&score));
  m.impl("narrow", TORCH_BOX(&narrow));
  m.impl("stream", TORCH_BOX(&stream));
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("gaussian", TORCH_BOX(&gaussian));
}
