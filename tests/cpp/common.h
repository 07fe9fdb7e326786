// What the C++ tests of the CPU kernels share: threads, numbers of the three types, problems, and how the forward is
// called.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/tiers.h"
#include "../../csrc/philox.h"
#include "check.h"

namespace {

using smoothie::AverageParams;
using smoothie::DType;
using smoothie::StepParams;
using smoothie::Threads;
using smoothie::Tier;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr double kEps = 0x1p-24;  // rounding of fp32
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();

#define CHECK_WITHIN(got, low, high) \
  check((got) >= (low) && (got) <= (high), __FILE__, __LINE__, #got, double(got), low, high)

Threads threads(int count) {
  return {count, [](int64_t count, void (*body)(void*, int64_t), void* context) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < count; ++i) others.emplace_back(body, context, i);
            if (count > 0) body(context, 0);
            for (auto& other : others) other.join();
          }};
}

// --- Numbers

double decode(DType dtype, const void* p, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint32_t h = static_cast<const uint16_t*>(p)[i];
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = h << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }
  const int exponent = int(h >> 10 & 31), mantissa = int(h & 1023);
  double v = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) v = mantissa ? kNan : kInfinity;
  return h >> 15 ? -v : v;
}

// Cuts the value to the type: the test's own numbers need not be rounded well, they are read back with decode().
void encode(DType dtype, double value, void* p, int64_t i) {
  const float v = float(value);
  if (dtype == DType::kFloat32) {
    static_cast<float*>(p)[i] = v;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  uint32_t half = bits >> 16;
  if (dtype == DType::kFloat16) {
    const int exponent = int(bits >> 23 & 255) - 112;
    const uint32_t sign = bits >> 16 & 0x8000u;
    half = exponent <= 0 ? sign : sign | uint32_t(exponent) << 10 | (bits >> 13 & 1023);
    if (exponent >= 31) half = sign | 0x7C00u | (std::isnan(v) ? 0x200u : 0u);
  }
  static_cast<uint16_t*>(p)[i] = uint16_t(half);
}

// Half the distance between neighbours of the type at v.
double half_step(DType dtype, double v) {
  if (dtype == DType::kBFloat16) return std::fabs(v) * 0x1p-8;
  if (dtype == DType::kFloat16) return std::fabs(v) * 0x1p-11 + 0x1p-25;
  return std::fabs(v) * kEps;
}

// A matrix in memory of its own exact size, with unit inner stride and NaN between the rows.
struct Matrix {
  DType dtype;
  int64_t rows, cols, stride;
  std::unique_ptr<char[]> memory;
  void* data;

  Matrix(DType dtype, int64_t rows, int64_t cols, int64_t gap = 0, int64_t shift = 0)
      : dtype(dtype), rows(rows), cols(cols), stride(cols + gap) {
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2, count = (rows - 1) * stride + cols;
    memory.reset(new char[size_t((shift + count) * size)]);
    data = memory.get() + shift * size;
    for (int64_t i = 0; i < count; ++i) encode(dtype, kNan, data, i);
  }
  double get(int64_t i, int64_t j) const { return decode(dtype, data, i * stride + j); }
  void set(int64_t i, int64_t j, double v) { encode(dtype, v, data, i * stride + j); }
  void fill(std::mt19937& random, double scale) {
    std::normal_distribution<double> normal(0.0, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) set(i, j, normal(random));
  }
};

template <class T>
std::unique_ptr<T[]> array(int64_t count, T value) {
  std::unique_ptr<T[]> a(new T[size_t(count)]);
  for (int64_t i = 0; i < count; ++i) a[size_t(i)] = value;
  return a;
}

// --- A step
struct Case {
  int64_t n, v, d;
  DType x_dtype = DType::kFloat32, table_dtype = DType::kFloat32;
  int64_t gap = 0, shift = 0;     // between rows of the table; of x and the table, off the alignment of their buffers
  int row_ids = 0;                // 0: row_offset 0, 1: row_offset next to 2^32, 2: ids next to 2^32
  double scale = 0.3, std = 0.5;  // of row 0; other rows have others
  double far = 0.0;               // added to every second row of x
  int fields = 0;                 // of the noise; 0: one as it is
  bool wide = false;              // smoothed and the gradient of x in fp32
};

std::string name(const Tier& tier, const Case& c, bool noise) {
  char text[200];
  std::snprintf(text, sizeof(text), "%s N %d V %d D %d x %d table %d gap %d std %g far %g fields %d%s", tier.name,
                int(c.n), int(c.v), int(c.d), int(c.x_dtype), int(c.table_dtype), int(c.gap), c.std, c.far, c.fields,
                noise ? "" : " no noise");
  return text;
}

struct Problem {
  Matrix x, table;
  std::unique_ptr<float[]> bias, scale, std;
  std::unique_ptr<int64_t[]> row_ids;
  std::vector<smoothie::NoiseField> fields;
  StepParams params{};

  Problem(const Tier& tier, const Case& c)
      : x(c.x_dtype, c.n, c.d, 0, c.shift),
        table(c.table_dtype, c.v, c.d, c.gap, c.shift),
        bias(array<float>(c.v, kNan)),
        scale(array<float>(c.n, kNan)),
        std(array<float>(c.n, kNan)),
        row_ids(array<int64_t>(c.n, 0)) {
    std::mt19937 random(uint32_t(c.n * 1000003 + c.v * 1009 + c.d));
    table.fill(random, 1.0);
    x.fill(random, 1.0);
    for (int64_t i = 1; i < c.n; i += 2)
      for (int64_t j = 0; j < c.d; ++j) x.set(i, j, x.get(i, j) + c.far);
    for (int64_t i = 0; i < c.n; ++i) {
      scale[size_t(i)] = float(i % 5 == 4 ? 0.0 : c.scale * (1.0 + 0.1 * double(i % 7)));
      std[size_t(i)] = float(i % 4 == 3 ? 0.0 : c.std * (1.0 + 0.2 * double(i % 3)));
      row_ids[size_t(i)] = 4294967295 - 3 * i;
    }
    set_bias(tier);
    params.x = x.data, params.x_dtype = c.x_dtype;
    params.table = table.data, params.table_dtype = c.table_dtype, params.table_stride = table.stride;
    params.bias = bias.get(), params.scale = scale.get(), params.std = std.get();
    params.n_rows = c.n, params.n_vocab = c.v, params.width = c.d;
    params.row_offset = c.row_ids == 1 ? 4294967296 - c.n : 0;
    params.row_ids = c.row_ids == 2 ? row_ids.get() : nullptr;
    params.smoothed_dtype = c.wide ? DType::kFloat32 : c.x_dtype;
    params.topk = 1 + (7 * c.n + 3 * c.d) % c.v;
    // Of several, the third has the first one's offset, and the fourth counts nothing.
    constexpr float weights[] = {0.8f, -0.5f, 0.3f, 0.0f, 1.1f};
    for (int f = 0; f < (c.fields ? c.fields : 1); ++f) {
      const auto key = smoothie::noise_key(1234, f == 2 ? 7 : 7 + uint64_t(f) * 0x100000001u);
      fields.push_back({key.key, key.row_shift, c.fields ? weights[f % 5] : 1.0f});
    }
    params.fields = fields.data(), params.n_fields = int64_t(fields.size());
  }
  void set_bias(const Tier& tier) {
    tier.bias(table.data, table.dtype, table.stride, table.rows, table.cols, bias.get(), threads(2));
    for (int64_t j = 0; j < table.rows; ++j) {
      double sum = 0.0;
      for (int64_t d = 0; d < table.cols; ++d) sum -= 0.5 * table.get(j, d) * table.get(j, d);
      CHECK_CLOSE(bias[size_t(j)], sum, std::fabs(sum) * kEps);
    }
  }
};

// The noise, [N, V]: the sum of the fields that `gaussian` gives one by one.
std::unique_ptr<float[]> noise_of(const Tier& tier, const StepParams& p) {
  const int64_t count = p.n_rows * p.n_vocab;
  auto field = array<float>(count, kNan), sum = array<float>(count, 0.0f);
  std::vector<double> exact(size_t(count), 0.0);
  for (int64_t f = 0; f < p.n_fields; ++f) {
    tier.gaussian(p.row_ids, p.row_offset, p.n_rows, p.n_vocab, p.fields[f].key, p.fields[f].row_shift, field.get(),
                  threads(1));
    for (int64_t i = 0; i < count; ++i) exact[size_t(i)] += double(p.fields[f].weight) * field[size_t(i)];
  }
  for (int64_t i = 0; i < count; ++i) sum[size_t(i)] = float(exact[size_t(i)]);
  return sum;
}

// What the noise can be over what one field can be, and so its error.
double loudness(const StepParams& p) {
  double sum = 0.0;
  for (int64_t f = 0; f < p.n_fields; ++f) sum += std::fabs(p.fields[f].weight);
  return sum;
}

struct Result {
  Matrix smoothed;
  std::unique_ptr<int64_t[]> tokens, noisy_tokens;
  std::unique_ptr<float[]> lse, best_score, log_sum;
  std::unique_ptr<float[]> top_logits;
  std::unique_ptr<int64_t[]> top_tokens;
};

Result run(const Tier& tier, StepParams params, int n_threads, bool mean = true) {
  Result r{Matrix(params.smoothed_dtype, params.n_rows, params.width),
           array<int64_t>(params.n_rows, -7),
           array<int64_t>(params.n_rows, -7),
           array<float>(params.n_rows, kNan),
           array<float>(params.n_rows, kNan),
           array<float>(params.n_rows, kNan),
           array<float>(params.n_rows * params.topk, kNan),
           array<int64_t>(params.n_rows * params.topk, -7)};
  params.smoothed = mean ? r.smoothed.data : nullptr;
  params.top_logits = r.top_logits.get(), params.top_tokens = r.top_tokens.get();
  params.tokens = r.tokens.get(), params.noisy_tokens = r.noisy_tokens.get();
  params.lse = r.lse.get(), params.best_score = r.best_score.get(), params.log_sum = r.log_sum.get();
  tier.step_fwd(params, threads(n_threads));
  return r;
}

// fp32 error of a row's logits next to each other: of scale E.x, scale |E|^2 and the noise. What a logit has on
// top of that, the rounding of scale |x|^2, is the same for the whole row.
double logit_bound(double scale, double x2, double table2, double std) {
  return 2 * kEps * (scale * (std::sqrt(x2 * table2) + table2) + 7 * std) + 4e-6 * std + 2 * kEps;
}

}  // namespace
