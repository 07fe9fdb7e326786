// Tiles of tokens on their way to the matrix units: one thread fetches, pairs of warpgroups with 64 rows each consume.
//
// Boxes of 64 columns: those of x come once, as many as fit beside the ring; those of the table go by in the ring, each
// fetched once for all blocks of a cluster. With two pairs ("phases"), each takes every other tile.
#pragma once

#include "rows.h"

namespace smoothie {
namespace cuda {

constexpr int kTileRows = 128, kBoxColumns = 64;
constexpr int kBoxBytes = kTileRows * kBoxColumns * 2, kBoxes = 14;  // of x and of the ring together
constexpr int kMostSlots = 2 * kBoxes;                               // of the ring: boxes of the table may be smaller
constexpr int kWarpgroup = 128, kConsumers = 2;                      // of a phase
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kProducerRegisters = 24;

constexpr int threads_of(int phases) { return (phases * kConsumers + 1) * kWarpgroup; }
// A kernel is launched with 168 or 96 registers a thread. The producer keeps kProducerRegisters; the consumers get the
// rest.
constexpr int registers_of(int phases) { return phases == 1 ? 240 : 112; }

struct ScoreShared {
  uint8_t boxes[kBoxes][kBoxBytes];
  float bias[2][2][kWarpgroup];  // of a consumer or of a phase, two tiles' in turn
  uint64_t x_full, full[kMostSlots], empty[kMostSlots];
};

struct ScoreArguments {
  hopper::TensorMap x_map, table_map, strided_map;  // boxes of 128 rows; of a tile's tokens / cluster, twice
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
  // At most a round further.
  __device__ RingPlace after(int boxes, int slots) const {
    return slot + boxes < slots ? RingPlace{slot + boxes, odd} : RingPlace{slot + boxes - slots, odd ^ 1};
  }
  __device__ RingPlace far_after(int boxes, int slots) const {
    const int to = slot + boxes, rounds = to / slots;
    return {to - rounds * slots, odd ^ (rounds & 1)};
  }
};

// What producer and consumers know of the boxes: `resident` ones of x first, the ring behind them. A box of x that is
// not resident takes a slot of the ring, whose boxes then have as many rows.
template <int kTokens>
struct Boxes {
  static constexpr int kSlotBytes = kTokens * kBoxColumns * 2;

  ScoreShared& shared;
  int count, resident, slots, cluster;

  __device__ Boxes(ScoreShared& s, const StepParams& p) : shared(s), cluster(p.cluster) {
    count = (p.width + kBoxColumns - 1) / kBoxColumns;
    resident = p.resident < count ? p.resident : count;
    slots = (kBoxes - resident) * (kBoxBytes / kSlotBytes);
  }
  __device__ int slots_of_tile() const { return count + (count - resident); }
  __device__ uint32_t x(int i) const { return hopper::address_of(shared.boxes[i]); }
  __device__ uint32_t ring(const RingPlace& at) const { return x(resident) + at.slot * kSlotBytes; }
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

// By all threads of a warp, when it has read a box: every block of the cluster must know, for all write to it.
struct GiveBack {
  uint32_t first = 0;  // the ring's first barrier of the block that this thread tells, 0 where it tells none

  template <int kTokens>
  __device__ explicit GiveBack(const Boxes<kTokens>& boxes) {
    const int lane = threadIdx.x % 32;
    if (lane < boxes.cluster) first = hopper::barrier_of_block(boxes.empty(RingPlace{}), lane);
  }
  __device__ void operator()(int slot) const {
    if (first) hopper::barrier_arrive(first + 8 * slot);
    __syncwarp();
  }
};

// --- the producer: one thread

template <int kTokens>
__device__ inline void fetch(const ScoreArguments& a, const Boxes<kTokens>& boxes) {
  const int first_row = blockIdx.x * kTileRows, share = kTokens / boxes.cluster;
  const int own = int(hopper::block_in_cluster()) * share;
  // A block alone is launched without a cluster, and the PTX ISA does not say that multicast copies work there.
  const bool alone = boxes.cluster == 1;
  const uint16_t everyone = uint16_t((1 << boxes.cluster) - 1);
  hopper::prefetch_map(&a.x_map), hopper::prefetch_map(&a.table_map);
  if (boxes.resident) hopper::barrier_expect(boxes.x_full(), boxes.resident * kBoxBytes);
#pragma unroll 1
  for (int i = 0; i < boxes.resident; ++i)
    hopper::load_box(boxes.x(i), &a.x_map, boxes.x_full(), i * kBoxColumns, first_row);

  RingPlace at;
  // A slot is free when the consumers of the whole cluster have read it: the table's box is written to all of them.
  const auto free_slot = [&] {
    hopper::barrier_wait(boxes.empty(at), at.odd ^ 1);
    hopper::barrier_expect(boxes.full(at), boxes.kSlotBytes);
  };
  Walk walk(a.p, blockIdx.y, kTokens);
  do {
    const int token = a.p.first_token + walk.tile * kTokens + own;
#pragma unroll 1
    for (int i = 0; i < boxes.count; ++i) {
      if (i >= boxes.resident) {
        free_slot();
        hopper::load_box(boxes.ring(at), &a.x_map, boxes.full(at), i * kBoxColumns, first_row);
        at.next(boxes.slots);
      }
      free_slot();
      const uint32_t to = boxes.ring(at) + own * 128, full = boxes.full(at);
      const int column = i * kBoxColumns;
      if (walk.tile < a.p.strided_tiles) {
        if (alone)
          hopper::load_strided_box(to, &a.strided_map, full, column, walk.tile, 0);
        else
          hopper::load_strided_box(to, &a.strided_map, full, column, walk.tile, own / 2, everyone);
      } else if (alone) {
        hopper::load_box(to, &a.table_map, full, column, token);
      } else {
        hopper::load_box(to, &a.table_map, full, column, token, everyone);
      }
      at.next(boxes.slots);
    }
  } while (walk.next());
}

// --- a kernel: one producer, two consumers a phase

template <int kTokens, int kPhases, class Consume>
__device__ inline void produce_and_consume(const ScoreArguments& a, const Consume& consume) {
  auto& shared = *reinterpret_cast<ScoreShared*>(hopper::shared_memory());
  const Boxes<kTokens> boxes(shared, a.p);
  if (threadIdx.x == 0) boxes.initialise();
  hopper::cluster_sync();
  constexpr int kFetching = kPhases * kConsumers;
  if (hopper::warpgroup() == kFetching) {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == kFetching * kWarpgroup) fetch(a, boxes);
    __syncwarp();
  } else {
    hopper::take_registers<registers_of(kPhases)>();
    consume(boxes);
  }
  hopper::cluster_sync();  // other blocks copy into this one's memory, and arrive there
}

}  // namespace cuda
}  // namespace smoothie
