// Products of rows, through a ring of TMA tiles that a cluster shares: out = x . table^T, in blocks of 64 x 128.
#include "testing.h"

namespace {

using namespace smoothie::hopper;

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
  kTileBeyond,
  kTileMisaligned,
  kTileNowhere,
  kBarrierMisaligned,
  kRegisters,
  kFewRegisters,
  kSomeRegisters,
};

struct PipelineParams {
  TensorMap x, table;
  float* out;  // [gridDim.x * 64, 128]
  int chunks;
  Fault fault;
};

constexpr int kStages = 3, kXBytes = 64 * 128, kTableBytes = 128 * 128, kStageBytes = kXBytes + kTableBytes;
constexpr size_t kPipelineShared = kStages * kStageBytes + 2 * kStages * 8;

template <class T, int kCluster>
__global__ void __launch_bounds__(256) pipeline(const __grid_constant__ PipelineParams p) {
  uint8_t* const bytes = shared_memory();
  const uint32_t base = address_of(bytes), full = base + kStages * kStageBytes, empty = full + 8 * kStages;
  const bool is_last = blockIdx.x + 1 == gridDim.x;
  if (threadIdx.x == 0 && p.fault != kNoInit) {
    for (int i = 0; i < kStages; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, kCluster);
    if (p.fault != kNoInitDone) barrier_init_done();
  }
  if (p.fault != kNoClusterSync) cluster_sync();
  if (p.fault == kExit && is_last) return;
  if (p.fault == kWriteBeyond && threadIdx.x == 7) bytes[kPipelineShared] = 0;
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
      load_box(p.fault == kTileBeyond       ? base + kStages * kStageBytes - 4096
               : p.fault == kTileMisaligned ? to + 128
                                            : to,
               &p.x, p.fault == kBarrierMisaligned ? full + 4 : full + 8 * s, 64 * k, 64 * int(blockIdx.x));
      constexpr int kRows = 128 / kCluster;
      const int rank = int(block_in_cluster());
      if constexpr (kCluster == 1)
        load_box(to + kXBytes, &p.table, full + 8 * s, 64 * k, 0);
      else
        load_box(to + kXBytes + rank * kRows * 128, &p.table, full + 8 * s, 64 * k, rank * kRows,
                 uint16_t((1 << kCluster) - 1 + (p.fault == kTileNowhere ? 1 << kCluster : 0)));
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

template <class T, int kCluster>
struct Pipeline {
  Matrix<T> x, table;
  int64_t blocks;
  std::vector<double> wanted;

  Pipeline(int64_t rows, int64_t tokens, int64_t width, int64_t gap)
      : x(rows, width, gap, 1), table(tokens, width, gap, 2) {
    blocks = ((rows + 63) / 64 + kCluster - 1) / kCluster * kCluster;
    wanted = products_of(
        blocks * 64, 128, width, [&](int64_t i, int64_t k) { return x.at(i, k); },
        [&](int64_t j, int64_t k) { return table.at(j, k); });
  }

  std::string run(Fault fault, bool shows) const {
    std::vector<float> out(size_t(blocks * 64 * 128), NAN);
    PipelineParams p{};
    CHECK_NO_ERROR(describe<T>(&p.x, x.data, x.rows, x.columns, x.stride, 64));
    CHECK_NO_ERROR(describe<T>(&p.table, table.data, table.rows, table.columns, table.stride, 128 / kCluster));
    p.out = out.data(), p.chunks = int(x.columns + 63) / 64, p.fault = fault;
    const char* error = launch(pipeline<T, kCluster>, {int(blocks), 1, 256, kCluster, kPipelineShared}, nullptr, p);
    return error ? error : compared(out, wanted, 1e-6 * double(x.columns), shows);
  }
};

template <class T, int kCluster>
void test_shapes() {
  const struct {
    int64_t rows, tokens, width, gap;
  } shapes[] = {{64, 128, 64, 0}, {1, 1, 8, 0}, {130, 77, 200, 8}, {256, 128, 512, 0}, {300, 100, 264, 16}};
  for (const auto& s : shapes) {
    const Pipeline<T, kCluster> problem(s.rows, s.tokens, s.width, s.gap);
    for (int seed = 0; seed < 8; ++seed) {
      set_seed(seed);
      context = "pipeline, cluster " + std::to_string(kCluster) + ", " + std::to_string(s.rows) + "x" +
                std::to_string(s.tokens) + "x" + std::to_string(s.width) + ", seed " + std::to_string(seed);
      const std::string error = problem.run(kNone, true);
      CHECK_NO_ERROR(error.empty() ? nullptr : error.c_str());
    }
  }
}

void test_faults() {
  const Pipeline<BFloat16, 2> problem(128, 128, 512, 0);
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
  fault("tile beyond", kTileBeyond, 40, {"beyond the block's"});
  fault("tile misaligned", kTileMisaligned, 40, {"not a multiple of 1024"});
  fault("tile nowhere", kTileNowhere, 40, {"of a cluster of 2"});
  fault("bad barrier", kBarrierMisaligned, 40, {"multiple of 8"});
  fault("registers", kRegisters, 40, {"registers"});
  fault("few registers", kFewRegisters, 40, {"some warpgroups"});
  fault("some registers", kSomeRegisters, 40, {"not all of its threads"});
}

}  // namespace

void test_pipeline() {
  test_shapes<BFloat16, 1>();
  test_shapes<BFloat16, 2>();
  test_shapes<Half, 4>();
  test_faults();
}
