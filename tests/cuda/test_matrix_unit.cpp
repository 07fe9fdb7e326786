// The matrix units' arithmetic, bit for bit, against its definition in exact integers (emulator/matrix_unit.h).
#include <algorithm>
#include <limits>

#include "emulator/matrix_unit.h"
#include "testing.h"

namespace {

using namespace smoothie::hopper;
using namespace smoothie::emulator;

constexpr int kColumns = 128;
const float kInfinity = std::numeric_limits<float>::infinity();

int exponent_of(double x, int min_exponent) { return std::max(std::ilogb(x), min_exponent); }

// c + a . b, b's numbers kColumns apart. Slow: each term by ldexp, the sum in an integer, bits dropped one by one.
float defined(float c, const float* a, const float* b, bool half, int extra_bits) {
  double plain = c;  // says which infinity, or NaN
  bool finite = std::isfinite(c);
  for (int k = 0; k < kDepth; ++k) {
    plain += double(a[k]) * double(b[k * kColumns]);
    finite &= std::isfinite(a[k]) && std::isfinite(b[k * kColumns]);
  }
  if (!finite) return std::isnan(plain) ? float_of(0x7FFFFFFF) : float(plain);

  int largest = -126;
  const int min_exponent = half ? -14 : -126;
  if (c != 0.0f) largest = std::max(largest, exponent_of(c, -126));
  for (int k = 0; k < kDepth; ++k)
    if (a[k] != 0.0f && b[k * kColumns] != 0.0f)
      largest = std::max(largest, exponent_of(a[k], min_exponent) + exponent_of(b[k * kColumns], min_exponent));

  int exponent = largest - 23 - extra_bits;  // of the last bit
  int64_t sum = int64_t(std::ldexp(double(c), -exponent));
  for (int k = 0; k < kDepth; ++k) sum += int64_t(std::ldexp(double(a[k]) * double(b[k * kColumns]), -exponent));
  uint64_t magnitude = uint64_t(sum < 0 ? -sum : sum);
  for (; magnitude >= 1u << 24 || (exponent < -149 && magnitude); ++exponent) magnitude >>= 1;
  const double result = std::ldexp(double(magnitude), exponent);
  return std::copysign(result >= 0x1p128 ? kInfinity : float(result), sum < 0 && magnitude ? -1.0f : 1.0f);
}

// --- Numbers of many kinds

enum Kind { kNormal, kAnyFinite, kAny, kCancelling, kOneLarge, kTiny, kHuge, kSparse, kKinds };

template <class T>
float number(Kind kind, std::mt19937& random) {
  constexpr bool half = std::is_same_v<T, Half>;
  std::normal_distribution<float> normal;
  T to;
  switch (kind) {
    case kAnyFinite:
      do to.bits = uint16_t(random());
      while (!std::isfinite(widen(to)));
      return widen(to);
    case kAny:  // one in 32 infinite or NaN
      to.bits = uint16_t(random());
      if (random() % 32 == 0) narrow(random() % 2 ? NAN : random() % 2 ? kInfinity : -kInfinity, to);
      return widen(to);
    case kOneLarge: narrow(std::ldexp(normal(random), random() % 16 ? -8 : 3), to); return widen(to);
    case kTiny: narrow(std::ldexp(normal(random), (half ? -10 : -60) - int(random() % 20)), to); return widen(to);
    case kHuge: narrow(std::ldexp(normal(random), half ? 12 : 62), to); return widen(to);
    case kSparse: narrow(random() % 4 ? std::copysign(0.0f, normal(random)) : normal(random), to); return widen(to);
    default: narrow(normal(random), to); return widen(to);
  }
}

float old_sum(Kind kind, std::mt19937& random) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case kAnyFinite:
    case kAny: {
      const float any = float_of(uint32_t(random()));
      return kind == kAny || std::isfinite(any) ? any : 0.0f;
    }
    case kOneLarge: return std::ldexp(normal(random), int(random() % 32));
    case kTiny: return random() % 2 ? std::ldexp(normal(random), -125 - int(random() % 25)) : 0.0f;
    case kHuge: return std::ldexp(normal(random), 125);
    case kSparse: return std::copysign(0.0f, normal(random));
    default: return normal(random);
  }
}

