// Few rows: the step in one pass over the table, every tile fetched once for both products.
//
// Bound by fetching the table, so rows are the short side of the products, and tokens or columns fill the matrix units:
//
//     scores^T [64 tokens x 32 rows]  = E [64 x D] . x^T            each consumer its half of the columns; halves add
//     acc^T    [D x 32 rows]         += E^T [D x 64] . weights^T    each consumer its half of the columns
//
// Between them all 256 threads make weights: eight tokens of one row each. The table's boxes stay in the ring from the
// first product to the second; as many as it has beyond one tile are on their way meanwhile.
#pragma once

#include "tiles.h"

namespace smoothie {
namespace cuda {

constexpr int kStreamRows = 32, kStreamTokens = 64, kMostBoxes = 16;  // D <= 1,024
constexpr int kStreamBoxBytes = kStreamTokens * kBoxColumns * 2, kStreamXBytes = kStreamRows * kBoxColumns * 2;
constexpr int kHalfBoxes = kMostBoxes / 2, kStreamThreads = 3 * kWarpgroup, kFinishing = 2 * kWarpgroup;
constexpr int kScoreStride = kStreamTokens + 4;  // so that threads of four rows store to different banks
constexpr int kMostStreamSlots = 24;

struct StreamShared {
  uint8_t weights[kStreamRows * kStreamTokens * 2];  // a box of its own, 1,024 bytes aligned
  float scores[2][kStreamRows][kScoreStride];        // of each consumer's columns
  uint64_t x_full, full[kMostStreamSlots], empty[kMostStreamSlots];
};
constexpr int kStreamBoxesAt = (int(sizeof(StreamShared)) + 1023) / 1024 * 1024;

// Slots of the ring: what is left beside the boxes of x.
constexpr int stream_slots(int boxes) {
  const int left = (kSharedBytes - kStreamBoxesAt - boxes * kStreamXBytes) / kStreamBoxBytes;
  return left < kMostStreamSlots ? left : kMostStreamSlots;
}
static_assert(stream_slots(kMostBoxes) > kMostBoxes, "a tile must fit, and a box of the next");

struct StreamArguments {
  hopper::TensorMap x_map, table_map;  // boxes of 32 rows; of 64
  StepParams p;
};

struct StreamBoxes {
  StreamShared& shared;
  int count, slots;

  __device__ StreamBoxes(StreamShared& s, const StepParams& p) : shared(s) {
    count = (p.width + kBoxColumns - 1) / kBoxColumns;
    slots = stream_slots(count);
  }
  __device__ uint32_t ring(int slot) const {
    return hopper::address_of(&shared) + kStreamBoxesAt + slot * kStreamBoxBytes;
  }
  __device__ uint32_t x(int i) const { return ring(slots) + i * kStreamXBytes; }
  __device__ uint32_t full(int slot) const { return hopper::address_of(&shared.full[slot]); }
  __device__ uint32_t empty(int slot) const { return hopper::address_of(&shared.empty[slot]); }
  __device__ uint32_t x_full() const { return hopper::address_of(&shared.x_full); }

  __device__ void initialise() const {
    hopper::barrier_init(x_full(), 1);
    for (int slot = 0; slot < slots; ++slot) {
      hopper::barrier_init(full(slot), 1);
      hopper::barrier_init(empty(slot), kWarpgroup / 32);  // a box is read by the consumer of its columns alone
    }
    hopper::barrier_init_done();
  }
};

__device__ inline void fetch(const StreamArguments& a, const StreamBoxes& boxes) {
  hopper::prefetch_map(&a.x_map), hopper::prefetch_map(&a.table_map);
  hopper::barrier_expect(boxes.x_full(), boxes.count * kStreamXBytes);
#pragma unroll 1
  for (int i = 0; i < boxes.count; ++i)
    hopper::load_box(boxes.x(i), &a.x_map, boxes.x_full(), i * kBoxColumns, blockIdx.x * kStreamRows);
  RingPlace at;
  Walk walk(a.p, blockIdx.y, kStreamTokens);
  do {
#pragma unroll 1
    for (int i = 0; i < boxes.count; ++i, at.next(boxes.slots)) {
      hopper::barrier_wait(boxes.empty(at.slot), at.odd ^ 1);
      hopper::barrier_expect(boxes.full(at.slot), kStreamBoxBytes);
      hopper::load_box(boxes.ring(at.slot), &a.table_map, boxes.full(at.slot), i * kBoxColumns,
                       a.p.first_token + walk.tile * kStreamTokens);
    }
  } while (walk.next());
}

// What a thread makes of eight tokens of its row.
template <class T>
struct Weigh {
  static constexpr int kPairs = 4;
  const StepParams& p;
  int64_t row_index;
  int lane;  // among the eight threads of a row
  Row row;
  NoiseField field{};
  Best nearest, noisy;
  float total = 0;
  StreamShared& shared;

  __device__ Weigh(const StepParams& params, StreamShared& s) : p(params), lane(threadIdx.x % 8), shared(s) {
    row_index = int64_t(blockIdx.x) * kStreamRows + threadIdx.x / 8;
    row = Row::of<Noise::kAny>(p, row_index, kLog2E);
    if (p.std) field = p.fields[0];
  }

