// The emulator itself: kernels that are right give what double precision gives, in every order of events; kernels that
// are wrong in one place are caught, by an error or by a NaN. All of what emulator.h promises, and the layouts of PTX.
#include <launch.h>

#include <chrono>
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

namespace {

using namespace smoothie::hopper;

#define CHECK_ERROR(error, part) check_error(error, part, __LINE__)
#define CHECK_NO_ERROR(error) check_error(error, nullptr, __LINE__)

void check_error(const char* error, const char* part, int line) {
  ++checks;
  if (part ? error && std::strstr(error, part) : !error) return;
  if (++failures <= 20)
    std::printf("line %d: got error \"%s\", wanted \"%s\" (%s)\n", line, error ? error : "none", part ? part : "none",
                context.c_str());
}

void set_seed(int seed) { setenv("SMOOTHIE_EMULATOR_SEED", std::to_string(seed).c_str(), 1); }

// --- Numbers

void test_numbers() {
  context = "numbers";
  for (uint32_t h = 0; h < 65536; ++h) {
    const Half half{uint16_t(h)};
    const BFloat16 brain{uint16_t(h)};
    const int exponent = int(h >> 10 & 31), mantissa = int(h & 1023);
    if (exponent < 31) {
      const double wanted = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
      CHECK_EQUAL(widen(half), h >> 15 ? -wanted : wanted);
    } else if (mantissa) {
      CHECK_EQUAL(std::isnan(widen(half)), true);
    } else {
      CHECK_EQUAL(widen(half), h >> 15 ? -INFINITY : INFINITY);
    }
    Half half_again;
    BFloat16 brain_again;
    narrow(widen(half), half_again);
    narrow(widen(brain), brain_again);
    CHECK_EQUAL(half_again.bits, (std::isnan(widen(half)) ? 0x7FFF : h));
    CHECK_EQUAL(brain_again.bits, (std::isnan(widen(brain)) ? 0x7FFF : h));
    // Halfway to the next number, ties to even, and its neighbours; the step beyond the largest is infinity.
    if ((h & 0x7FFF) < 0x7C00) {
      const float next = (h & 0x7FFF) == 0x7BFF ? std::copysign(65536.0f, widen(half)) : widen(Half{uint16_t(h + 1)});
      const float middle = float((double(widen(half)) + next) / 2);
      narrow(middle, half_again);
      CHECK_EQUAL(half_again.bits, h + (h & 1));
      narrow(std::nextafter(middle, 0.0f), half_again);
      CHECK_EQUAL(half_again.bits, h);
      narrow(std::nextafter(middle, std::copysign(INFINITY, middle)), half_again);
      CHECK_EQUAL(half_again.bits, h + 1);
    }
    if ((h & 0x7FFF) < 0x7F80) {
      narrow(smoothie::emulator::float_of(h << 16 | 0x8000), brain_again);
      CHECK_EQUAL(brain_again.bits, h + (h & 1));
      narrow(smoothie::emulator::float_of(h << 16 | 0x7FFF), brain_again);
      CHECK_EQUAL(brain_again.bits, h);
      narrow(smoothie::emulator::float_of(h << 16 | 0x8001), brain_again);
      CHECK_EQUAL(brain_again.bits, h + 1);
    }
  }
  CHECK_EQUAL(pack<BFloat16>(1.0f, -2.0f), 0xC0003F80u);
  CHECK_EQUAL(pack<Half>(1.0f, -2.0f), 0xC0003C00u);
  CHECK_EQUAL(exp2_approx(-126.5f), 0.0f);
  CHECK_CLOSE(exp2_approx(3.0f), 8.0, 8 * 2e-7);
  CHECK_EQUAL(exp2_approx(-INFINITY), 0.0f);
  CHECK_EQUAL(log2_approx(0x1p-130f), -INFINITY);
  CHECK_CLOSE(log2_approx(0.25f), -2.0, 2 * 2.5e-7);
  CHECK_EQUAL(sqrt_approx(0x1p-130f), 0.0f);
  CHECK_CLOSE(sqrt_approx(9.0f), 3.0, 3 * 2e-7);
  CHECK_CLOSE(sin_approx(1.0f), std::sin(1.0), 7.5e-7);
  CHECK_CLOSE(cos_approx(1.0f), std::cos(1.0), 7.5e-7);
  CHECK_EQUAL(std::fabs(log2_approx(1.0f)) > 0.0f, true);  // off, as it may be
}

// --- Matrices in memory of their own exact size, NaN between the rows

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

// --- Along the rows: out = x . table^T, blocks of 64 x 128, the table's boxes shared by a cluster

enum Fault {
  kNone,
  kNoFullWait,
  kWrongParity,
  kEarlyRelease,
  kNoRelease,
  kDoubleRelease,
  kReleaseNowhere,
  kNoBegin,
  kNoCommit,
  kNoWait,
  kWaitTooFew,
  kTouchSums,
  kOtherAdd,
  kOtherMatrix,
  kFewerProducts,
  kExpectLess,
  kExpectMore,
  kNoInit,
  kNoInitDone,
  kNoClusterSync,
  kNoLastSync,
  kExit,
  kWriteBeyond,
  kBoxBeyond,
  kBoxAmid,
  kBoxNowhere,
  kMisaligned,
  kRegisters,
  kFewRegisters,
  kSomeRegisters,
};

struct AlongParams {
  TensorMap x, table;
  float* out;  // [gridDim.x * 64, 128]
  int chunks;
  Fault fault;
};

constexpr int kStages = 3, kXBytes = 64 * 128, kTableBytes = 128 * 128, kStageBytes = kXBytes + kTableBytes;
constexpr size_t kAlongShared = kStages * kStageBytes + 2 * kStages * 8;

template <class T, int kCluster>
__global__ void __launch_bounds__(256) along(const __grid_constant__ AlongParams p) {
  uint8_t* const bytes = shared_memory();
  const uint32_t base = address_of(bytes), full = base + kStages * kStageBytes, empty = full + 8 * kStages;
  const bool is_last = blockIdx.x + 1 == gridDim.x;
  if (threadIdx.x == 0 && p.fault != kNoInit) {
    for (int i = 0; i < kStages; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, kCluster);
    if (p.fault != kNoInitDone) barrier_init_done();
  }
  if (p.fault != kNoClusterSync) cluster_sync();
  if (p.fault == kExit && is_last) return;
  if (p.fault == kWriteBeyond && threadIdx.x == 7) bytes[kAlongShared] = 0;
  if (threadIdx.x < 128) {
    if (p.fault != kSomeRegisters || threadIdx.x < 64) give_registers<40>();
    if (threadIdx.x != 0) {
      if (p.fault != kNoLastSync) cluster_sync();
      return;
    }
    prefetch_map(&p.x), prefetch_map(&p.table);
    for (int k = 0; k < p.chunks; ++k) {
      const int s = k % kStages;
      if (k >= kStages) barrier_wait(empty + 8 * s, (k / kStages - 1) & 1);
      const uint32_t to = base + s * kStageBytes;
      barrier_expect(full + 8 * s, kStageBytes + (p.fault == kExpectLess ? -64 : p.fault == kExpectMore ? 64 : 0));
      load_box(p.fault == kBoxBeyond ? base + kStages * kStageBytes - 4096
               : p.fault == kBoxAmid ? to + 128
                                     : to,
               &p.x, p.fault == kMisaligned ? full + 4 : full + 8 * s, 64 * k, 64 * int(blockIdx.x));
      constexpr int kRows = 128 / kCluster;
      const int rank = int(block_in_cluster());
      load_box(to + kXBytes + rank * kRows * 128, &p.table, full + 8 * s, 64 * k, rank * kRows,
               uint16_t((1 << kCluster) - 1 + (p.fault == kBoxNowhere ? 1 << kCluster : 0)));
    }
    if (p.fault != kNoLastSync) cluster_sync();
    return;
  }
  if (p.fault == kRegisters)
    take_registers<480>();
  else if (p.fault != kFewRegisters)
    take_registers<232>();
  float sums[64];
  const auto release = [&](int k) {
    if (p.fault == kNoRelease && k == 1) return;
    if (threadIdx.x == 128 + 5) {
      for (int b = 0; b < kCluster; ++b) barrier_arrive(barrier_of_block(empty + 8 * (k % kStages), b));
      if (p.fault == kDoubleRelease)
        for (int b = 0; b < kCluster; ++b) barrier_arrive(barrier_of_block(empty + 8 * (k % kStages), b));
      if (p.fault == kReleaseNowhere) barrier_arrive(barrier_of_block(empty + 8 * (k % kStages), kCluster));
    }
  };
  for (int k = 0; k < p.chunks; ++k) {
    const int s = k % kStages;
    if (p.fault != kNoFullWait) barrier_wait(full + 8 * s, (k / kStages + (p.fault == kWrongParity)) & 1);
    if (p.fault == kEarlyRelease) release(k);
    const uint64_t a = matrix_at(base + s * kStageBytes), b = matrix_at(base + s * kStageBytes + kXBytes);
    const bool odd = threadIdx.x == 128 + 77;
    if (p.fault != kNoBegin || k != 2) products_begin();
    for (int i = 0; i < (p.fault == kFewerProducts && odd ? 3 : 4); ++i)
      multiply_64x128<T>(sums, a + (p.fault == kOtherMatrix && odd ? 0 : i) * kNextColumns, b + i * kNextColumns,
                         k || i || (p.fault == kOtherAdd && odd));
    if (p.fault == kTouchSums && threadIdx.x == 130) sums[9] = 0.0f;
    if (p.fault != kNoCommit) products_commit();
    if (p.fault == kEarlyRelease) {
      products_wait<0>();
    } else if (k) {
      products_wait<1>();
      release(k - 1);
    }
  }
  if (p.fault == kWaitTooFew) products_wait<1>();
  if (p.fault != kNoWait && p.fault != kWaitTooFew) products_wait_for(sums);
  for (int i = 0; i < 64; ++i)
    p.out[(64 * int64_t(blockIdx.x) + row_of(threadIdx.x, i)) * 128 + column_of(threadIdx.x, i)] = sums[i];
  if (p.fault != kNoLastSync) cluster_sync();
}

// a [rows x depth] . b [columns x depth]^T
std::vector<double> products_of(int64_t rows, int64_t columns, int64_t depth,
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
std::string compared(const std::vector<float>& out, const std::vector<double>& wanted, double bound, bool shows) {
  bool nan = false, wrong = false;
  for (size_t i = 0; i < out.size(); ++i) {
    if (shows) CHECK_CLOSE(double(out[i]), wanted[i], bound);
    nan |= std::isnan(out[i]);
    wrong |= !(std::fabs(out[i] - wanted[i]) <= bound);
  }
  return nan ? "NaN" : wrong ? "wrong numbers" : "";
}

template <class T, int kCluster>
struct Along {
  Matrix<T> x, table;
  int64_t blocks;
  std::vector<double> wanted;

  Along(int64_t rows, int64_t tokens, int64_t width, int64_t gap)
      : x(rows, width, gap, 1), table(tokens, width, gap, 2) {
    blocks = ((rows + 63) / 64 + kCluster - 1) / kCluster * kCluster;
    wanted = products_of(
        blocks * 64, 128, width, [&](int64_t i, int64_t k) { return x.at(i, k); },
        [&](int64_t j, int64_t k) { return table.at(j, k); });
  }

  std::string run(Fault fault, bool shows) const {
    std::vector<float> out(size_t(blocks * 64 * 128), NAN);
    AlongParams p{};
    CHECK_NO_ERROR(describe<T>(&p.x, x.data, x.rows, x.columns, x.stride, 64));
    CHECK_NO_ERROR(describe<T>(&p.table, table.data, table.rows, table.columns, table.stride, 128 / kCluster));
    p.out = out.data(), p.chunks = int(x.columns + 63) / 64, p.fault = fault;
    const char* error = launch(along<T, kCluster>, {int(blocks), 1, 256, kCluster, kAlongShared}, nullptr, p);
    return error ? error : compared(out, wanted, 1e-6 * double(x.columns), shows);
  }
};

template <class T, int kCluster>
void test_along() {
  const struct {
    int64_t rows, tokens, width, gap;
  } shapes[] = {{64, 128, 64, 0}, {1, 1, 8, 0}, {130, 77, 200, 8}, {256, 128, 512, 0}, {300, 100, 264, 16}};
  for (const auto& s : shapes) {
    const Along<T, kCluster> problem(s.rows, s.tokens, s.width, s.gap);
    for (int seed = 0; seed < 8; ++seed) {
      set_seed(seed);
      context = "along, cluster " + std::to_string(kCluster) + ", " + std::to_string(s.rows) + "x" +
                std::to_string(s.tokens) + "x" + std::to_string(s.width) + ", seed " + std::to_string(seed);
      const std::string error = problem.run(kNone, true);
      CHECK_NO_ERROR(error.empty() ? nullptr : error.c_str());
    }
  }
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
    check_error(known ? nullptr : error.c_str(), nullptr, __LINE__);
  }
  std::printf("  %-16s caught in %2d of 40\n", name, caught);
  CHECK_EQUAL(caught >= often, true);
}

void test_along_faults() {
  const Along<BFloat16, 2> problem(128, 128, 512, 0);
  const auto fault = [&](const char* name, Fault fault, int often, std::vector<const char*> words) {
    words.push_back("deadlock");
    expect(name, often, words, [&] { return problem.run(fault, false); });
  };
  fault("no full wait", kNoFullWait, 30,
        {"NaN", "wrong numbers", "more arrivals", "exits while", "another is under way"});
  fault("wrong parity", kWrongParity, 40, {"NaN", "wrong numbers", "more arrivals"});
  fault("early release", kEarlyRelease, 30, {"NaN", "wrong numbers"});
  fault("no release", kNoRelease, 40, {"barrier"});
  fault("double release", kDoubleRelease, 30, {"more arrivals", "another is under way", "NaN", "wrong numbers"});
  fault("release nowhere", kReleaseNowhere, 40, {"an arrival at block 2 of a cluster of 2"});
  fault("no begin", kNoBegin, 40, {"without products_begin"});
  fault("no commit", kNoCommit, 40, {"not committed"});
  fault("no wait", kNoWait, 40, {"not waited for"});
  fault("wait too few", kWaitTooFew, 40, {"not waited for"});
  fault("touch sums", kTouchSums, 40, {"sums were written"});
  fault("other add", kOtherAdd, 40, {"is another one"});
  fault("other matrix", kOtherMatrix, 40, {"is another one"});
  fault("fewer products", kFewerProducts, 40, {"committed different products"});
  fault("expect less", kExpectLess, 40, {"NaN", "wrong numbers", "more arrivals", "exits while"});
  fault("expect more", kExpectMore, 40, {"deadlock"});
  fault("no init", kNoInit, 40, {"not initialised"});
  fault("no init done", kNoInitDone, 40, {"barrier_init_done"});
  fault("no cluster sync", kNoClusterSync, 30, {"not initialised", "barrier_init_done"});
  fault("no last sync", kNoLastSync, 8, {"exited", "exits while"});
  fault("block exits", kExit, 40, {"exited", "exits while"});
  fault("write beyond", kWriteBeyond, 40, {"outside its"});
  fault("box beyond", kBoxBeyond, 40, {"beyond the block's"});
  fault("box amid", kBoxAmid, 40, {"not a multiple of 1024"});
  fault("box nowhere", kBoxNowhere, 40, {"of a cluster of 2"});
  fault("misaligned", kMisaligned, 40, {"multiple of 8"});
  fault("registers", kRegisters, 40, {"registers"});
  fault("few registers", kFewRegisters, 40, {"some warpgroups"});
  fault("some registers", kSomeRegisters, 40, {"not all of its threads"});
}

// --- Down the columns: out = table^T . weights^T, weights written by threads, in two turns

enum DownFault { kDownNone, kNoFence, kFenceTooEarly, kNoBarrier, kWrongCount, kPartOfWarp };

struct DownParams {
  TensorMap table;       // [T, D], boxes of 64 x 64
  const float* weights;  // [32, T]
  float *out, *totals;   // [D, 32]; [32] sums of weights
  int tokens;
  DownFault fault;
};

constexpr int kBoxBytes = 64 * 128, kWeightBytes = 32 * 128;
constexpr size_t kDownShared = 2 * kBoxBytes + kWeightBytes + 16;

template <class T>
__global__ void down(const __grid_constant__ DownParams p) {
  uint8_t* const bytes = shared_memory();
  uint8_t* const weights = bytes + 2 * kBoxBytes;
  const uint32_t base = address_of(bytes), full = base + 2 * kBoxBytes + kWeightBytes;
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    barrier_init(full, 1), barrier_init(full + 8, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (thread >= 128) return;  // one more warp, that has nothing to do
  const int column = 64 * int(blockIdx.x);
  const auto load = [&](int k) {
    if (thread != 0) return;
    barrier_expect(full + 8 * (k & 1), kBoxBytes);
    load_box(base + (k & 1) * kBoxBytes, &p.table, full + 8 * (k & 1), column, 64 * k);
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
    const uint64_t a = matrix_at(base + (k & 1) * kBoxBytes), b = matrix_at(address_of(weights));
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
std::string run_down(DownFault fault, int64_t tokens, int64_t width, bool shows) {
  const Matrix<T> table(tokens, width, 8, 3), weights(32, tokens, 0, 4);
  std::vector<float> wide(size_t(32 * tokens));
  for (int64_t i = 0; i < 32 * tokens; ++i) wide[size_t(i)] = widen(weights.data[i]);
  const int64_t blocks = (width + 63) / 64;
  std::vector<float> out(size_t(blocks * 64 * 32), NAN), totals(32, NAN);
  DownParams p{};
  CHECK_NO_ERROR(describe<T>(&p.table, table.data, tokens, width, table.stride, 64));
  p.weights = wide.data(), p.out = out.data(), p.totals = totals.data(), p.tokens = int(tokens), p.fault = fault;
  if (const char* error = launch(down<T>, {int(blocks), 1, 160, 1, kDownShared}, nullptr, p)) return error;
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
void test_down() {
  for (int64_t tokens : {64, 5, 200, 511})
    for (int64_t width : {64, 8, 136})
      for (int seed = 0; seed < 6; ++seed) {
        set_seed(seed);
        context = "down, " + std::to_string(tokens) + "x" + std::to_string(width) + ", seed " + std::to_string(seed);
        const std::string error = run_down<T>(kDownNone, tokens, width, true);
        CHECK_NO_ERROR(error.empty() ? nullptr : error.c_str());
      }
}

void test_down_faults() {
  const auto fault = [](const char* name, DownFault fault, int often, std::vector<const char*> words) {
    expect(name, often, words, [=] { return run_down<Half>(fault, 320, 64, false); });
  };
  fault("no fence", kNoFence, 40, {"NaN"});
  fault("fence too early", kFenceTooEarly, 30, {"wrong numbers", "NaN"});
  fault("no barrier", kNoBarrier, 15, {"wrong numbers", "NaN"});
  fault("wrong count", kWrongCount, 40, {"deadlock"});
  fault("part of a warp", kPartOfWarp, 40, {"without some threads", "deadlock"});
}

// --- Small things

struct SmallParams {
  int what;
  int* out;
};

__global__ void small(const SmallParams p) {
  const uint32_t barrier = address_of(shared_memory());
  const int thread = int(threadIdx.x);
  const bool first = thread == 0 && block_in_cluster() == 0;
  if (thread == 0) {
    barrier_init(barrier, 2);
    barrier_init_done();
  }
  cluster_sync();
  switch (p.what) {
    case 0:  // two phases, in this order; the parity before the first is that of a phase that has ended
      barrier_wait(barrier, 1);
      if (first) {
        barrier_arrive(barrier_of_block(barrier, 0));
        barrier_expect(barrier, 0);
        barrier_wait(barrier, 0);
        barrier_arrive(barrier_of_block(barrier, 0));
        barrier_arrive(barrier_of_block(barrier, 0));
        barrier_wait(barrier, 1);
      }
      break;
    case 1:
      if (first)
        barrier_arrive(barrier_of_block(barrier, 0)), barrier_expect(barrier, 128),
            barrier_arrive(barrier_of_block(barrier, 0));
      break;
    case 2:
      if (first)
        for (int i = 0; i < 3; ++i) barrier_expect(barrier, 1 << 19);
      break;
    case 3:
      if (first) barrier_wait(barrier, 2);
      break;
    case 4:
      if (first) barrier_init(barrier, 1);
      break;
    case 5:
      if (first) barrier_arrive(barrier_of_block(barrier + 8, 0));
      break;
    case 6:
      if (first) std::memset(shared_memory(), 0, 8), barrier_arrive(barrier_of_block(barrier, 0));
      break;
    case 7:
      if (thread % 32 != 3) shuffle_xor(1.0f, 1);
      break;
    case 8: shuffle_xor(1.0f, thread == 3 ? 2 : 1); break;
    case 9:
      if (thread != 3) __syncthreads();  // who has exited is not waited for, but whole warps come
      break;
    case 10:
      if (thread < 32) return;
      __syncthreads();
      break;
    case 11: sync_threads(16, 64); break;
    case 12: sync_threads(3, 48); break;
    case 13: sync_threads(3, thread < 32 ? 64 : 32); break;
    case 14: products_begin(); break;
    case 15:
      if (first) address_of(&p);
      break;
    case 16:
      if (block_in_cluster() == 1) cluster_sync();  // the others' exit counts as their coming
      break;
    case 17:
      if (first) sync_threads(1, 64);
      break;
    case 18: {
      // __syncwarp orders the stores of a warp.
      int* const numbers = reinterpret_cast<int*>(shared_memory() + 64);
      numbers[thread] = thread;
      __syncwarp();
      p.out[64 * blockIdx.x + thread] = numbers[thread ^ 5] + shuffle_xor(100 * thread, 7);
      break;
    }
    case 19:
      if (first) barrier_wait(barrier, 0);
      break;
  }
}

void test_small() {
  const auto run = [](int what) {
    context = "small " + std::to_string(what);
    static int out[4 * 64];
    std::string error;
    for (int seed = 0; seed < 10; ++seed) {
      set_seed(seed);
      const char* found = launch(small, {4, 1, 64, 2, 64 + 64 * 4}, nullptr, {what, out});
      if (seed) CHECK_EQUAL(!found, error.empty());
      error = found ? found : "";
      if (what == 18)
        for (int i = 0; i < 4 * 64; ++i) CHECK_EQUAL(out[i], (i % 64 ^ 5) + 100 * (i % 64 ^ 7));
    }
    return error;
  };
  for (int what : {0, 10, 16, 18}) {
    const std::string error = run(what);
    CHECK_EQUAL(error.empty(), true);
    if (!error.empty()) std::printf("%s\n", error.c_str());
  }
  CHECK_ERROR(run(1).c_str(), "more arrivals in a phase than the 2");
  CHECK_ERROR(run(2).c_str(), "cannot count");
  CHECK_ERROR(run(3).c_str(), "parity 2");
  CHECK_ERROR(run(4).c_str(), "initialised twice");
  CHECK_ERROR(run(5).c_str(), "not initialised");
  CHECK_ERROR(run(6).c_str(), "overwritten");
  CHECK_ERROR(run(7).c_str(), "of its warp");
  CHECK_ERROR(run(8).c_str(), "different shuffles");
  const std::string partial = run(9);  // all live threads came, before or after that thread's exit
  CHECK_EQUAL(partial.empty(), true);
  CHECK_ERROR(run(11).c_str(), "there are 16");
  CHECK_ERROR(run(12).c_str(), "named barrier 3 for 48 threads");
  CHECK_ERROR(run(13).c_str(), "which others use for");
  CHECK_ERROR(run(14).c_str(), "whole warpgroup");
  CHECK_ERROR(run(15).c_str(), "outside the block's shared memory");
  CHECK_ERROR(run(17).c_str(), "named barrier 1 (1 of 64 threads are there)");
  const std::string deadlock = run(19);
  CHECK_ERROR(deadlock.c_str(), "threads 0 wait for barrier 1024 (byte 0 of shared memory), parity 0");
  CHECK_ERROR(deadlock.c_str(), "lacks 2 of 2 arrivals and 0 bytes");
}

void test_launches() {
  context = "launches";
  static int out[256];
  const SmallParams p{0, out};
  CHECK_ERROR(launch(small, {0, 1, 64, 1, 64}, nullptr, p), "no blocks");
  CHECK_ERROR(launch(small, {1, 65536, 64, 1, 64}, nullptr, p), "too many");
  CHECK_ERROR(launch(small, {1, 1, 1056, 1, 64}, nullptr, p), "32 to 1024 threads");
  CHECK_ERROR(launch(small, {1, 1, 40, 1, 64}, nullptr, p), "whole warps");
  CHECK_ERROR(launch(small, {3, 1, 64, 2, 64}, nullptr, p), "divides the grid");
  CHECK_ERROR(launch(small, {16, 1, 64, 16, 64}, nullptr, p), "1 to 8 blocks");
  CHECK_ERROR(launch(small, {1, 1, 64, 1, 232449}, nullptr, p), "232448");
  CHECK_NO_ERROR(launch(small, {1, 1, 64, 1, 232448}, nullptr, p));
  CHECK_NO_ERROR(launch(small, {2, 3, 1024, 2, 64}, nullptr, p));

  alignas(64) TensorMap map;
  alignas(16) static BFloat16 numbers[64];
  CHECK_NO_ERROR(describe<BFloat16>(&map, numbers, 2, 8, 8, 1));
  CHECK_ERROR(describe<BFloat16>(&map, numbers + 1, 2, 8, 8, 1), "16 bytes");
  CHECK_ERROR(describe<BFloat16>(&map, nullptr, 2, 8, 8, 1), "16 bytes");
  CHECK_ERROR(describe<BFloat16>(&map, numbers, 2, 8, 12, 1), "16 bytes apart");
  CHECK_ERROR(describe<BFloat16>(&map, numbers, 0, 8, 8, 1), "no rows");
  CHECK_ERROR(describe<BFloat16>(&map, numbers, 1, (int64_t(1) << 32) + 1, 8, 1), "2^32");
  CHECK_ERROR(describe<BFloat16>(&map, numbers, 2, 8, 0, 1), "overlap");
  CHECK_ERROR(describe<BFloat16>(&map, numbers, 2, 8, 8, 0), "1 to 256");
  CHECK_ERROR(describe<BFloat16>(&map, numbers, 2, 8, 8, 257), "1 to 256");
}

// --- Boxes, byte by byte: where a number of the matrix lies, and what lies outside of it

struct BoxParams {
  TensorMap map;
  int column, row, box_rows;
  uint16_t* out;  // [box_rows, 64]
};

__global__ void box(const __grid_constant__ BoxParams p) {
  const uint32_t base = address_of(shared_memory()), barrier = base + 256 * 128;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
    barrier_expect(barrier, p.box_rows * 128);
    load_box(base, &p.map, barrier, p.column, p.row);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = int(threadIdx.x); i < p.box_rows * 64; i += 32) {
    const int row = i / 64, column = i % 64;
    std::memcpy(p.out + i, shared_memory() + row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2, 2);
  }
}

void test_boxes() {
  const Matrix<Half> matrix(100, 88, 8, 5);
  for (int box_rows : {1, 8, 37, 64, 256})
    for (int row : {-70, -3, 0, 60, 99, 100, 1 << 30})
      for (int column : {-128, -5, 0, 8, 64, 87, 88, 1 << 30}) {
        context =
            "box of " + std::to_string(box_rows) + " rows at " + std::to_string(row) + ", " + std::to_string(column);
        std::vector<uint16_t> out(size_t(box_rows) * 64, 0xFFFF);
        BoxParams p{};
        CHECK_NO_ERROR(describe<Half>(&p.map, matrix.data, 100, 88, matrix.stride, box_rows));
        p.column = column, p.row = row, p.box_rows = box_rows, p.out = out.data();
        CHECK_NO_ERROR(launch(box, {1, 1, 32, 1, 256 * 128 + 8}, nullptr, p));
        for (int i = 0; i < box_rows; ++i)
          for (int j = 0; j < 64; ++j) {
            const int64_t r = int64_t(row) + i, c = int64_t(column) + j;
            const bool inside = r >= 0 && r < 100 && c >= 0 && c < 88;
            CHECK_EQUAL(out[size_t(i * 64 + j)], (inside ? matrix.data[r * matrix.stride + c].bits : 0));
          }
      }
}

// --- From registers: out = weights . table, 64 x tokens times tokens x 64

struct RegistersParams {
  TensorMap table;
  const float* weights;  // [64, tokens]
  float* out;            // [64, 64]
  int tokens;            // a multiple of 16, at most 64
  bool too_soon;         // writes the registers again before their products are done
};

template <class T>
__global__ void registers(const __grid_constant__ RegistersParams p) {
  uint8_t* const bytes = shared_memory();
  const uint32_t base = address_of(bytes), full = base + kBoxBytes;
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    barrier_init(full, 1);
    barrier_init_done();
    barrier_expect(full, kBoxBytes);
    load_box(base, &p.table, full, 0, 0);
  }
  __syncthreads();
  barrier_wait(full, 0);
  float sums[32] = {};
  uint32_t words[4][4];
  for (int k = 0; k < p.tokens / 16; ++k) {
    for (int i = 0; i < 4; ++i) {  // as sums of 16 columns lie
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
  if (const char* error = launch(registers<T>, {1, 1, 128, 1, size_t(kBoxBytes) + 1024}, nullptr, p)) return error;
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

// --- Speed, for people to look at

struct SpeedParams {
  int switches, products;
  float* out;
};

__global__ void speed(const SpeedParams p) {
  uint8_t* const bytes = shared_memory();
  for (int i = 0; i < p.switches; ++i) __syncwarp();
  if (!p.products) return;
  for (int i = int(threadIdx.x) * 16; i < 32768; i += 256 * 16) std::memset(bytes + i, 0, 16);
  stores_before_products();
  __syncthreads();
  float sums[64];
  const uint64_t a = matrix_at(address_of(bytes)), b = matrix_at(address_of(bytes + 16384));
  for (int i = 0; i < p.products; i += 4) {
    products_begin();
    for (int k = 0; k < 4; ++k) multiply_64x128<BFloat16>(sums, a + k * kNextColumns, b + k * kNextColumns, i || k);
    products_commit();
    products_wait_for(sums);
  }
  p.out[threadIdx.x] = sums[0];
}

void show_speed() {
  context = "speed";
  static float out[1024];
  const auto timed = [&](const char* what, const Grid& grid, const SpeedParams& p) {
    double best = 1e9;
    for (int i = 0; i < 5; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      CHECK_NO_ERROR(launch(speed, grid, nullptr, p));
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    const auto counts = smoothie::emulator::counts();
    if (counts.products)
      std::printf("  %s: %.1f ms, %.1f us a product\n", what, best * 1e3, best * 1e6 / double(counts.products));
    else
      std::printf("  %s: %.1f ms, %.0f ns a switch\n", what, best * 1e3, best * 1e9 / double(counts.switches));
  };
  timed("768 fibers, 100 switches each", {2, 1, 384, 2, 1024}, {100, 0, out});
  timed("64x128x16", {1, 1, 256, 1, 32768}, {0, 400, out});
}

}  // namespace

int main() {
  test_numbers();
  test_boxes();
  test_small();
  test_launches();
  test_along<BFloat16, 1>();
  test_along<BFloat16, 2>();
  test_along<Half, 4>();
  test_down<BFloat16>();
  test_down<Half>();
  test_registers<BFloat16>();
  test_registers<Half>();
  test_along_faults();
  test_down_faults();
  show_speed();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
