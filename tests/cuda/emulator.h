// An emulator of Hopper, on which hopper.h and launch.h stand where there is no GPU. Threads of a block are fibers of
// one processor thread. What Hopper does asynchronously (TMA copies, matrix products) happens at a random later moment.
// A kernel that reads too early, writes too soon or lacks a fence gets NaN; one that waits forever, or misuses an
// instruction, ends with an error. Sums of products are truncated as matrix units do it (emulator/matrix_unit.h).
//
// Environment, read at each launch:
//   SMOOTHIE_EMULATOR_SEED (0)        with the number of the launch it decides the order of events
//   SMOOTHIE_EMULATOR_EXTRA_BITS (2)  1 to 3: bits that the matrix units keep beyond those of a 32-bit sum
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "emulator/numbers.h"

namespace smoothie {
namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kMaxRank = 4;  // dimensions of a tensor map
using Coordinates = std::array<int32_t, kMaxRank>;

// A matrix and its tiles, the contiguous dimension first; CUDA's own type is opaque, of this size and alignment.
struct alignas(64) TensorMap {
  const uint8_t* base;
  int64_t sizes[kMaxRank], strides[kMaxRank];  // numbers, bytes
  uint32_t tile[kMaxRank];                     // numbers
  int rank;
  uint32_t described;
};
static_assert(sizeof(TensorMap) == 128);

// --- Launching: nullptr, or what went wrong. The text lasts until this thread's next launch.

const char* run(void (*body)(const void*), const void* context, int64_t x, int64_t y, int threads, int cluster,
                size_t shared);

// Of 16-bit numbers, with the 128-byte swizzle; sizes and tile: `rank` of them, in numbers; strides: one less, in
// bytes. Refuses what the driver's cuTensorMapEncodeTiled refuses.
const char* encode_tiled(TensorMap* map, const void* matrix, int rank, const int64_t* sizes, const int64_t* strides,
                         const int64_t* tile);

// --- What a thread may do; see csrc/cuda/sm90/hopper.h

uint8_t* shared_memory();
uint32_t address_of(const void* shared);

void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_init_done();
void barrier_expect(uint32_t barrier, uint32_t bytes);
uint32_t barrier_of_block(uint32_t barrier, uint32_t block);
void barrier_arrive(uint32_t remote);
void barrier_wait(uint32_t barrier, uint32_t parity);

void prefetch_map(const TensorMap* map);
void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row);
void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, uint16_t blocks);
void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile, int pair);
void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile, int pair,
                      uint16_t blocks);
void stores_before_products();

uint32_t block_in_cluster();
void cluster_sync();
void sync_threads(int barrier, int threads);
void arrive_threads(int barrier, int threads);
void sync_block();
void sync_warp();
uint64_t shuffle_xor(uint64_t bytes, int bits);
void set_registers(int registers);

void products_begin();
void products_commit();
void products_wait(int groups);
// sums [64 x columns] (+)= a [64 x 16] . b [columns x 16]^T; a and b are descriptors, transposed_a: a is [16 x 64]
void multiply(float* sums, int columns, bool half, bool transposed_a, uint64_t a, uint64_t b, bool add);
// The same with a in registers, four words of a thread, read when the product happens; b is [16 x columns].
void multiply(float* sums, int columns, bool half, const uint32_t* a, uint64_t b, bool add);

// Row and column of a thread's sum i in a product's result.
inline int row_of(int thread, int i) { return thread % 128 / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// --- For tests of the emulator

struct Counts {
  uint64_t switches, products;  // of the last launch
};
Counts counts();

}  // namespace emulator
}  // namespace smoothie

// Of the running fiber. Not const, so that compilers read them again after every call.
extern smoothie::emulator::Index threadIdx, blockIdx, blockDim, gridDim;
