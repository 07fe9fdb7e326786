// x . E^T by tiles of 128 rows and 128 tokens, and what is wanted of it: statistics, buckets' largest logits, weights.
//
// A consumer has two sets of sums: while the matrix units fill one with the next tile, its threads make noise, weights
// and statistics of the other. Registers: 2 x 64 sums, and about 90 for the rest, of 240.
//
// Figures behind it, per logit and multiprocessor, D = 768: 0.375 cycles of matrix units; 45 instructions of 128 a
// cycle, 0.35; 10 bytes fetched with a cluster of 2, 0.4 cycles at the 25 bytes that L2 may give: docs/hopper.md.
#pragma once

#include "epilogue.h"

namespace smoothie {
namespace cuda {

constexpr int kScoreTokens = 128;

// Products of a tile, box by box.
template <class T>
struct Products {
  static constexpr uint32_t kNextBox = kBoxBytes >> 4;

  const Boxes<kScoreTokens>& boxes;
  GiveBack give_back_box;
  RingPlace ahead, behind;  // the next box to read, the next to give back
  uint32_t x, ring, rows;   // places: x's first box, the ring's; this warpgroup's rows from the beginning of a box

  __device__ Products(const Boxes<kScoreTokens>& b) : boxes(b), give_back_box(b) {
    rows = hopper::warpgroup() * (64 * 128 >> 4);
    x = hopper::place_of(boxes.x(0)) + rows, ring = hopper::place_of(boxes.ring(RingPlace{}));
    if (boxes.resident) hopper::barrier_wait(boxes.x_full(), 0);
  }

  // sums (+)= x . E^T over columns [64 from, 64 to). Two boxes' products at most are unfinished: the ring has room for
  // them, and the matrix units have work while the threads turn to something else.
  __device__ void issue(float (&sums)[64], int from, int to) {
    uint32_t resident = x + from * kNextBox;
#pragma unroll 1
    for (int i = from; i < to; ++i, resident += kNextBox) {
      hopper::products_wait<1>();
      if (i >= 2) give_back(i - 2);
      const uint64_t a = hopper::matrix_at_place(i < boxes.resident ? resident : arrived() + rows);
      const uint64_t b = hopper::matrix_at_place(arrived());
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
    const uint32_t box = ring + ahead.slot * kNextBox;
    ahead.next(boxes.slots);
    return box;
  }

  __device__ void give_back(int i) {
    for (int n = i < boxes.resident ? 1 : 2; n > 0; --n) {
      give_back_box(behind);
      behind.next(boxes.slots);
    }
  }
};

template <class T, Mode kMode>
__device__ inline void consume(const ScoreArguments& a, const Boxes<kScoreTokens>& boxes) {
  Products<T> products(boxes);
  using Made = Epilogue<T, kMode, kScoreTokens>;
  constexpr int kPieces = Made::kPieces;
  Made epilogue(a.p, boxes.shared);
  float first[64], second[64];
  Walk walk(a.p, blockIdx.y, kScoreTokens);
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
      uint32_t weights[2][Made::kPairs];
      epilogue.take(done, tile, piece, weights);
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
  produce_and_consume<kScoreTokens>(a, [&](const auto& boxes) { consume<T, kMode>(a, boxes); });
}

}  // namespace cuda
}  // namespace smoothie
