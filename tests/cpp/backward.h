// Gradients against double precision.
#pragma once

#include "common.h"

namespace {

struct Gradients {
  Matrix x;
  std::unique_ptr<float[]> table;  // [V, D]
};

// What comes in, and what the forward left.
struct Backward {
  Matrix grad_smoothed;
  std::unique_ptr<float[]> grad_lse;
  Result forward;

  Backward(const Tier& tier, const Problem& problem, const Case& c)
      : grad_smoothed(c.x_dtype, c.n, c.d, 0, c.shift),
        grad_lse(array<float>(c.n, kNan)),
        forward(run(tier, problem.params, 2)) {
    std::mt19937 random(7);
    grad_smoothed.fill(random, 1.0);
    for (int64_t i = 0; i < c.n; ++i) grad_lse[size_t(i)] = float(i % 5) - 2.0f;
  }
};

enum Parts { kMean = 1, kLse = 2, kX = 4, kTable = 8, kAll = 15 };

Gradients gradients(const Tier& tier, const StepParams& params, const Backward& b, int parts, int n_threads) {
  Gradients r{Matrix(params.smoothed_dtype, params.n_rows, params.width),
              array<float>(params.n_vocab * params.width, kNan)};
  smoothie::StepBwdParams p{};
  static_cast<smoothie::StepInputs&>(p) = params;
  p.smoothed = parts & kMean ? b.forward.smoothed.data : nullptr;
  p.smoothed_dtype = p.grad_x_dtype = params.smoothed_dtype;
  p.noisy_tokens = b.forward.noisy_tokens.get();
  p.best_score = b.forward.best_score.get(), p.log_sum = b.forward.log_sum.get();
  p.grad_smoothed = parts & kMean ? b.grad_smoothed.data : nullptr;
  p.grad_lse = parts & kLse ? b.grad_lse.get() : nullptr;
  p.grad_x = parts & kX ? r.x.data : nullptr;
  p.grad_table = parts & kTable ? r.table.get() : nullptr;
  tier.step_bwd(p, threads(n_threads));
  return r;
}

// A sum in double with the size of its terms and the errors that they bring.
struct Sum {
  double value = 0.0, error = 0.0;
  void add(double term, double size, double relative) { value += term, error += size * relative; }
};

void check_gradients(const Problem& problem, const Backward& b, const Gradients& r, const float* eps, int parts) {
  const StepParams& p = problem.params;
  const int64_t v = p.n_vocab, d = p.width;
  const double rounding = p.smoothed_dtype == DType::kFloat32 ? kEps : half_step(p.smoothed_dtype, 1.0);  // of smoothed
  std::vector<Sum> table(size_t(v * d));
  std::vector<double> e(size_t(v * d), 0.0), logit(size_t(v), 0.0), weight(logit), norm(logit);
  double table2 = 0.0;
  for (int64_t j = 0; j < v; ++j) {
    for (int64_t k = 0; k < d; ++k) {
      e[size_t(j * d + k)] = problem.table.get(j, k);
      norm[size_t(j)] += e[size_t(j * d + k)] * e[size_t(j * d + k)];
    }
    table2 = std::fmax(table2, norm[size_t(j)]);
  }
  for (int64_t i = 0; i < p.n_rows; ++i) {
    const double scale = p.scale[i], std = eps ? p.std[i] : 0.0;
    std::vector<double> x, g;
    double x2 = 0.0, g2 = 0.0, best = -kInfinity, sum = 0.0, delta = 0.0;
    for (int64_t k = 0; k < d; ++k) {
      x.push_back(problem.x.get(i, k)), g.push_back(parts & kMean ? b.grad_smoothed.get(i, k) : 0.0);
      x2 += x.back() * x.back(), g2 += g.back() * g.back();
    }
    const auto dot = [&](const std::vector<double>& a, int64_t j) {
      double s = 0.0;
      for (int64_t k = 0; k < d; ++k) s += a[size_t(k)] * e[size_t(j * d + k)];
      return s;
    };
    for (int64_t j = 0; j < v; ++j) {
      logit[size_t(j)] = scale * (dot(x, j) - norm[size_t(j)] / 2) + (eps ? std * eps[i * v + j] : 0.0);
      best = std::fmax(best, logit[size_t(j)]);
    }
    for (int64_t j = 0; j < v; ++j) sum += weight[size_t(j)] = std::exp(logit[size_t(j)] - best);
    for (int64_t j = 0; j < v; ++j) delta += (weight[size_t(j)] /= sum) * dot(g, j);
    const double relative = 4 * logit_bound(scale, x2, table2, std * loudness(p)) + 8 * kEps,
                 lse = parts & kLse ? b.grad_lse[size_t(i)] : 0;
    std::vector<Sum> row(static_cast<size_t>(d));
    for (int64_t j = 0; j < v; ++j) {
      const double terms = std::sqrt(g2 * table2) * 2 + std::fabs(lse);
      const double ds = scale * weight[size_t(j)] * (dot(g, j) - delta + lse);
      const double size = std::fabs(scale) * weight[size_t(j)] * terms;
      for (int64_t k = 0; k < d; ++k) {
        const double difference = e[size_t(j * d + k)] - x[size_t(k)];
        const double ends = std::fabs(e[size_t(j * d + k)]) + std::fabs(x[size_t(k)]);
        row[size_t(k)].add(ds * difference, size * ends, relative);
        Sum& out = table[size_t(j * d + k)];
        const double mean = weight[size_t(j)] * g[size_t(k)];
        out.add(mean - ds * difference, std::fabs(mean) + size * ends, relative);
        out.error += size * ends * rounding;
      }
    }
    if (!(parts & kX)) continue;
    for (int64_t k = 0; k < d; ++k)
      CHECK_CLOSE(r.x.get(i, k), row[size_t(k)].value,
                  row[size_t(k)].error * (1 + 4 * rounding / kEps * rounding) +
                      half_step(p.smoothed_dtype, row[size_t(k)].value));
  }
  for (int64_t j = 0; parts & kTable && j < v * d; ++j)
    CHECK_CLOSE(r.table[size_t(j)], table[size_t(j)].value, table[size_t(j)].error);
}

void check_same(const Gradients& a, const Gradients& b, int parts) {
  for (int64_t i = 0; parts & kX && i < a.x.rows; ++i)
    for (int64_t d = 0; d < a.x.cols; ++d) CHECK_EQUAL(a.x.get(i, d), b.x.get(i, d));
  for (int64_t i = 0; i < a.x.cols && parts & kTable; ++i) CHECK_EQUAL(a.table[size_t(i)], b.table[size_t(i)]);
}

void test_gradient_case(const Tier& tier, const Case& c, int parts, int n_threads) {
  Problem problem(tier, c);
  StepParams& p = problem.params;
  const auto eps = noise_of(tier, p);
  for (bool noise : {true, false}) {
    context = "gradients, " + name(tier, c, noise) + ", parts " + std::to_string(parts);
    if (!noise) p.std = nullptr;
    const Backward backward(tier, problem, c);
    const Gradients found = gradients(tier, p, backward, parts, n_threads);
    check_gradients(problem, backward, found, noise ? eps.get() : nullptr, parts);
    check_same(found, gradients(tier, p, backward, parts, n_threads), parts);  // every run gives the same bits
  }
}

void test_gradients(const Tier& tier) {
  constexpr int parts[] = {kAll, kMean | kX, kAll, kMean | kTable, kLse | kX, kLse | kTable, kMean | kX | kTable};
  int count = 0;  // the other properties take turns
  for (int64_t n : {1, 2, 5, 17, 33, 70})
    for (int64_t v : {1, 2, 127, 128, 129, 300})
      for (int64_t d : {1, 3, 8, 24, 50}) {
        Case c{n, v, d};
        c.x_dtype = kDTypes[count % 3], c.table_dtype = kDTypes[count / 3 % 3];
        c.gap = count % 4 == 1 ? 5 : 0, c.shift = count % 5 == 2;
        c.row_ids = count % 7 % 3, c.fields = count % 6 == 5 ? 3 : 0, c.wide = count / 9 % 2;
        test_gradient_case(tier, c, parts[count % 7], count % 3 + 1);
        ++count;
      }
  test_gradient_case(tier, {260, 150, 5}, kAll, 3);  // more than one group of rows in `spread`
  // More rows than are packed at once: 32 MiB of 7,000 columns, twice.
  test_gradient_case(tier, {530, 3, 7000}, kAll, 2);
  for (double far : {8.0, 30.0, 200.0}) {
    Case c{21, 200, 8};
    c.far = far;
    test_gradient_case(tier, c, kAll, 2);
  }
}

}  // namespace