template <class T>
void test_against_definition() {
  const bool half = std::is_same_v<T, Half>;
  std::mt19937 random(7);
  static Operand<16, kDepth> a;
  static Operand<kDepth, kColumns> b;
  static float sums[16][kColumns], old[16][kColumns];
  for (int kind = 0; kind < kKinds; ++kind)
    for (int extra_bits = kMinExtraBits; extra_bits <= kMaxExtraBits; ++extra_bits)
      for (bool add : {false, true}) {
        context = std::string("matrix unit, ") + (half ? "half" : "bfloat16") + ", kind " + std::to_string(kind) +
                  ", extra bits " + std::to_string(extra_bits) + (add ? ", add" : "");
        for (int k = 0; k < kDepth; ++k) {
          for (auto& row : a.values) row[k] = number<T>(Kind(kind), random);
          for (auto& to : b.values[k]) to = number<T>(Kind(kind), random);
        }
        for (auto& row : sums)
          for (float& to : row) to = old_sum(Kind(kind), random);
        if (kind == kCancelling)  // three of four pairs of products, exactly
          for (int k = 1; k < kDepth - 1; k += 2) {
            for (auto& row : a.values) row[k] = random() % 4 ? -row[k - 1] : row[k];
            std::copy_n(b.values[k - 1], kColumns, b.values[k]);
          }
        std::memcpy(old, sums, sizeof sums);
        a.find_exponents(half), b.find_exponents(half);
        multiply_and_add(sums[0], a, b, add, extra_bits);
        for (int r = 0; r < 16; ++r)
          for (int c = 0; c < kColumns; ++c) {
            const float wanted = defined(add ? old[r][c] : 0.0f, a.values[r], &b.values[0][c], half, extra_bits);
            CHECK_EQUAL(bits_of(sums[r][c]), bits_of(wanted));
          }
      }
}

// One sum of c and n products x * y.
float sum_of(float c, int n, float x, float y, int extra_bits, float first_x = 0.0f, float first_y = 0.0f) {
  static Operand<16, kDepth> a;
  static Operand<kDepth, kColumns> b;
  static float sums[16][kColumns];
  for (int k = 0; k < kDepth; ++k) a.values[0][k] = k < n ? x : 0.0f, b.values[k][0] = k < n ? y : 0.0f;
  if (first_x != 0.0f) a.values[0][kDepth - 1] = first_x, b.values[kDepth - 1][0] = first_y;
  a.find_exponents(false), b.find_exponents(false);
  sums[0][0] = c;
  multiply_and_add(sums[0], a, b, true, extra_bits);
  return sums[0][0];
}

void test_known_sums() {
  context = "known sums";
  const auto check_sum = [](float got, float wanted) { CHECK_EQUAL(bits_of(got), bits_of(wanted)); };
  // 1.5 * 1.5 is aligned by the exponent 0, not by the 1 of 2.25: terms of 2^-25 are kept.
  check_sum(sum_of(0.0f, 8, 1.0f, 0x1p-25f, 2, 1.5f, 1.5f), 2.25f + 0x1p-22f);
  // The largest significands: 16 terms that fill 32 bits.
  check_sum(sum_of(0.0f, 16, 255.0f, 255.0f, 3), 16 * 65025.0f);
  check_sum(sum_of(-255.0f, 16, -255.0f, 255.0f, 3), -16 * 65025.0f - 255.0f);
  // Subnormal sums, and one below them.
  check_sum(sum_of(0.0f, 1, 0x1p-75f, -0x1p-74f, 2), -0x1p-149f);
  check_sum(sum_of(0.0f, 3, 0x1p-75f, 0x1p-75f, 2), 0x1p-149f);
  check_sum(sum_of(0.0f, 1, 0x1p-75f, -0x1p-75f, 2), 0.0f);
  check_sum(sum_of(-0.0f, 1, 0.0f, -1.0f, 2), 0.0f);
  // The largest number, and beyond it.
  const float most = std::numeric_limits<float>::max();
  check_sum(sum_of(most, 1, 0x1p100f, 1.0f, 2), most);
  check_sum(sum_of(most, 1, 0x1p104f, 1.0f, 2), kInfinity);
  check_sum(sum_of(-most, 16, 0x1p102f, -1.0f, 2), -kInfinity);
  // Infinity and NaN.
  check_sum(sum_of(1.0f, 1, kInfinity, -1.0f, 2), -kInfinity);
  check_sum(sum_of(1.0f, 1, kInfinity, 0.0f, 2), float_of(0x7FFFFFFF));
  check_sum(sum_of(kInfinity, 1, kInfinity, -1.0f, 2), float_of(0x7FFFFFFF));
  check_sum(sum_of(NAN, 1, 1.0f, 1.0f, 2), float_of(0x7FFFFFFF));
}

