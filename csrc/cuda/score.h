// x . E^T by tiles of 128 rows and 128 tokens, and what is wanted of it: statistics, buckets' largest logits, weights.
//
// Three warpgroups. One thread of the last fetches boxes of 64 columns: those of x come once, as many as fit beside the
// ring, those of the table go by in the ring, each fetched once for all blocks of a cluster. The other two have 64 rows
// each, and two sets of sums: while the matrix units fill one with the next tile, the threads make noise, weights and
// statistics of the other. Registers: 2 x 64 sums, and about 90 for the rest, of 240.
//
// Figures behind it, per logit and multiprocessor, D = 768: 0.375 cycles of matrix units; about 25 of 128 instructions
// a cycle, 0.2; 0.8 bytes fetched in 0.375 cycles with a cluster of 2, where L2 gives about 25 a cycle.
#pragma once

#include "rows.h"

namespace smoothie {
namespace cuda {

constexpr int kTileRows = 128, kTileTokens = 128, kBoxColumns = 64;
constexpr int kBoxBytes = 128 * kBoxColumns * 2, kBoxes = 14;  // of x and of the ring together
constexpr int kWarpgroup = 128, kConsumers = 2, kScoreThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

struct ScoreShared {
  uint8_t boxes[kBoxes][kBoxBytes];
  float bias[kConsumers][2][kTileTokens];
  uint64_t x_full, full[kBoxes], empty[kBoxes];
};

struct ScoreArguments {
  hopper::TensorMap x_map, table_map;  // boxes of 128 rows; of 128 / cluster
  StepParams p;
};

// The tiles of a block: those of part c, then of part c + chunks, ...
struct Walk {
  int tile, part, tiles, parts, chunks;

  __device__ explicit Walk(const StepParams& p, int chunk, int tokens_of_tile)
      : tile(chunk), part(chunk), parts(p.parts), chunks(p.chunks) {
    tiles = (p.end_token - p.first_token + tokens_of_tile - 1) / tokens_of_tile;
  }
  __device__ bool next() {
    tile += parts;
    if (tile >= tiles) part += chunks, tile = part;
    return part < parts;
  }
};

// Where in the ring, and whether the round is odd.
struct RingPlace {
  int slot = 0;
  uint32_t odd = 0;

  __device__ void next(int slots) {
    if (++slot == slots) slot = 0, odd ^= 1;
  }
};

// What producer and consumers know of the boxes: `resident` ones of x first, the ring behind them.
struct Boxes {
  ScoreShared& shared;
  int count, resident, slots, cluster;

  __device__ Boxes(ScoreShared& s, const StepParams& p) : shared(s), cluster(p.cluster) {
    count = (p.width + kBoxColumns - 1) / kBoxColumns;
    resident = p.resident < count ? p.resident : count;
    slots = kBoxes - resident;
  }
  __device__ uint32_t box(int i) const { return hopper::address_of(shared.boxes[i]); }
  __device__ uint32_t ring(const RingPlace& at) const { return box(resident + at.slot); }
  __device__ uint32_t full(const RingPlace& at) const { return hopper::address_of(&shared.full[at.slot]); }
  __device__ uint32_t empty(const RingPlace& at) const { return hopper::address_of(&shared.empty[at.slot]); }
  __device__ uint32_t x_full() const { return hopper::address_of(&shared.x_full); }