  __device__ void take(int tile) {
    const int r = threadIdx.x / 8, first = p.first_token + tile * kStreamTokens + lane * 8;
    float even[kPairs], odd[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) even[i] = score(r, first, 2 * i), odd[i] = score(r, first, 2 * i + 1);
    nearest.take(even, odd, first, 2);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) even[i] = row.logit(even[i]), odd[i] = row.logit(odd[i]);
    add_noise<Noise::kAny>(even, odd, row, uint32_t(first) / 2, 1, field, p);
    uint32_t packed[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (first + 2 * i >= p.end_token) even[i] = -kInfinity;
      if (first + 2 * i + 1 >= p.end_token) odd[i] = -kInfinity;
    }
    noisy.take(even, odd, first, 2);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = hopper::exp2_approx(even[i]), b = hopper::exp2_approx(odd[i]);
      sum += a + b;
      packed[i] = hopper::pack<T>(a, b);
    }
    total += sum;
    // As a box copy would have left them: 16-byte parts swizzled by row mod 8.
    store_words(shared.weights + r * 128 + (lane ^ (r % 8)) * 16, packed);
  }

  __device__ void store_statistics() {
    nearest.merge_lanes(7), noisy.merge_lanes(7);
    for (int bit = 1; bit < 8; bit *= 2) total += hopper::shuffle_xor(total, bit);
    if (lane != 0 || row_index >= p.n_rows) return;
    const int64_t plane = int64_t(p.chunks) * p.n_rows, at = int64_t(blockIdx.y) * p.n_rows + row_index;
    p.numbers[at] = nearest.value, p.tokens[at] = nearest.token;
    p.numbers[plane + at] = kLn2 * noisy.value, p.tokens[plane + at] = noisy.token;
    p.numbers[2 * plane + at] = total;
  }

 private:
  __device__ float score(int r, int first, int i) const {
    const float* at = &shared.scores[0][r][lane * 8 + i];
    const float bias = first + i < p.end_token ? p.bias[first + i] : -kInfinity;
    return at[0] + at[kStreamRows * kScoreStride] + bias;
  }
};

template <class T>
__device__ inline void consume(const StreamArguments& a, const StreamBoxes& boxes) {
  const StepParams& p = a.p;
  StreamShared& shared = boxes.shared;
  const int consumer = hopper::warpgroup(), half = (boxes.count + 1) / 2;
  const int first_box = consumer * half, mine = consumer ? boxes.count - half : half;
  float acc[kHalfBoxes][16] = {};
  Weigh<T> weigh(p, shared);
  RingPlace tile_at;  // of the tile's first box
  Walk walk(p, blockIdx.y, kStreamTokens);
  const auto place = [&](int i) { return tile_at.after(first_box + i, boxes.slots); };
  hopper::barrier_wait(boxes.x_full(), 0);
  do {
    float sums[16] = {};
#pragma unroll 1
    for (int i = 0; i < mine; ++i) {
      const RingPlace at = place(i);
      hopper::barrier_wait(boxes.full(at.slot), at.odd);
      const uint64_t e = hopper::matrix_at(boxes.ring(at.slot)), x = hopper::matrix_at(boxes.x(first_box + i));
      hopper::products_begin();
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k)
        hopper::multiply_64x32<T, false>(sums, e + k * hopper::kNextColumns, x + k * hopper::kNextColumns, true);
      hopper::products_commit();
    }
    hopper::products_wait_for(sums);
#pragma unroll
    for (int i = 0; i < 16; ++i)
      shared.scores[consumer][hopper::column_of(threadIdx.x, i)][hopper::row_of(threadIdx.x, i)] = sums[i];
    hopper::sync_threads(1, kFinishing);
    weigh.take(walk.tile);
    hopper::stores_before_products();
    hopper::sync_threads(1, kFinishing);

    const uint64_t weights = hopper::matrix_at(hopper::address_of(shared.weights));
    const int multiplied = p.acc ? mine : 0;
#pragma unroll
    for (int i = 0; i < kHalfBoxes; ++i) {
      if (i >= multiplied) continue;
      const uint64_t e = hopper::matrix_at(boxes.ring(place(i).slot));
      hopper::products_begin();
#pragma unroll
      for (int k = 0; k < kStreamTokens / 16; ++k)
        hopper::multiply_64x32<T, true>(acc[i], e + k * hopper::kNextRows, weights + k * hopper::kNextColumns, true);
      hopper::products_commit();
    }
#pragma unroll
    for (int i = 0; i < kHalfBoxes; ++i) hopper::products_wait_for(acc[i]);
#pragma unroll 1
    for (int i = 0; i < mine; ++i)
      if (threadIdx.x % 32 == 0) hopper::barrier_arrive(hopper::barrier_of_block(boxes.empty(place(i).slot), 0));
    __syncwarp();
    tile_at = tile_at.after(boxes.count, boxes.slots);
  } while (walk.next());

  weigh.store_statistics();
  if (!p.acc) return;
#pragma unroll
  for (int i = 0; i < kHalfBoxes; ++i) {
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int64_t row = int64_t(blockIdx.x) * kStreamRows + hopper::column_of(threadIdx.x, k);
      const int d = (first_box + i) * kBoxColumns + hopper::row_of(threadIdx.x, k);
      if (i < mine && row < p.n_rows && d < p.width)
        p.acc[(int64_t(blockIdx.y) * p.n_rows + row) * p.width + d] = acc[i][k];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const __grid_constant__ StreamArguments a) {
  if (a.p.only) {  // nothing to do for rows that nobody wants
    bool wanted = false;
    for (int r = 0; r < kStreamRows; ++r) {
      const int64_t row = int64_t(blockIdx.x) * kStreamRows + r;
      wanted |= row < a.p.n_rows && a.p.only[row];
    }
    if (!wanted) return;
  }
  auto& shared = *reinterpret_cast<StreamShared*>(hopper::shared_memory());
  const StreamBoxes boxes(shared, a.p);
  if (threadIdx.x == 0) boxes.initialise();
  __syncthreads();
  if (hopper::warpgroup() == kConsumers) {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) fetch(a, boxes);
  } else {
    hopper::take_registers<registers_of(1)>();
    consume<T>(a, boxes);
  }
}

}  // namespace cuda
}  // namespace smoothie