// Products of small integers are exact, and so are their sums up to 2^24.
template <class T>
void test_integers() {
  context = "integers";
  std::mt19937 random(8);
  static Operand<16, kDepth> a;
  static Operand<kDepth, kColumns> b;
  for (int extra_bits = kMinExtraBits; extra_bits <= kMaxExtraBits; ++extra_bits) {
    static float sums[16][kColumns];
    static int wanted[16][kColumns];
    std::memset(wanted, 0, sizeof wanted);
    for (int step = 0; step < 64; ++step) {
      for (auto& to : a.values)
        for (float& x : to) x = float(int(random() % 17) - 8);
      for (auto& to : b.values)
        for (float& x : to) x = float(int(random() % 17) - 8);
      a.find_exponents(std::is_same_v<T, Half>), b.find_exponents(std::is_same_v<T, Half>);
      multiply_and_add(sums[0], a, b, step != 0, extra_bits);
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < kColumns; ++c)
          for (int k = 0; k < kDepth; ++k) wanted[r][c] += int(a.values[r][k]) * int(b.values[k][c]);
    }
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < kColumns; ++c) CHECK_EQUAL(sums[r][c], float(wanted[r][c]));
  }
}

// --- The setting, through a kernel: thread 0 has 1 + terms * term

struct TermsParams {
  int terms;
  float one, term;  // a's numbers, b's
  float* out;
};

__global__ void add_terms(const TermsParams p) {
  uint8_t* const bytes = shared_memory();
  for (int i = int(threadIdx.x) * 16; i < 8192 + 4096; i += 128 * 16) std::memset(bytes + i, 0, 16);
  __syncthreads();
  if (threadIdx.x < 2)  // row 0 of a, and of b
    for (int k = 0; k < p.terms; ++k) {
      BFloat16 to;
      narrow(threadIdx.x ? p.term : p.one, to);
      std::memcpy(bytes + threadIdx.x * 8192 + k * 2, &to, 2);
    }
  stores_before_products();
  __syncthreads();
  float sums[16] = {};
  if (threadIdx.x == 0) sums[0] = 1.0f;
  products_begin();
  multiply_64x32<BFloat16, false>(sums, matrix_at(address_of(bytes)), matrix_at(address_of(bytes + 8192)), true);
  products_commit();
  products_wait_for(sums);
  if (threadIdx.x == 0) *p.out = sums[0];
}

void test_setting() {
  const auto run = [](const char* extra_bits, int terms, float one, float term) {
    context = std::string("extra bits ") + (extra_bits ? extra_bits : "unset");
    extra_bits ? setenv(kExtraBitsName, extra_bits, 1) : unsetenv(kExtraBitsName);
    float out = NAN;
    CHECK_NO_ERROR(launch(add_terms, {1, 1, 128, 1, 8192 + 4096}, nullptr, {terms, one, term, &out}));
    unsetenv(kExtraBitsName);
    return out;
  };
  const struct {
    const char* extra_bits;
    int kept;
  } settings[] = {{"1", 1}, {"2", 2}, {"3", 3}, {nullptr, 2}};
  for (const auto& s : settings)
    for (int bits = 1; bits <= 4; ++bits) {  // 2^bits terms of 2^-(23 + bits) are one step of 1, where they are kept
      const float found = run(s.extra_bits, 1 << bits, 1.0f, std::ldexp(1.0f, -23 - bits));
      CHECK_EQUAL(found, bits <= s.kept ? 1 + 0x1p-23f : 1.0f);
    }
  // Lost terms of either sign, and a sum that is truncated.
  CHECK_EQUAL(run("2", 1, 1.0f, 0x1p-24f), 1.0f);
  CHECK_EQUAL(run("2", 1, 1.0f, -0x1p-24f), 1 - 0x1p-24f);
  CHECK_EQUAL(run("2", 1, 1.0f, -0x1p-26f), 1.0f);
  for (const char* wrong : {"0", "4", "-1", "two"}) {
    setenv(kExtraBitsName, wrong, 1);
    float out;
    CHECK_ERROR(launch(add_terms, {1, 1, 128, 1, 8192 + 4096}, nullptr, {1, 1.0f, 1.0f, &out}), "is not 1 to 3");
    unsetenv(kExtraBitsName);
  }
}

}  // namespace

void test_matrix_unit() {
  test_against_definition<BFloat16>();
  test_against_definition<Half>();
  test_known_sums();
  test_integers<BFloat16>();
  test_integers<Half>();
  test_setting();
}
