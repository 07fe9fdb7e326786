// x . E^T by tiles of 128 rows and 128 tokens, and the epilogue: statistics, buckets' largest logits, weights.
//
// While the matrix units multiply the next tile, threads make noise, weights and statistics of this one. With two
// phases (epilogue.h: phases_of) these are other threads; with one phase the same threads, which then have two sets of
// sums. docs/hopper.md has what was measured.
#pragma once

#include "epilogue.h"

namespace smoothie {
namespace cuda {

constexpr int kScoreTokens = 128;

// Products of a tile, box by box. Its instructions are few on purpose: with more, the matrix units wait for them.
template <class T>
struct Products {
  static constexpr uint32_t kNextBox = kBoxBytes >> 4;

  const Boxes<kScoreTokens>& boxes;
  RingPlace ahead;           // the next box to read
  int last_x = 0, last = 0;  // slots of the last boxes whose products were issued
  uint32_t x, ring, rows;    // places: x's first box, the ring's; this warpgroup's rows from the beginning of a box

  __device__ explicit Products(const Boxes<kScoreTokens>& b) : boxes(b) {
    rows = hopper::warpgroup() % kConsumers * (64 * 128 >> 4);
    x = hopper::place_of(boxes.x(0)) + rows, ring = hopper::place_of(boxes.ring(RingPlace{}));
    if (boxes.resident) hopper::barrier_wait(boxes.x_full(), 0);
  }

  // sums (+)= x . E^T over columns [64 from, 64 to). Two boxes' products at most are unfinished: the ring has room for
  // them, and the matrix units have work while the threads turn to something else.
  __device__ void issue(float (&sums)[64], int from, int to) {
    const GiveBack give_back(boxes);  // not kept: the epilogue needs the register
#pragma unroll 1
    for (int i = from; i < to; ++i) issue_box(sums, i, i >= boxes.resident, give_back);
  }

  // Of all columns, with fewer instructions: in two loops.
  __device__ void issue_all(float (&sums)[64]) {
    const GiveBack give_back(boxes);
    int i = 0;
#pragma unroll 1
    for (; i < boxes.resident; ++i) issue_box(sums, i, false, give_back);
#pragma unroll 1
    for (; i < boxes.count; ++i) issue_box(sums, i, true, give_back);
  }

  // Waits for sums of so many boxes. Also of none: else the compiler, which does not know, would wait elsewhere.
  __device__ void finish(float (&sums)[64], int count) {
    const GiveBack give_back(boxes);
    hopper::products_wait_for(sums);
    if (count > 0) give_back(last);
    if (count > boxes.resident) give_back(last_x);
  }

  // Leaves out a tile, which another phase takes.
  __device__ void skip() { ahead = ahead.far_after(boxes.slots_of_tile(), boxes.slots); }

 private:
  // Then it waits for the products of the box before, and gives that back.
  __device__ void issue_box(float (&sums)[64], int i, bool streamed, const GiveBack& give_back) {
    const int x_slot = ahead.slot;
    const uint64_t a = hopper::matrix_at_place(streamed ? arrived() + rows : x + i * kNextBox);
    const int slot = ahead.slot;
    const uint64_t b = hopper::matrix_at_place(arrived());
    hopper::products_begin();
#pragma unroll
    for (int k = 0; k < kBoxColumns / 16; ++k)
      hopper::multiply_64x128<T>(sums, a + k * hopper::kNextColumns, b + k * hopper::kNextColumns, k > 0 || i > 0);
    hopper::products_commit();
    hopper::products_wait<1>();
    if (i > 0) give_back(last);
    if (i > boxes.resident) give_back(last_x);
    last = slot, last_x = x_slot;
  }

  __device__ uint32_t arrived() {
    hopper::barrier_wait(boxes.full(ahead), ahead.odd);
    const uint32_t box = ring + ahead.slot * kNextBox;
    ahead.next(boxes.slots);
    return box;
  }
};

// One phase: two sets of sums, and the epilogue of one tile between the products of the next.
template <class T, Mode kMode, Noise kNoise>
__device__ inline void consume_all(const ScoreArguments& a, const Boxes<kScoreTokens>& boxes) {
  Products<T> products(boxes);
  using Made = Epilogue<T, kMode, kNoise, kScoreTokens>;
  constexpr int kPieces = Made::kPieces;
  Made epilogue(a.p, boxes.shared);
  float first[64], second[64];
  Walk walk(a.p, blockIdx.y, kScoreTokens);
  epilogue.fetch_bias(walk.tile);
  products.issue(first, 0, boxes.count);
  products.finish(first, boxes.count);

  // False where there is no next.
  const auto step = [&](const float (&done)[64], float (&next)[64]) {
    const int tile = walk.tile, part = walk.part;
    int count = walk.next() ? boxes.count : 0;
    hopper::hide(count);  // else the last tile's epilogue would be a second copy of all this
    epilogue.begin_tile(tile);
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
  if constexpr (Made::kStatistics) epilogue.store_statistics(boxes.shared);
}

// Two phases: every other tile. The matrix units work for one phase while the threads of the other make its epilogue.
// A phase asks for boxes when the other has got all of its own: a barrier tells one round of the ring from the next,
// not from the one after that.
template <class T, Mode kMode, Noise kNoise>
__device__ inline void consume_half(const ScoreArguments& a, const Boxes<kScoreTokens>& boxes) {
  constexpr int kTurn = 4, kThreads = 2 * kConsumers * kWarpgroup;  // two barriers, one for each phase; their threads
  using Made = Epilogue<T, kMode, kNoise, kScoreTokens>;
  const int phase = hopper::warpgroup() / kConsumers;
  Made epilogue(a.p, boxes.shared);
  Products<T> products(boxes);
  Walk walk(a.p, blockIdx.y, kScoreTokens);
  const auto skip = [&] {
    products.skip();
    return walk.next();
  };
  bool more = true;
  if (phase) {
    hopper::arrive_threads(kTurn, kThreads);
    more = skip();
  }
  while (more) {
    float sums[64];
    epilogue.fetch_bias(walk.tile);
    hopper::sync_threads(kTurn + phase, kThreads);
    products.issue_all(sums);
    if (Walk(walk).next()) hopper::arrive_threads(kTurn + (phase ^ 1), kThreads);
    epilogue.begin_tile(walk.tile);
    products.finish(sums, boxes.count);
#pragma unroll
    for (int piece = 0; piece < Made::kPieces; ++piece) {
      uint32_t weights[2][Made::kPairs];
      epilogue.take(sums, walk.tile, piece, weights);
    }
    more = walk.next() && skip();
  }
  if constexpr (Made::kStatistics) epilogue.store_statistics(boxes.shared);
}

template <class T, Mode kMode, Noise kNoise>
__global__ void __launch_bounds__(threads_of(phases_of(kMode, kNoise)), 1)
    score_kernel(const __grid_constant__ ScoreArguments a) {
  constexpr int kPhases = phases_of(kMode, kNoise);
  produce_and_consume<kScoreTokens, kPhases>(a, [&](const auto& boxes) {
    if constexpr (kPhases == 1)
      consume_all<T, kMode, kNoise>(a, boxes);
    else
      consume_half<T, kMode, kNoise>(a, boxes);
  });
}

}  // namespace cuda
}  // namespace smoothie
