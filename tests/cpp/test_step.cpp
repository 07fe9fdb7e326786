// The CPU kernel without torch: every tier that this processor runs against double precision, on threads of the
// standard library. Buffers have exactly the size that the kernel is told, so that a sanitizer sees what goes past it.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cpu/convert.h"
#include "backward.h"
#include "common.h"

namespace {

// --- The noise field

void philox2x32(uint32_t c0, uint32_t c1, uint32_t key, uint32_t out[2]) {
  for (int round = 0; round < 10; ++round, key += 0x9E3779B9u) {
    const uint64_t product = 0xD256D193ull * c0;
    c0 = uint32_t(product >> 32) ^ key ^ c1;
    c1 = uint32_t(product);
  }
  out[0] = c0, out[1] = c1;
}

double normal(uint32_t row, int64_t column, uint32_t key, uint32_t row_shift) {
  uint32_t words[2];
  philox2x32(uint32_t(column >> 1), row + row_shift, key, words);
  const double radius = std::sqrt(-2.0 * std::log((words[0] + 0.5) * 0x1p-32));
  const double angle = 6.283185307179586 * (words[1] + 0.5) * 0x1p-32;
  return radius * (column & 1 ? std::sin(angle) : std::cos(angle));
}

// Known answers of Random123 and of the contract, made outside this package.
void test_known_words() {
  context = "known answers";
  const uint32_t known[][5] = {{0, 0, 0, 4280135257u, 1825639922u},
                               {4294967295u, 4294967295u, 4294967295u, 742351499u, 2874136493u},
                               {608135816u, 2242054355u, 320440878u, 3715948600u, 4129967122u}};
  for (const auto& k : known) {
    uint32_t out[2];
    philox2x32(k[0], k[1], k[2], out);
    CHECK_EQUAL(out[0], k[3]);
    CHECK_EQUAL(out[1], k[4]);
  }
  const struct {
    uint64_t seed, offset;
    uint32_t key, row_shift;
  } keys[] = {{0, 0, 259603315u, 634765841u},
              {1234, 7, 2967580754u, 1406003751u},
              {9223372036854775819ull, 1099511627779ull, 2670014843u, 3983349902u},
              {42, 1, 727298572u, 653733822u}};
  for (const auto& k : keys) {
    const auto got = smoothie::noise_key(k.seed, k.offset);
    CHECK_EQUAL(got.key, k.key);
    CHECK_EQUAL(got.row_shift, k.row_shift);
  }
  CHECK_CLOSE(normal(0, 1, keys[0].key, keys[0].row_shift), 2.0035559015920836, 1e-14);
  CHECK_CLOSE(normal(7, 8, keys[2].key, keys[2].row_shift), -0.42262086940920846, 1e-14);
}

void check_field(const Tier& tier, int64_t n_rows, int64_t n_cols, const int64_t* row_ids, int64_t row_offset,
                 uint32_t key, uint32_t row_shift, int n_threads) {
  const auto out = array<float>(n_rows * n_cols, kNan);
  tier.gaussian(row_ids, row_offset, n_rows, n_cols, key, row_shift, out.get(), threads(n_threads));
  double squares = 0.0;
  for (int64_t i = 0; i < n_rows; ++i)
    for (int64_t j = 0; j < n_cols; ++j) {
      const double wanted = normal(uint32_t(row_ids ? row_ids[i] : row_offset + i), j, key, row_shift);
      const double got = out[size_t(i * n_cols + j)];
      CHECK_CLOSE(got, wanted, 5e-5);
      CHECK_WITHIN(got, -6.77, 6.77);
      squares += (got - wanted) * (got - wanted);
    }
  CHECK_CLOSE(std::sqrt(squares / double(n_rows * n_cols)), 0.0, 2e-6);
}

void test_field(const Tier& tier) {
  for (int64_t n_rows : {1, 3, 17, 40})
    for (int64_t n_cols : {1, 2, 7, 128, 301})
      for (int n_threads : {1, 2, 5}) {
        context = std::string(tier.name) + " field " + std::to_string(n_rows) + "x" + std::to_string(n_cols);
        const auto ids = array<int64_t>(n_rows, 0);
        for (int64_t i = 0; i < n_rows; ++i) ids[size_t(i)] = 4294967295 - 5 * i;
        check_field(tier, n_rows, n_cols, nullptr, 4294967290, 727298572u, 653733822u, n_threads);  // ids wrap
        check_field(tier, n_rows, n_cols, ids.get(), 0, 2670014843u, 3983349902u, n_threads);
      }
  // Philox is a bijection: these rows and pairs of columns were computed back from the words at the ends of Box-Muller.
  context = std::string(tier.name) + " field, extreme words";
  const struct {
    int64_t row, pair;
    int which;
    uint32_t word;
  } extremes[] = {
      {1566426909, 18, 0, 0},           {3497808832, 18, 0, 1},           {2338266124, 1, 0, 2},
      {3350108690, 25, 0, 0x7FFFFFFFu}, {2404839418, 7, 0, 0x80000000u},  {1328524831, 20, 0, 0xFFFFFF00u},
      {979296208, 7, 0, 0xFFFFFFFEu},   {880120149, 31, 0, 0xFFFFFFFFu},  {1948372609, 31, 1, 0},
      {927690083, 25, 1, 0x3FFFFFFFu},  {1810957128, 31, 1, 0x40000000u}, {280503372, 28, 1, 0x7FFFFFFFu},
      {2653966776, 16, 1, 0x80000000u}, {1413550089, 9, 1, 0xBFFFFFFFu},  {3119159646, 21, 1, 0xC0000000u},
      {2361632729, 1, 1, 0xFFFFFFFFu},
  };
  constexpr uint32_t key = 0x53A7;
  std::vector<int64_t> ids;
  for (const auto& e : extremes) {
    uint32_t words[2];
    philox2x32(uint32_t(e.pair), uint32_t(e.row), key, words);
    CHECK_EQUAL(words[e.which], e.word);
    ids.push_back(e.row);
  }
  check_field(tier, int64_t(ids.size()), 64, ids.data(), 0, key, 0, 1);
}

// --- The step

// Row i's largest logits, relative to `reference`: those of their tokens, in order, and none of the others is larger.
void check_top(const Result& r, int64_t i, int64_t k, const std::vector<double>& logit, double reference,
               double bound) {
  std::vector<double> sorted(logit);
  std::sort(sorted.begin(), sorted.end(), std::greater<double>());
  std::vector<char> seen(logit.size(), 0);
  for (int64_t rank = 0; rank < k; ++rank) {
    const float value = r.top_logits[size_t(i * k + rank)];
    const int64_t token = r.top_tokens[size_t(i * k + rank)];
    CHECK_WITHIN(token, 0, double(logit.size() - 1));
    if (failures) return;
    CHECK_EQUAL(seen[size_t(token)], 0);
    seen[size_t(token)] = 1;
    const double wanted = logit[size_t(token)] - reference;
    CHECK_CLOSE(value, wanted, bound + 4 * kEps * std::fabs(wanted));
    CHECK_WITHIN(logit[size_t(token)], sorted[size_t(rank)] - bound, sorted[size_t(rank)] + bound);
    if (rank > 0) {
      const float before = r.top_logits[size_t(i * k + rank - 1)];
      CHECK_EQUAL(before >= value, true);
    }
  }
  if (k > 0) CHECK_EQUAL(r.top_tokens[size_t(i * k)], r.noisy_tokens[size_t(i)]);
}

void check_result(const Problem& problem, const Result& r, const float* eps) {
  const StepParams& p = problem.params;
  double table2 = 0.0, largest = 0.0;  // of the table: norm, entry
  for (int64_t j = 0; j < p.n_vocab; ++j) {
    double sum = 0.0;
    for (int64_t d = 0; d < p.width; ++d) {
      sum += problem.table.get(j, d) * problem.table.get(j, d);
      largest = std::fmax(largest, std::fabs(problem.table.get(j, d)));
    }
    table2 = std::fmax(table2, sum);
  }
  std::vector<double> table(size_t(p.n_vocab * p.width)), score(size_t(p.n_vocab)), logit(score),
      wanted(size_t(p.width));
  for (int64_t j = 0; j < p.n_vocab; ++j)
    for (int64_t d = 0; d < p.width; ++d) table[size_t(j * p.width + d)] = problem.table.get(j, d);
  for (int64_t i = 0; i < p.n_rows; ++i) {
    const double scale = p.scale[i], std = eps ? p.std[i] : 0.0;
    double x2 = 0.0, best_score = -kInfinity, best_logit = -kInfinity;
    std::vector<double> x;
    for (int64_t d = 0; d < p.width; ++d) x.push_back(problem.x.get(i, d)), x2 += x.back() * x.back();
    for (int64_t j = 0; j < p.n_vocab; ++j) {
      double square = 0.0;
      for (int64_t d = 0; d < p.width; ++d) {
        const double difference = x[size_t(d)] - table[size_t(j * p.width + d)];
        square += difference * difference;
      }
      score[size_t(j)] = -square / 2;
      logit[size_t(j)] = scale * score[size_t(j)] + (eps ? std * eps[i * p.n_vocab + j] : 0.0);
      best_score = std::fmax(best_score, score[size_t(j)]);
      best_logit = std::fmax(best_logit, logit[size_t(j)]);
    }
    double sum = 0.0;
    wanted.assign(size_t(p.width), 0.0);
    for (int64_t j = 0; j < p.n_vocab; ++j) {
      const double weight = std::exp(logit[size_t(j)] - best_logit);
      sum += weight;
      for (int64_t d = 0; d < p.width; ++d) wanted[size_t(d)] += weight * table[size_t(j * p.width + d)];
    }
    const double bound = logit_bound(scale, x2, table2, std * loudness(p)), lse = best_logit + std::log(sum);
    const double raw_score = best_score + x2 / 2;  // without the row constant
    CHECK_CLOSE(r.best_score[size_t(i)], raw_score, logit_bound(1, x2, table2, 0.0) + kEps * std::fabs(raw_score));
    CHECK_CLOSE(r.log_sum[size_t(i)], lse - scale * best_score,
                2 * bound + 1e-6 + kEps * std::fabs(lse - scale * best_score));
    CHECK_CLOSE(r.lse[size_t(i)], lse, bound + kEps * (2 * std::fabs(lse) + scale * x2) + 1e-6);
    for (int64_t d = 0; d < p.width; ++d) {
      const double value = wanted[size_t(d)] / sum;
      CHECK_CLOSE(r.smoothed.get(i, d), value, 2 * bound * largest + half_step(p.smoothed_dtype, value));
    }
    CHECK_WITHIN(r.tokens[size_t(i)], 0, double(p.n_vocab - 1));
    CHECK_WITHIN(r.noisy_tokens[size_t(i)], 0, double(p.n_vocab - 1));
    if (failures) return;  // a token outside the table cannot be looked up
    CHECK_CLOSE(score[size_t(r.tokens[size_t(i)])], best_score, logit_bound(1, x2, table2, 0.0));
    CHECK_CLOSE(logit[size_t(r.noisy_tokens[size_t(i)])], best_logit, 2 * bound);
    check_top(r, i, p.topk, logit, scale * best_score, 2 * bound);
  }
}

void check_same(const Problem& problem, const Result& a, const Result& b, double bound) {
  for (int64_t i = 0; i < problem.x.rows; ++i) {
    CHECK_EQUAL(a.tokens[size_t(i)], b.tokens[size_t(i)]);
    CHECK_EQUAL(a.noisy_tokens[size_t(i)], b.noisy_tokens[size_t(i)]);
    CHECK_CLOSE(a.lse[size_t(i)], b.lse[size_t(i)], bound * (1 + std::fabs(b.lse[size_t(i)])));
    CHECK_CLOSE(a.best_score[size_t(i)], b.best_score[size_t(i)], bound * (1 + std::fabs(b.best_score[size_t(i)])));
    for (int64_t d = 0; d < problem.x.cols; ++d) {
      const double v = b.smoothed.get(i, d);
      CHECK_CLOSE(a.smoothed.get(i, d), v, bound == 0 ? 0 : bound * 5 + 2 * half_step(a.smoothed.dtype, v));
    }
  }
}

// With noise and without, and the nearest token alone, on several numbers of threads.
void test_case(const Tier& tier, const Case& c, const std::vector<int>& thread_counts) {
  context = name(tier, c, true);
  Problem problem(tier, c);
  StepParams& p = problem.params;
  const auto eps = noise_of(tier, p);
  for (bool noise : {true, false}) {
    context = name(tier, c, noise);
    if (!noise) p.std = nullptr;
    const Result alone = run(tier, p, 1);
    check_result(problem, alone, noise ? eps.get() : nullptr);
    for (int n_threads : thread_counts) {
      const Result shared = run(tier, p, n_threads);
      check_same(problem, shared, alone, 1e-6);
      check_same(problem, run(tier, p, n_threads), shared, 0);  // every run gives the same bits
      const int64_t k = p.topk;
      for (int64_t i = 0; i < c.n * k; ++i) {
        CHECK_CLOSE(shared.top_logits[size_t(i)], alone.top_logits[size_t(i)],
                    1e-6 * (1 + std::fabs(alone.top_logits[size_t(i)])));
        CHECK_EQUAL(shared.top_tokens[size_t(i)], alone.top_tokens[size_t(i)]);
      }
      const Result without_mean = run(tier, p, n_threads, false);
      for (int64_t i = 0; i < c.n * k; ++i) {
        CHECK_EQUAL(without_mean.top_logits[size_t(i)], shared.top_logits[size_t(i)]);
        CHECK_EQUAL(without_mean.top_tokens[size_t(i)], shared.top_tokens[size_t(i)]);
      }
      for (int64_t i = 0; i < c.n; ++i) CHECK_EQUAL(without_mean.lse[size_t(i)], shared.lse[size_t(i)]);
      p.topk = 0;
      check_same(problem, run(tier, p, n_threads), shared, 0);
      p.topk = k;
    }
  }
  const Result with_logits = run(tier, p, 1);
  p.scale = nullptr;
  for (int n_threads : {1, thread_counts.back()}) {
    const auto tokens = array<int64_t>(c.n, -7);
    const auto distance = array<float>(c.n, kNan);
    p.tokens = tokens.get(), p.distance = distance.get();
    tier.step_fwd(p, threads(n_threads));
    for (int64_t i = 0; i < c.n; ++i) {
      CHECK_EQUAL(tokens[size_t(i)], with_logits.tokens[size_t(i)]);
      if (failures) return;
      double square = 0.0;
      for (int64_t d = 0; d < c.d; ++d) {
        const double difference = problem.x.get(i, d) - problem.table.get(tokens[size_t(i)], d);
        square += difference * difference;
      }
      CHECK_CLOSE(distance[size_t(i)], square, square * kEps);
    }
  }
}

void test_shapes(const Tier& tier) {
  int count = 0;  // the other properties take turns
  for (int64_t n : {1, 3, 17, 33, 70})
    for (int64_t v : {1, 2, 5, 127, 128, 129, 300, 1000})
      for (int64_t d : {1, 3, 8, 24, 50, 64}) {
        Case c{n, v, d};
        c.x_dtype = kDTypes[count % 3], c.table_dtype = kDTypes[count / 3 % 3];
        c.gap = count % 4 == 1 ? 5 : 0, c.shift = count % 5 == 2;
        c.row_ids = count % 7 % 3, c.fields = count % 6 == 5 ? 1 + count % 7 : 0;
        c.wide = count / 9 % 2;
        test_case(tier, c, {count % 2 ? 2 : 5});
        ++count;
      }
  test_case(tier, {257, 260, 5}, {2, 5});  // more than one block of rows
  test_case(tier, {600, 260, 5}, {2, 5});
}

// Logits far from where fp32 exponentials live: rows that are done again. From 1e5 on they are coarser in fp32 than the
// exponential is wide: all that is asked of the result there is to be finite and in the table.
void test_far(const Tier& tier) {
  for (DType dtype : kDTypes)
    for (double far : {8.0, 30.0, 200.0, 1e5, 1e9}) {
      if (dtype == DType::kFloat16 && far > 65504) continue;
      Case c{45, 300, 8, dtype, dtype};
      c.far = far;
      test_case(tier, c, {2, 5});
    }
  for (int fields : {0, 7})  // of seven the largest sum is far below what it could be
    for (double std : {0.0, 3.0, 300.0, 1e4}) {
      Case c{45, 300, 8};
      c.std = std, c.fields = fields;
      test_case(tier, c, {2, 5});
      c.far = 30.0;
      test_case(tier, c, {5});
    }
  Case c{20, 200, 8};
  c.std = 0.1, c.fields = 200;
  test_case(tier, c, {2});
}

// Rows that are not finite leave the others alone, and their tokens are in the table.
void test_not_finite(const Tier& tier) {
  for (float bad : {kNan, kInfinity, -kInfinity, 1e19f, -1e30f})
    for (int n_threads : {1, 5}) {
      context = std::string(tier.name) + " x = " + std::to_string(bad);
      Problem problem(tier, {40, 300, 8});
      const Result clean = run(tier, problem.params, n_threads);
      for (int64_t i = 0; i < 40; i += 13) problem.x.set(i, i % 8, bad);
      const Result r = run(tier, problem.params, n_threads);
      for (int64_t i = 0; i < 40; ++i) {
        CHECK_WITHIN(r.tokens[size_t(i)], 0, 299.0);
        CHECK_WITHIN(r.noisy_tokens[size_t(i)], 0, 299.0);
        const int64_t k = problem.params.topk;
        for (int64_t rank = 0; rank < k; ++rank) CHECK_WITHIN(r.top_tokens[size_t(i * k + rank)], 0, 299.0);
        if (i % 13 == 0) continue;
        CHECK_EQUAL(r.tokens[size_t(i)], clean.tokens[size_t(i)]);
        CHECK_EQUAL(r.noisy_tokens[size_t(i)], clean.noisy_tokens[size_t(i)]);
        CHECK_EQUAL(r.lse[size_t(i)], clean.lse[size_t(i)]);
        for (int64_t d = 0; d < 8; ++d) CHECK_EQUAL(r.smoothed.get(i, d), clean.smoothed.get(i, d));
      }
    }
}

// Equal embeddings: the lowest index wins, in a tile, between tiles and between threads.
void test_ties(const Tier& tier) {
  for (int n_threads : {1, 2, 5})
    for (int64_t period : {1, 7, 140}) {
      context = std::string(tier.name) + " ties, period " + std::to_string(period);
      Problem problem(tier, {37, 700, 11});
      for (int64_t j = period; j < 700; ++j)
        for (int64_t d = 0; d < 11; ++d) problem.table.set(j, d, problem.table.get(j % period, d));
      problem.set_bias(tier);
      problem.params.std = nullptr;
      const Result r = run(tier, problem.params, n_threads);
      for (int64_t i = 0; i < 37; ++i) {
        CHECK_WITHIN(r.tokens[size_t(i)], 0, double(period - 1));
        // Where scale is zero all logits are equal.
        CHECK_EQUAL(r.noisy_tokens[size_t(i)], problem.scale[size_t(i)] == 0.0f ? 0 : r.tokens[size_t(i)]);
        const int64_t k = problem.params.topk;
        for (int64_t rank = 0; rank < k; ++rank) {
          const int64_t token = r.top_tokens[size_t(i * k + rank)], equal = rank < 700 / period ? rank * period : -1;
          if (problem.scale[size_t(i)] == 0.0f)
            CHECK_EQUAL(token, rank);
          else if (equal >= 0)
            CHECK_EQUAL(token, r.tokens[size_t(i)] + equal);
        }
      }
    }
}

// --- Means of a few tokens

void test_average(const Tier& tier) {
  std::mt19937 random(5);
  int count = 0;
  for (int64_t n : {1, 7, 40})
    for (int64_t d : {1, 3, 16, 50, 200, 213})
      for (int64_t k : {1, 2, 9}) {
        const DType table_dtype = kDTypes[count % 3], out_dtype = kDTypes[count / 3 % 3];
        Matrix table(table_dtype, 33, d, count % 4 == 1 ? 5 : 0, count % 5 == 2), out(out_dtype, n, d);
        table.fill(random, 1.0);
        const auto weights = array<float>(n * k, 0.0f);
        const auto tokens = array<int64_t>(n * k, 0);
        for (int64_t i = 0; i < n * k; ++i) {
          weights[size_t(i)] = float(random() % 1000) / 500.0f - 1.0f;
          tokens[size_t(i)] = int64_t(random() % 33);
        }
        const AverageParams p{weights.get(), tokens.get(), table.data, out.data, n, k, d,
                              table.stride,  table_dtype,  out_dtype};
        tier.average(p, threads(1 + count % 3));
        context = std::string(tier.name) + " average, D " + std::to_string(d) + " K " + std::to_string(k);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < d; ++j) {
            double sum = 0.0, size = 0.0;
            for (int64_t q = i * k; q < (i + 1) * k; ++q) {
              const double term = weights[size_t(q)] * table.get(tokens[size_t(q)], j);
              sum += term, size += std::fabs(term);
            }
            CHECK_CLOSE(out.get(i, j), sum, half_step(out_dtype, sum) + double(k + 1) * kEps * size);
          }
        ++count;
      }
}

