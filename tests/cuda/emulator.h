// What hopper.h and launch.h stand on where there is no GPU: threads of a block are fibers of one processor thread, and
// all that Hopper does by itself (box copies, matrix products) happens at a random later moment. A kernel that reads
// too early, writes too soon or forgets a fence finds NaN; one that waits for ever, or misuses an instruction, ends
// with an error. Each launch has its own order of events: SMOOTHIE_EMULATOR_SEED (0), mixed with the number of the
// launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace smoothie {
namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The driver's is opaque, of this size and alignment.
struct alignas(64) TensorMap {
  const uint8_t* base;
  int64_t rows, columns, row_bytes;
  int box_rows;
  uint32_t described;  // kDescribed, or it is no map
  int64_t tiles;       // 0: rows lie one after the other; else pairs of rows this many pairs apart
  uint8_t unused[80];
};
static_assert(sizeof(TensorMap) == 128);
constexpr uint32_t kDescribed = 0x4D415021;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
// The exponent's bias by a product, which is right for denormals as well.
inline float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  uint32_t bits = bits_of(float_of(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return float_of(bits | (x.bits & 0x8000u) << 16);
}
void narrow(float x, BFloat16& to);
void narrow(float x, Half& to);

// --- Launching; nullptr, or what went wrong. The text lasts until this thread's next launch.

const char* run(void (*body)(const void*), const void* context, int64_t x, int64_t y, int threads, int cluster,
                size_t shared);
const char* describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int box_rows, int64_t tiles = 0);

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
void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile, int pair,
                      uint16_t blocks);
void stores_before_products();

uint32_t block_in_cluster();
void cluster_sync();
void sync_threads(int barrier, int threads);
void sync_block();
void sync_warp();
uint64_t shuffle_xor(uint64_t bytes, int bits);
void set_registers(int registers);

void products_begin();
void products_commit();
void products_wait(int groups);
// sums [64 x columns] (+)= a [64 x 16] . b [columns x 16]^T
void multiply(float* sums, int columns, bool half, bool down_a, uint64_t a, uint64_t b, bool add);
// a in registers, four words of a thread; b down its columns. They are read when the product is made.
void multiply(float* sums, int columns, bool half, const uint32_t* a, uint64_t b, bool add);

// Where a thread's sums lie in a product's result.
inline int row_of(int thread, int i) { return thread % 128 / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// --- For tests of the emulator

struct Counts {
  uint64_t switches, products, boxes;  // of the last launch
};
Counts counts();

}  // namespace emulator
}  // namespace smoothie

// Of the fiber that runs. Not const: a compiler must read them again after every call.
extern smoothie::emulator::Index threadIdx, blockIdx, blockDim, gridDim;