  __device__ void initialise() const {
    hopper::barrier_init(x_full(), 1);
    for (RingPlace at; at.slot < slots; ++at.slot) {
      hopper::barrier_init(full(at), 1);
      hopper::barrier_init(empty(at), cluster * kConsumerWarps);
    }
    hopper::barrier_init_done();
  }
};

// --- the producer: one thread

__device__ inline void fetch(const ScoreArguments& a, const Boxes& boxes) {
  const int first_row = blockIdx.x * kTileRows, share = kTileTokens / boxes.cluster;
  const int own = int(hopper::block_in_cluster()) * share;
  const uint16_t everyone = uint16_t((1 << boxes.cluster) - 1);
  hopper::prefetch_map(&a.x_map), hopper::prefetch_map(&a.table_map);
  if (boxes.resident) hopper::barrier_expect(boxes.x_full(), boxes.resident * kBoxBytes);
#pragma unroll 1
  for (int i = 0; i < boxes.resident; ++i)
    hopper::load_box(boxes.box(i), &a.x_map, boxes.x_full(), i * kBoxColumns, first_row);

  RingPlace at;
  // A slot is free when the consumers of the whole cluster have read it: the table's box is written to all of them.
  const auto free_slot = [&] {
    hopper::barrier_wait(boxes.empty(at), at.odd ^ 1);
    hopper::barrier_expect(boxes.full(at), kBoxBytes);
  };
  Walk walk(a.p, blockIdx.y, kTileTokens);
  do {
    const int token = a.p.first_token + walk.tile * kTileTokens + own;
#pragma unroll 1
    for (int i = 0; i < boxes.count; ++i) {
      if (i >= boxes.resident) {
        free_slot();
        hopper::load_box(boxes.ring(at), &a.x_map, boxes.full(at), i * kBoxColumns, first_row);
        at.next(boxes.slots);
      }
      free_slot();
      hopper::load_box(boxes.ring(at) + own * 128, &a.table_map, boxes.full(at), i * kBoxColumns, token, everyone);
      at.next(boxes.slots);
    }
  } while (walk.next());
}

// --- the consumers: products of a tile, box by box

template <class T>
struct Products {
  const Boxes& boxes;
  RingPlace ahead, behind;  // the next box to read, the next to give back
  uint32_t rows;            // of this warpgroup, from the beginning of a box of x

  __device__ Products(const Boxes& b) : boxes(b), rows(hopper::warpgroup() * 64 * 128) {
    if (boxes.resident) hopper::barrier_wait(boxes.x_full(), 0);
  }

  // sums (+)= x . E^T over columns [64 from, 64 to). Two boxes' products at most are unfinished: the ring has room for
  // them, and the matrix units have work while the threads turn to something else.
  __device__ void issue(float (&sums)[64], int from, int to) {
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      hopper::products_wait<1>();
      if (i >= 2) give_back(i - 2);
      uint32_t x = boxes.box(i);
      if (i >= boxes.resident) x = arrived();
      const uint64_t a = hopper::matrix_at(x + rows), b = hopper::matrix_at(arrived());
      hopper::products_begin();
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k)
        hopper::multiply_64x128<T>(sums, a + k * hopper::kNextColumns, b + k * hopper::kNextColumns, i + k > 0);
      hopper::products_commit();
    }
  }

  // Waits for sums of so many boxes. Also of none: else the compiler, which does not know, would wait elsewhere.
  __device__ void finish(float (&sums)[64], int count) {
    hopper::products_wait_for(sums);
    for (int i = count > 2 ? count - 2 : 0; i < count; ++i) give_back(i);
  }

 private:
  __device__ uint32_t arrived() {
    hopper::barrier_wait(boxes.full(ahead), ahead.odd);
    const uint32_t box = boxes.ring(ahead);
    ahead.next(boxes.slots);
    return box;
  }

  __device__ void give_back(int i) {
    for (int n = i < boxes.resident ? 1 : 2; n > 0; --n) {
      const int lane = threadIdx.x % 32;
      if (lane < boxes.cluster) hopper::barrier_arrive(boxes.empty(behind), lane);
      __syncwarp();
      behind.next(boxes.slots);
    }
  }
};

// --- the consumers: what is made of the sums

constexpr int kept_in(Mode mode) {
  return mode == Mode::kKeep1 ? 1 : mode == Mode::kKeep2 ? 2 : mode == Mode::kKeep4 ? 4 : 0;
}

// Two rows of a thread, and a quarter of the columns: 8 j + 2 t and the next, t the thread's place among four.
template <class T, Mode kMode>
struct Epilogue {
  static constexpr int kKeep = kept_in(kMode);
  static constexpr bool kLogits = kMode != Mode::kNearest, kStatistics = kMode != Mode::kKeys;
  static constexpr int kPieces = kKeep == 4 ? 8 : 4;        // of a tile; of four, what keeps four would spill
  static constexpr int kPairs = kTileTokens / kPieces / 8;  // of columns of a piece, of a thread and row
  static constexpr float kUnit = kMode == Mode::kKeys ? 1.0f : kLog2E;