// --- Rounding

void test_rounding() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (uint32_t h = 0; h < 0x8000u; ++h) {
      context = "rounding, type " + std::to_string(int(dtype)) + ", bits " + std::to_string(h);
      const uint16_t near[6] = {uint16_t(h ? h - 1 : 0), uint16_t(h), uint16_t(h + 1)};
      const double before = decode(dtype, near, 0), low = decode(dtype, near, 1), high = decode(dtype, near, 2);
      uint16_t out[2];  // both with room for fp32: GCC warns of a branch that is not taken
      smoothie::narrow(float(low), dtype, out, 0);
      if (std::isnan(low)) {
        CHECK_EQUAL(std::isnan(decode(dtype, out, 0)), true);
        continue;
      }
      CHECK_EQUAL(out[0], h);
      smoothie::narrow(float(-low), dtype, out, 0);
      CHECK_EQUAL(out[0], (h | 0x8000u));
      if (std::isinf(low)) continue;
      const double next = std::isinf(high) ? low + (low - before) : high;  // beyond the largest: one more step
      const float middle = float((low + next) / 2);                        // exact
      smoothie::narrow(middle, dtype, out, 0);
      CHECK_EQUAL(out[0], h + (h & 1));  // ties to even
      smoothie::narrow(std::nextafter(middle, 0.0f), dtype, out, 0);
      CHECK_EQUAL(out[0], h);
      smoothie::narrow(std::nextafter(middle, kInfinity), dtype, out, 0);
      CHECK_EQUAL(out[0], h + 1);
    }
}

}  // namespace

int main() {
  test_known_words();
  test_rounding();
  for (int i = 0; i < smoothie::kTierCount; ++i) {
    const Tier* tier = smoothie::kTiers[i];
    if (smoothie::find_tier(i) != tier) {
      std::printf("%s: this processor does not run it\n", tier->name);
      continue;
    }
    const int before = failures;
    test_field(*tier);
    test_shapes(*tier);
    test_far(*tier);
    test_not_finite(*tier);
    test_ties(*tier);
    test_average(*tier);
    test_gradients(*tier);
    std::printf("%s: %s\n", tier->name, failures == before ? "passed" : "FAILED");
  }
  context = "find_tier";
  CHECK_EQUAL(smoothie::find_tier(smoothie::kTierCount) == nullptr, true);
  CHECK_EQUAL(smoothie::find_tier(-1) != nullptr, true);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
