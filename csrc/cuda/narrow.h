// Many rows, D <= 256: both products in one pass, every tile of the table fetched once, and the mean in registers.
//
// A consumer has 64 rows: 64 x D sums of the mean (128 registers at most), 64 x 64 scores (32) and their weights (16),
// which go from registers straight into the second product. There is no room for a second set of scores, and no need: a
// tile's noise takes about as long as its products do up to this width, and one consumer makes it while the matrix
// units work for the other.
//
// At D = 256 a logit takes 0.25 cycles of matrix units for both products and 0.25 of the threads; through weights in
// memory it would take 0.29 + 0.13. Wider means leave no registers for noise.
#pragma once

#include "epilogue.h"

namespace smoothie {
namespace cuda {

constexpr int kNarrowTokens = 64, kNarrowBoxes = 4;  // D <= 256

template <class T>
__device__ inline void consume(const ScoreArguments& a, const Boxes<kNarrowTokens>& boxes) {
  using Made = Epilogue<T, Mode::kMean, Noise::kAny, kNarrowTokens>;
  constexpr int kSteps = kNarrowTokens / 16;
  Made epilogue(a.p, boxes.shared);
  float acc[kNarrowBoxes][32] = {};
  uint32_t weights[kSteps][4];
  const uint32_t rows = hopper::warpgroup() * 64 * 128;
  RingPlace at, before;  // the first box of a tile, and of the one before it
  int unread = 0;        // boxes of that, which the second product may still read
  Walk walk(a.p, blockIdx.y, kNarrowTokens);
  const GiveBack give_back_box(boxes);
  const auto give_back = [&] {
    for (int i = 0; i < unread; ++i) give_back_box(before.after(i, boxes.slots).slot);
  };
  epilogue.fetch_bias(walk.tile);
  hopper::barrier_wait(boxes.x_full(), 0);
  bool more = true;
  do {
    const int tile = walk.tile;
    float scores[32];
#pragma unroll 1
    for (int i = 0; i < boxes.count; ++i) {
      const RingPlace box = at.after(i, boxes.slots);
      hopper::barrier_wait(boxes.full(box), box.odd);
      hopper::products_wait<1>();
      if (i == 1) give_back();  // only products of the TMA tile before this are unfinished: the last mean is done
      const uint64_t x = hopper::matrix_at(boxes.x(i) + rows), e = hopper::matrix_at(boxes.ring(box));
      hopper::products_begin();
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k)
        hopper::multiply_64x64<T>(scores, x + k * hopper::kNextColumns, e + k * hopper::kNextColumns, i + k > 0);
      hopper::products_commit();  // of each TMA tile: one after the loop would take a product of its own
    }
    epilogue.begin_tile(tile);
    more = walk.next();
    if (more) epilogue.fetch_bias(walk.tile);
    hopper::products_wait_for(scores);
    if (boxes.count == 1) give_back();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) hopper::products_have_read(weights[i]);

#pragma unroll
    for (int piece = 0; piece < Made::kPieces; ++piece) {
      uint32_t of_rows[2][Made::kPairs];
      epilogue.take(scores, tile, piece, of_rows);
#pragma unroll
      for (int i = 0; i < 8; ++i) weights[2 * piece + i / 4][i % 4] = of_rows[i % 2][i / 2];
    }

#pragma unroll
    for (int i = 0; i < kNarrowBoxes; ++i) {
      if (i >= boxes.count) continue;
      const uint64_t e = hopper::matrix_at(boxes.ring(at.after(i, boxes.slots)));
      hopper::products_begin();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) hopper::multiply_64x64<T>(acc[i], weights[k], e + k * hopper::kNextRows);
      hopper::products_commit();
    }
    before = at, unread = boxes.count;
    at = at.after(boxes.count, boxes.slots);
  } while (more);

#pragma unroll
  for (int i = 0; i < kNarrowBoxes; ++i) hopper::products_wait_for(acc[i]);
  give_back();
  epilogue.store_statistics(boxes.shared);
#pragma unroll
  for (int i = 0; i < kNarrowBoxes; ++i) {
#pragma unroll
    for (int k = 0; k < 32; k += 2) {
      const int64_t row = epilogue.first_row() + k % 4 / 2 * 8;
      const int d = i * kBoxColumns + hopper::column_of(threadIdx.x, k);
      if (row < a.p.n_rows && d < a.p.width)
        store_pair(a.p.acc + (int64_t(blockIdx.y) * a.p.n_rows + row) * a.p.width + d, acc[i][k], acc[i][k + 1]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads_of(1), 1) narrow_kernel(const __grid_constant__ ScoreArguments a) {
  produce_and_consume<kNarrowTokens, 1>(a, [&](const auto& boxes) { consume<T>(a, boxes); });
}

}  // namespace cuda
}  // namespace smoothie
