// The twin of csrc/cuda/sm90/hopper.h on a CPU: the same names for the same kernels, run by the emulator. An error ends
// the launch, and the call never returns to the kernel's thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() ::smoothie::emulator::sync_block()
#define __syncwarp() ::smoothie::emulator::sync_warp()

namespace smoothie {
namespace hopper {

using emulator::BFloat16;
using emulator::Half;
using emulator::narrow;
using emulator::TensorMap;
using emulator::widen;

template <class T>
inline uint32_t pack(float first, float second) {
  T low, high;
  narrow(first, low), narrow(second, high);
  return low.bits | uint32_t(high.bits) << 16;
}

using emulator::address_of;
using emulator::shared_memory;

using emulator::barrier_arrive;
using emulator::barrier_expect;
using emulator::barrier_init;
using emulator::barrier_init_done;
using emulator::barrier_of_block;
using emulator::barrier_wait;

using emulator::load_box;
using emulator::load_strided_box;
using emulator::prefetch_map;
using emulator::stores_before_products;

using emulator::arrive_threads;
using emulator::block_in_cluster;
using emulator::cluster_sync;
using emulator::sync_threads;

inline uint32_t same_for_warp(uint32_t x) { return x; }
inline int warpgroup() { return int(threadIdx.x / 128); }
inline void hide(int&) {}
template <class X>
inline void hide(X*&) {}
inline void load_pair(const float* from, float& first, float& second) { first = from[0], second = from[1]; }
inline void store_global(void* to, uint32_t first, uint32_t second) {
  const uint32_t words[] = {first, second};
  std::memcpy(to, words, sizeof words);
}

template <class X>
inline X shuffle_xor(X x, int bits) {
  static_assert(std::is_arithmetic_v<X> && sizeof(X) <= 8);
  uint64_t bytes = 0;
  std::memcpy(&bytes, &x, sizeof(X));
  bytes = emulator::shuffle_xor(bytes, bits);
  std::memcpy(&x, &bytes, sizeof(X));
  return x;
}

template <int kRegisters>
inline void take_registers() {
  emulator::set_registers(kRegisters);
}

template <int kRegisters>
inline void give_registers() {
  emulator::set_registers(kRegisters);
}

using emulator::products_begin;
using emulator::products_commit;

template <int kGroups>
inline void products_wait() {
  static_assert(kGroups >= 0 && kGroups <= 7);
  emulator::products_wait(kGroups);
}

template <int kSums>
inline void products_wait_for(float (&)[kSums]) {
  products_wait<0>();
}

template <int kCount>
inline void products_have_read(uint32_t (&)[kCount]) {}

// As there; emulator/products.cpp decodes it.
inline uint32_t place_of(uint32_t address) {
  constexpr uint32_t kUnused = 1u << 16;
  return kUnused | (address & 0x3FFFF) >> 4;
}
inline uint64_t matrix_at_place(uint32_t place) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kEightRows | place;
}
inline uint64_t matrix_at(uint32_t address) { return matrix_at_place(place_of(address)); }
constexpr uint64_t kNextColumns = 16 * 2 >> 4;
constexpr uint64_t kNextRows = 16 * 128 >> 4;

template <class T>
inline void multiply_64x128(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  emulator::multiply(sums, 128, std::is_same_v<T, Half>, false, a, b, add);
}

template <class T>
inline void multiply_64x64(float (&sums)[32], uint64_t a, uint64_t b, bool add) {
  emulator::multiply(sums, 64, std::is_same_v<T, Half>, false, a, b, add);
}

template <class T>
inline void multiply_64x64(float (&sums)[32], const uint32_t (&a)[4], uint64_t b) {
  emulator::multiply(sums, 64, std::is_same_v<T, Half>, a, b, true);
}

template <class T, bool kDownA>
inline void multiply_64x32(float (&sums)[16], uint64_t a, uint64_t b, bool add) {
  emulator::multiply(sums, 32, std::is_same_v<T, Half>, kDownA, a, b, add);
}

using emulator::column_of;
using emulator::row_of;

// Subnormal arguments and results are zero. Results are off by as much as the PTX ISA allows; the argument's bits
// decide whether up or down.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline double off(float x, double by) { return (emulator::bits_of(x) * 0x9E3779B9u) >> 31 ? by : -by; }
constexpr double kSinError = 6.743496e-07;  // 2^-20.5, from -2 pi to 2 pi
inline float exp2_approx(float x) {
  return flush(float(std::exp2(double(flush(x))) * (1 + off(x, 1.6858739e-07))));  // 2^-22.5
}
inline float log2_approx(float x) {
  const double y = std::log2(double(flush(x)));
  return flush(float(x > 0.5f && x < 2.0f ? y + off(x, 0x1p-22) : y * (1 + off(x, 0x1p-22))));
}
inline float sqrt_approx(float x) { return flush(float(std::sqrt(double(flush(x))) * (1 + off(x, 0x1p-23)))); }
inline float sin_approx(float x) { return flush(float(std::sin(double(x)) + off(x, kSinError))); }
inline float cos_approx(float x) { return flush(float(std::cos(double(x)) + off(x, -kSinError))); }

}  // namespace hopper
}  // namespace smoothie
