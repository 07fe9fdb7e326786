// The emulator itself: right kernels give what double precision gives, in every order of events; kernels with one fault
// are caught, by an error or by NaN. Covers what emulator.h promises, and the layouts of PTX.
#include <algorithm>
#include <chrono>

#include "testing.h"

namespace {

using namespace smoothie::hopper;

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

// --- Barriers, shuffles, warps and clusters, a case at a time

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
    case 20:
      if (thread < 32) arrive_threads(2, 64), arrive_threads(2, 64);
      break;
    case 21: {
      // One warp waits for what the other has written; the other goes on.
      int* const numbers = reinterpret_cast<int*>(shared_memory() + 64);
      if (thread < 32) {
        sync_threads(2, 64);
        p.out[64 * blockIdx.x + thread] = numbers[thread];
      } else {
        numbers[thread - 32] = 7 * thread;
        arrive_threads(2, 64);
      }
      break;
    }
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
  for (int what : {0, 10, 16, 18, 21}) {
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
  CHECK_ERROR(run(20).c_str(), "arrives twice at named barrier 2");
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
}

// --- Speed: printed, not checked

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
  test_small();
  test_launches();
  test_copies();
  test_matrix_unit();
  test_pipeline();
  test_transposed();
  show_speed();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