  const StepParams& p;
  int64_t first_row;  // and first_row + 8
  int column;         // 2 t
  NoiseField field{};
  Row rows[2];
  Best nearest[2], noisy[2];
  float total[2] = {};
  Kept<kKeep> even[2], odd[2];  // logits of even and of odd columns
  float* bias;                  // two tiles' in turn
  float next_bias = 0;
  int turn = 0;

  __device__ Epilogue(const StepParams& params, ScoreShared& shared) : p(params) {
    first_row = int64_t(blockIdx.x) * kTileRows + threadIdx.x / kWarpgroup * 64 + hopper::row_of(threadIdx.x, 0);
    column = hopper::column_of(threadIdx.x, 0);
    bias = shared.bias[threadIdx.x / kWarpgroup][0];
    if (kLogits) {
      rows[0] = Row(p, first_row, kUnit), rows[1] = Row(p, first_row + 8, kUnit);
      if (p.std) field = p.fields[0];
    }
  }

  // The bias of a tile's tokens, on its way before it is needed. Beyond the last token no score is any good.
  __device__ void fetch_bias(int tile) {
    const int token = p.first_token + tile * kTileTokens + threadIdx.x % kWarpgroup;
    next_bias = token < p.end_token ? p.bias[token] : -kInfinity;
  }

  __device__ void begin_tile() {
    turn ^= 1;
    bias[turn * kTileTokens + threadIdx.x % kWarpgroup] = next_bias;
    hopper::sync_threads(1 + threadIdx.x / kWarpgroup, kWarpgroup);
  }

  // A piece of a tile's sums.
  __device__ void take(const float (&sums)[64], int tile, int piece) {
    const int first = tile * kTileTokens + piece * (kTileTokens / kPieces) + column;  // from p.first_token on
    const float* bias_here = bias + turn * kTileTokens + piece * (kTileTokens / kPieces) + column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float low[kPairs], high[kPairs];  // of the even and of the odd columns: scores, logits, weights
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float* sum = &sums[(piece * kPairs + i) * 4 + r * 2];
        low[i] = sum[0] + bias_here[8 * i], high[i] = sum[1] + bias_here[8 * i + 1];
      }
      if (kStatistics) nearest[r].take(low, high, p.first_token + first, 8);
      if (kLogits) take_logits(low, high, r, first);
    }
  }

  __device__ void take_logits(float (&low)[kPairs], float (&high)[kPairs], int r, int first) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low[i] = rows[r].logit(low[i]), high[i] = rows[r].logit(high[i]);
    if (p.std) add_noise(low, high, rows[r], uint32_t(p.first_token + first) / 2, 4, field, p);
    const int end = p.end_token - p.first_token;
    if (first + 8 * kPairs > end) {  // a scale of zero would make NaN of the bias there
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (first + 8 * i >= end) low[i] = -kInfinity;
        if (first + 8 * i + 1 >= end) high[i] = -kInfinity;
      }
    }
    const int64_t row = first_row + 8 * r;
    if constexpr (kMode == Mode::kKeys) {
      if (row >= p.n_rows) return;
      int64_t* keys = p.keys + row * p.weights_stride + first;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        store_keys(keys + 8 * i, sort_key(low[i], p.first_token + first + 8 * i),
                   sort_key(high[i], p.first_token + first + 8 * i + 1));
      return;
    }
    noisy[r].take(low, high, p.first_token + first, 8);
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        even[r].take(low[i], p.first_token + first + 8 * i), odd[r].take(high[i], p.first_token + first + 8 * i + 1);
    }
    float sum = 0;
    uint32_t packed[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = hopper::exp2_approx(low[i]), b = hopper::exp2_approx(high[i]);
      sum += a + b;
      if (kMode == Mode::kWeights) packed[i] = hopper::pack<T>(a, b);
    }
    total[r] += sum;
    if constexpr (kMode == Mode::kWeights) store_weights(packed, row, first);
  }

  // Four threads have two columns each of four groups of eight. Each gets one whole group: 16 bytes, 64 with the
  // others.
  __device__ void store_weights(uint32_t (&packed)[4], int64_t row, int first) {
    const bool odd_lane = column & 2, upper = column & 4;
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t kept = odd_lane ? packed[i + 1] : packed[i];
      const uint32_t got = hopper::shuffle_xor(odd_lane ? packed[i] : packed[i + 1], 1);
      pair[i] = odd_lane ? got : kept, pair[i + 1] = odd_lane ? kept : got;
    }
    uint32_t group[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t kept = upper ? pair[2 + i] : pair[i];
      const uint32_t got = hopper::shuffle_xor(upper ? pair[i] : pair[2 + i], 2);
      group[i] = upper ? got : kept, group[2 + i] = upper ? kept : got;
    }
    if (row >= p.n_rows) return;
    // first is that of this thread's columns, 2 t; its group begins at 8 t.
    T* weights = static_cast<T*>(p.weights) + row * p.weights_stride + (first - column + 4 * column);
    store_words(weights, group);
  }

  // What the buckets of a part have kept; then they are empty again.
  __device__ void end_part(int part) {
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first_row + 8 * r;
        if (row < p.n_rows) {
          int64_t* keys = p.keys + (row * p.parts + part) * kKeep * kBucketsOfPart + column;
#pragma unroll
          for (int i = 0; i < kKeep; ++i)
            store_keys(keys + i * kBucketsOfPart, key_of(even[r].value[i], even[r].token[i], r),
                       key_of(odd[r].value[i], odd[r].token[i], r));
        }
        even[r].clear(), odd[r].clear();
      }
    }
  }

  __device__ void store_statistics() {
    if constexpr (!kStatistics) return;
    const int64_t plane = int64_t(p.chunks) * p.n_rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      nearest[r].merge_lanes(3), noisy[r].merge_lanes(3);
      total[r] += hopper::shuffle_xor(total[r], 1);
      total[r] += hopper::shuffle_xor(total[r], 2);
      const int64_t row = first_row + 8 * r, at = int64_t(blockIdx.y) * p.n_rows + row;
      if (column != 0 || row >= p.n_rows) continue;
      p.numbers[at] = nearest[r].value, p.tokens[at] = nearest[r].token;
      if (!kLogits) continue;
      p.numbers[plane + at] = kLn2 * noisy[r].value, p.tokens[plane + at] = noisy[r].token;
      p.numbers[2 * plane + at] = total[r];
    }
  }

 private:
  __device__ int64_t key_of(float logit, int token, int r) const {
    return sort_key(kLn2 * (logit - rows[r].minus_highest), token);
  }
};

