#include "matrix_unit.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"

namespace smoothie {
namespace emulator {
namespace {

constexpr int kSumsMinExponent = -126;
// Exponents that stand for no finite nonzero number; sums of two with one of them are recognised as such.
constexpr int16_t kZero = -5000, kNotFinite = 12000;

void exponents_of(const float* __restrict numbers, int count, int min_exponent, int16_t* __restrict exponents) {
  for (int i = 0; i < count; ++i) {
    const int magnitude = int(bits_of(numbers[i]) & 0x7FFFFFFF);
    const int exponent = std::max((magnitude >> 23) - 127, min_exponent);
    exponents[i] = int16_t(magnitude == 0 ? kZero : magnitude >= 0x7F800000 ? kNotFinite : exponent);
  }
}

float power_of_2(int exponent) { return float_of(uint32_t(127 + exponent) << 23); }

// A number of at least 2^-126, or zero, to 32 bits, towards zero.
float truncated(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits &= ~uint64_t(0) << 29;  // what 32-bit numbers have of the significand
  std::memcpy(&x, &bits, 8);
  return float(x);
}

// One sum by the definition, whatever the numbers are. b: a column, its numbers `stride` apart.
float sum_of(float c, const float* a, const float* b, int stride, int largest, int fraction_bits) {
  const double scale = std::ldexp(1.0, fraction_bits - std::clamp(largest, kSumsMinExponent, 254));
  double sum = std::trunc(double(c) * scale);
  for (int k = 0; k < kDepth; ++k) sum += std::trunc(double(a[k]) * double(b[k * stride]) * scale);
  if (std::isnan(sum)) return float_of(0x7FFFFFFF);
  sum /= scale;
  if (std::fabs(sum) < 0x1p-126) sum = std::trunc(sum * 0x1p149) * 0x1p-149 + 0.0;  // subnormal; no negative zero
  return truncated(sum);
}

constexpr int kPart = 32;                  // sums at a time
constexpr int16_t kMin = -96, kMax = 126;  // largest exponents of sums for which 32-bit numbers do

// Whether 32-bit products and scales are exact for all terms of these sums that are not truncated to zero. A sum that
// has only zeros is moderate.
bool are_moderate(const int16_t (&largest)[kPart]) {
  int16_t immoderate = 0;
  for (int j = 0; j < kPart; ++j)
    immoderate |= int16_t((largest[j] > kMax) | ((largest[j] < kMin) & (largest[j] > kZero + 1000)));
  return !immoderate;
}

// The same for moderate sums, in vectors.
template <int kColumns>
void sum_up(float* __restrict sums, const float* __restrict a, const float* __restrict b,
            const int16_t (&largest)[kPart], int fraction_bits) {
  float scale[kPart], unit[kPart];
  for (int j = 0; j < kPart; ++j) {
    const int exponent = std::max(largest[j], kMin);  // less for zeros alone
    scale[j] = power_of_2(fraction_bits - exponent), unit[j] = power_of_2(exponent - fraction_bits);
  }
  double total[kPart];
  for (int j = 0; j < kPart; ++j) total[j] = int32_t(sums[j] * scale[j]);
  for (int first = 0; first < kDepth; first += 8) {  // 8 terms of less than 2^28 fit into 32 bits
    int32_t eight[kPart] = {};
    for (int k = first; k < first + 8; ++k)
      for (int j = 0; j < kPart; ++j) eight[j] += int32_t(a[k] * b[k * kColumns + j] * scale[j]);
    for (int j = 0; j < kPart; ++j) total[j] += eight[j];
  }
  for (int j = 0; j < kPart; ++j) sums[j] = truncated(total[j] * double(unit[j]));
}

}  // namespace

template <int kRows, int kColumns>
void Operand<kRows, kColumns>::find_exponents(bool half) {
  exponents_of(values[0], kRows * kColumns, half ? -14 : -126, exponents[0]);
}

template <int kColumns>
void multiply_and_add(float* sums, const Operand<16, kDepth>& a, const Operand<kDepth, kColumns>& b, bool add,
                      int extra_bits) {
  const int fraction_bits = 23 + extra_bits;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < kColumns; c += kPart) {
      float* const to = sums + r * kColumns + c;
      if (!add) std::fill_n(to, kPart, 0.0f);
      int16_t largest[kPart];
      exponents_of(to, kPart, kSumsMinExponent, largest);
      for (int k = 0; k < kDepth; ++k)
        for (int j = 0; j < kPart; ++j)
          largest[j] = std::max(largest[j], int16_t(a.exponents[r][k] + b.exponents[k][c + j]));
      const float* columns = &b.values[0][c];
      if (are_moderate(largest))
        sum_up<kColumns>(to, a.values[r], columns, largest, fraction_bits);
      else
        for (int j = 0; j < kPart; ++j)
          to[j] = sum_of(to[j], a.values[r], columns + j, kColumns, largest[j], fraction_bits);
    }
}

template struct Operand<16, kDepth>;
template struct Operand<kDepth, 32>;
template struct Operand<kDepth, 64>;
template struct Operand<kDepth, 128>;
template void multiply_and_add<32>(float*, const Operand<16, kDepth>&, const Operand<kDepth, 32>&, bool, int);
template void multiply_and_add<64>(float*, const Operand<16, kDepth>&, const Operand<kDepth, 64>&, bool, int);
template void multiply_and_add<128>(float*, const Operand<16, kDepth>&, const Operand<kDepth, 128>&, bool, int);

}  // namespace emulator
}  // namespace smoothie
