// What the emulator's tests share: matrices, the product in double precision, faults that must be caught.
#pragma once

#include <launch.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpp/check.h"

void test_pipeline();
void test_transposed();
void test_copies();
void test_matrix_unit();

#define CHECK_ERROR(error, part) check_error(error, part, __FILE__, __LINE__)
#define CHECK_NO_ERROR(error) check_error(error, nullptr, __FILE__, __LINE__)

inline void check_error(const char* error, const char* part, const char* file, int line) {
  ++checks;
  if (part ? error && std::strstr(error, part) : !error) return;
  if (++failures <= 20)
    std::printf("%s:%d: got error \"%s\", wanted \"%s\" (%s)\n", file, line, error ? error : "none",
                part ? part : "none", context.c_str());
}

constexpr const char* kExtraBitsName = "SMOOTHIE_EMULATOR_EXTRA_BITS";

// The order of events of the next launches, and the matrix units' extra bits: each value in turn.
inline void set_seed(int seed) {
  setenv("SMOOTHIE_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
  setenv(kExtraBitsName, std::to_string(1 + seed % 3).c_str(), 1);
}

// In memory of its own exact size, with NaN between the rows.
template <class T>
struct Matrix {
  int64_t rows, columns, stride;
  std::unique_ptr<T[]> memory;
  T* data;

  Matrix(int64_t rows, int64_t columns, int64_t gap, unsigned seed)
      : rows(rows), columns(columns), stride(columns + gap), memory(new T[size_t((rows - 1) * stride + columns + 8)]) {
    data = memory.get();
    while (reinterpret_cast<uintptr_t>(data) % 16) ++data;
    for (int64_t i = 0; i < (rows - 1) * stride + columns; ++i) data[i].bits = 0xFFFF;
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) narrow(uniform(random), data[i * stride + j]);
  }
  double at(int64_t i, int64_t j) const { return i < rows && j < columns ? widen(data[i * stride + j]) : 0.0; }
};

// a [rows x depth] . b [columns x depth]^T
inline std::vector<double> products_of(int64_t rows, int64_t columns, int64_t depth,
                                       const std::function<double(int64_t, int64_t)>& a,
                                       const std::function<double(int64_t, int64_t)>& b) {
  std::vector<double> out(size_t(rows * columns), 0.0), row(size_t(depth), 0.0), right;
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = 0; k < depth; ++k) right.push_back(b(j, k));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) row[size_t(k)] = a(i, k);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < depth; ++k) out[size_t(i * columns + j)] += row[size_t(k)] * right[size_t(j * depth + k)];
  }
  return out;
}

// "" where all is right.
inline std::string compared(const std::vector<float>& out, const std::vector<double>& wanted, double bound,
                            bool shows) {
  bool nan = false, wrong = false;
  for (size_t i = 0; i < out.size(); ++i) {
    if (shows) CHECK_CLOSE(double(out[i]), wanted[i], bound);
    nan |= std::isnan(out[i]);
    wrong |= !(std::fabs(out[i] - wanted[i]) <= bound);
  }
  return nan ? "NaN" : wrong ? "wrong numbers" : "";
}

// A fault must show as one of these words in at least `often` of 40 launches, and as nothing else.
template <class Run>
void expect(const char* name, int often, const std::vector<const char*>& words, Run run) {
  int caught = 0;
  for (int seed = 0; seed < 40; ++seed) {
    set_seed(seed);
    context = name;
    const std::string error = run();
    if (error.empty()) continue;
    ++caught;
    bool known = false;
    for (const char* word : words) known |= error.find(word) != std::string::npos;
    CHECK_NO_ERROR(known ? nullptr : error.c_str());
  }
  std::printf("  %-16s caught in %2d of 40\n", name, caught);
  CHECK_EQUAL(caught >= often, true);
}
