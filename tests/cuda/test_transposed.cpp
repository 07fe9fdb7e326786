// Transposed operands, operands written by threads, operands in registers.
#include "testing.h"

namespace {

using namespace smoothie::hopper;

// --- Transposed tiles: out = table^T . weights^T, weights written by threads, two buffers in turn

enum Fault { kNone, kNoFence, kFenceTooEarly, kNoBarrier, kWrongCount, kPartOfWarp };

struct TransposedParams {
  TensorMap table;       // [T, D], tiles of 64 x 64
  const float* weights;  // [32, T]
  float *out, *totals;   // [D, 32]; [32] sums of weights
  int tokens;
  Fault fault;
};

constexpr int kTileBytes = 64 * 128, kWeightBytes = 32 * 128;
constexpr size_t kTransposedShared = 2 * kTileBytes + kWeightBytes + 16;

template <class T>
__global__ void transposed(const __grid_constant__ TransposedParams p) {
  uint8_t* const bytes = shared_memory();
  uint8_t* const weights = bytes + 2 * kTileBytes;
  const uint32_t base = address_of(bytes), full = base + 2 * kTileBytes + kWeightBytes;
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    barrier_init(full, 1), barrier_init(full + 8, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (thread >= 128) return;  // a fifth warp, so that barriers of 128 and 160 threads differ
  const int column = 64 * int(blockIdx.x);
  const auto load = [&](int k) {
    if (thread != 0) return;
    barrier_expect(full + 8 * (k & 1), kTileBytes);
    load_box(base + (k & 1) * kTileBytes, &p.table, full + 8 * (k & 1), column, 64 * k);
  };
  float sums[16], total = 0.0f;
  const int chunks = (p.tokens + 63) / 64;
  load(0);
  for (int k = 0; k < chunks; ++k) {
    if (p.fault == kFenceTooEarly) stores_before_products();
    // A warp's threads write a row's 64 numbers in pairs.
    for (int row = thread / 32; row < 32; row += 4) {
      const int at = thread % 32 * 2, token = 64 * k + at;
      const float first = token < p.tokens ? p.weights[row * p.tokens + token] : 0.0f;
      const float second = token + 1 < p.tokens ? p.weights[row * p.tokens + token + 1] : 0.0f;
      const uint32_t pair = pack<T>(first, second);
      std::memcpy(weights + row * 128 + ((at / 8) ^ (row % 8)) * 16 + at % 8 * 2, &pair, 4);
      float both = first + second;
      for (int bits = 16; bits; bits /= 2) both += shuffle_xor(both, bits);
      if (thread % 32 == row / 4) total += both;
    }
    if (p.fault != kNoFence && p.fault != kFenceTooEarly) stores_before_products();
    if (p.fault == kPartOfWarp) {
      if (thread < 112) sync_threads(1, 96);
    } else if (p.fault != kNoBarrier) {
      sync_threads(1, p.fault == kWrongCount ? 160 : 128);
    }
    barrier_wait(full + 8 * (k & 1), k / 2 & 1);
    products_begin();
    const uint64_t a = matrix_at(base + (k & 1) * kTileBytes), b = matrix_at(address_of(weights));
    for (int i = 0; i < 4; ++i) multiply_64x32<T, true>(sums, a + i * kNextRows, b + i * kNextColumns, k || i);
    products_commit();
    if (k + 1 < chunks) load(k + 1);
    products_wait_for(sums);
    sync_threads(2, 128);
  }
  for (int i = 0; i < 16; ++i) p.out[(column + row_of(thread, i)) * 32 + column_of(thread, i)] = sums[i];
  if (blockIdx.x == 0 && thread % 32 < 8) p.totals[thread % 32 * 4 + thread / 32] = total;
}

template <class T>
std::string run_transposed(Fault fault, int64_t tokens, int64_t width, bool shows) {
  const Matrix<T> table(tokens, width, 8, 3), weights(32, tokens, 0, 4);
  std::vector<float> wide(size_t(32 * tokens));
  for (int64_t i = 0; i < 32 * tokens; ++i) wide[size_t(i)] = widen(weights.data[i]);
  const int64_t blocks = (width + 63) / 64;
  std::vector<float> out(size_t(blocks * 64 * 32), NAN), totals(32, NAN);
  TransposedParams p{};
  CHECK_NO_ERROR(describe<T>(&p.table, table.data, tokens, width, table.stride, 64));
  p.weights = wide.data(), p.out = out.data(), p.totals = totals.data(), p.tokens = int(tokens), p.fault = fault;
  if (const char* error = launch(transposed<T>, {int(blocks), 1, 160, 1, kTransposedShared}, nullptr, p)) return error;
  for (int64_t j = 0; j < 32; ++j) {
    double wanted = 0.0;
    for (int64_t t = 0; t < tokens; ++t) wanted += weights.at(j, t);
    if (shows) CHECK_CLOSE(totals[size_t(j)], wanted, 1e-6 * double(tokens));
  }
  const std::vector<double> wanted = products_of(
      blocks * 64, 32, tokens, [&](int64_t i, int64_t t) { return table.at(t, i); },
      [&](int64_t j, int64_t t) { return weights.at(j, t); });
  return compared(out, wanted, 1e-6 * double(tokens), shows);
}

template <class T>
void test_table() {
  for (int64_t tokens : {64, 5, 200, 511})
    for (int64_t width : {64, 8, 136})
      for (int seed = 0; seed < 6; ++seed) {
        set_seed(seed);
        context =
            "transposed, " + std::to_string(tokens) + "x" + std::to_string(width) + ", seed " + std::to_string(seed);
        const std::string error = run_transposed<T>(kNone, tokens, width, true);
        CHECK_NO_ERROR(error.empty() ? nullptr : error.c_str());
      }
}

void test_faults() {
  const auto fault = [](const char* name, Fault fault, int often, std::vector<const char*> words) {
    expect(name, often, words, [=] { return run_transposed<Half>(fault, 320, 64, false); });
  };
  fault("no fence", kNoFence, 40, {"NaN"});
  fault("fence too early", kFenceTooEarly, 30, {"wrong numbers", "NaN"});
  fault("no barrier", kNoBarrier, 15, {"wrong numbers", "NaN"});
  fault("wrong count", kWrongCount, 40, {"deadlock"});
  fault("part of a warp", kPartOfWarp, 40, {"without some threads", "deadlock"});
}

// --- Operands in registers: out = weights . table, 64 x tokens times tokens x 64

struct RegistersParams {
  TensorMap table;
  const float* weights;  // [64, tokens]
  float* out;            // [64, 64]
  int tokens;            // a multiple of 16, at most 64
  bool too_soon;         // overwrites the registers before their products are done
};

template <class T>
__global__ void registers(const __grid_constant__ RegistersParams p) {
  uint8_t* const bytes = shared_memory();
  const uint32_t base = address_of(bytes), full = base + kTileBytes;
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    barrier_init(full, 1);
    barrier_init_done();
    barrier_expect(full, kTileBytes);
    load_box(base, &p.table, full, 0, 0);
  }
  __syncthreads();
  barrier_wait(full, 0);
  float sums[32] = {};
  uint32_t words[4][4];
  for (int k = 0; k < p.tokens / 16; ++k) {
    for (int i = 0; i < 4; ++i) {  // the layout of sums of 16 columns
      const float* from =
          p.weights + row_of(thread, 2 * (i % 2)) * p.tokens + 16 * k + i / 2 * 8 + column_of(thread, 0);
      words[k][i] = pack<T>(from[0], from[1]);
    }
    products_begin();
    multiply_64x64<T>(sums, words[k], matrix_at(base) + k * kNextRows);
    products_commit();
  }
  if (p.too_soon) words[0][0] = words[1][2] = 0;
  products_wait_for(sums);
  for (int i = 0; i < 32; ++i) p.out[row_of(thread, i) * 64 + column_of(thread, i)] = sums[i];
}

template <class T>
std::string run_registers(int64_t tokens, bool too_soon, bool shows) {
  const Matrix<T> table(tokens, 64, 8, 5), weights(64, tokens, 0, 6);
  std::vector<float> wide(size_t(64 * tokens)), out(64 * 64, NAN);
  for (int64_t i = 0; i < 64 * tokens; ++i) wide[size_t(i)] = widen(weights.data[i]);
  RegistersParams p{};
  CHECK_NO_ERROR(describe<T>(&p.table, table.data, tokens, 64, table.stride, 64));
  p.weights = wide.data(), p.out = out.data(), p.tokens = int(tokens), p.too_soon = too_soon;
  if (const char* error = launch(registers<T>, {1, 1, 128, 1, size_t(kTileBytes) + 1024}, nullptr, p)) return error;
  const std::vector<double> wanted = products_of(
      64, 64, tokens, [&](int64_t i, int64_t t) { return weights.at(i, t); },
      [&](int64_t j, int64_t t) { return table.at(t, j); });
  return compared(out, wanted, 1e-6 * double(tokens), shows);
}

template <class T>
void test_registers() {
  int caught = 0;
  for (int seed = 0; seed < 20; ++seed) {
    set_seed(seed);
    for (int64_t tokens : {16, 48, 64}) {
      context = "registers, " + std::to_string(tokens) + ", seed " + std::to_string(seed);
      const std::string error = run_registers<T>(tokens, false, true);
      CHECK_NO_ERROR(error.empty() ? nullptr : error.c_str());
    }
    caught += !run_registers<T>(64, true, false).empty();
  }
  context = "registers written too soon";
  CHECK_EQUAL(caught > 0, true);
}

}  // namespace

void test_transposed() {
  test_table<BFloat16>();
  test_table<Half>();
  test_registers<BFloat16>();
  test_registers<Half>();
  test_faults();
}