template <class T, Mode kMode>
__device__ inline void consume(const ScoreArguments& a, const Boxes& boxes) {
  Products<T> products(boxes);
  Epilogue<T, kMode> epilogue(a.p, boxes.shared);
  constexpr int kPieces = Epilogue<T, kMode>::kPieces;
  float first[64], second[64];
  Walk walk(a.p, blockIdx.y, kTileTokens);
  epilogue.fetch_bias(walk.tile);
  products.issue(first, 0, boxes.count);
  products.finish(first, boxes.count);

  // The epilogue of one tile between the products of the next. False where there is no next.
  const auto step = [&](const float (&done)[64], float (&next)[64]) {
    const int tile = walk.tile, part = walk.part;
    int count = walk.next() ? boxes.count : 0;
    hopper::hide(count);  // else the last tile's epilogue would be a second copy of all this
    epilogue.begin_tile();
    if (count) epilogue.fetch_bias(walk.tile);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      products.issue(next, (piece * count + kPieces - 1) / kPieces, ((piece + 1) * count + kPieces - 1) / kPieces);
      epilogue.take(done, tile, piece);
    }
    if (walk.part != part) epilogue.end_part(part);
    products.finish(next, count);
    return count > 0;
  };
  while (step(first, second) && step(second, first)) {
  }
  epilogue.store_statistics();
}

template <class T, Mode kMode>
__global__ void __launch_bounds__(kScoreThreads, 1) score_kernel(const __grid_constant__ ScoreArguments a) {
  auto& shared = *reinterpret_cast<ScoreShared*>(hopper::shared_memory());
  const Boxes boxes(shared, a.p);
  if (threadIdx.x == 0) boxes.initialise();
  hopper::cluster_sync();
  if (hopper::warpgroup() == kConsumers) {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) fetch(a, boxes);
    __syncwarp();
  } else {
    hopper::take_registers<kConsumerRegisters>();
    consume<T, kMode>(a, boxes);
  }
  hopper::cluster_sync();  // other blocks copy into this one's memory, and arrive there
}

}  // namespace cuda
}  // namespace smoothie
