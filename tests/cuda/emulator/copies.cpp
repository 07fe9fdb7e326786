// Tensor maps and the copies that the Tensor Memory Accelerator (TMA) makes by them; shared memory as products see it.
#include <algorithm>

#include "machine.h"

namespace smoothie {
namespace emulator {
namespace {

constexpr uint32_t kDescribed = 0x4D415021;  // a map that encode_tiled has written
constexpr int kNumberBytes = 2, kRowBytes = 128;

uint32_t rows_of(const TensorMap& map) { return map.tile[1] * map.tile[2] * map.tile[3]; }

// From here on products do not see these bytes' old contents, nor threads.
void poison(Block& block, uint32_t address, uint32_t bytes) {
  std::memset(block.bytes + (address - kSharedBegin), kPoison, bytes);
  std::memset(block.view.get() + (address - kSharedBegin), kPoison, bytes);
}

void issue_copy(uint32_t to, const TensorMap* map, uint32_t barrier, int rank, const Coordinates& at, uint32_t blocks) {
  if (reinterpret_cast<uintptr_t>(map) % 64) FAIL("a tensor map that is not at a multiple of 64");
  if (map->described != kDescribed) FAIL("a tensor map that was never encoded");
  if (map->rank != rank) FAIL("a TMA copy of %d dimensions by a tensor map of %d", rank, map->rank);
  const uint32_t rows = rows_of(*map), bytes = rows * kRowBytes, atom = rows >= 8 ? 1024 : 128;
  if (to % atom) FAIL("a TMA copy to %u, which is not a multiple of %u", to, atom);
  if (to < kSharedBegin || to + bytes > kSharedBegin + machine.shared)
    FAIL("a TMA copy to %u..%u, beyond the block's %zu bytes of shared memory", to, to + bytes, machine.shared);
  if (!blocks || blocks >> machine.n_blocks)
    FAIL("a TMA copy to blocks 0x%x of a cluster of %d", blocks, machine.n_blocks);
  for (int i = 0; i < machine.n_blocks; ++i) {
    if (!(blocks >> i & 1)) continue;
    Block& block = *machine.blocks[size_t(i)];
    if (!block.live) FAIL("a TMA copy to block %d of the cluster, which has exited", i);
    Barrier found;
    if (!is_informed(block) || !read_barrier(block, barrier, found)) give_up();
    for (const Copy& other : machine.copies)
      if (other.block == &block && to < other.to + rows_of(other.map) * kRowBytes && other.to < to + bytes)
        FAIL("a TMA copy to %u of block %d of the cluster, where another is under way", to, i);
    if (barrier + 8 > to && barrier < to + bytes) FAIL("a TMA copy onto its barrier %u", barrier);
    poison(block, to, bytes);
    machine.copies.push_back({*map, &block, to, barrier, at});
  }
  mark(machine.copy_pages, to, bytes);
  yield();
}

uint32_t this_block() { return 1u << machine.current->block->rank; }

void issue_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int rank, const Coordinates& at,
                     uint16_t blocks) {
  if (machine.n_blocks == 1) FAIL("a multicast TMA copy in a launch without a cluster");
  issue_copy(to, map, barrier, rank, at, blocks);
}

}  // namespace

const char* encode_tiled(TensorMap* map, const void* matrix, int rank, const int64_t* sizes, const int64_t* strides,
                         const int64_t* tile) {
  if (reinterpret_cast<uintptr_t>(map) % 64) return "the tensor map is not at a multiple of 64 bytes";
  if (!matrix || reinterpret_cast<uintptr_t>(matrix) % 16) return "the matrix does not begin at a multiple of 16 bytes";
  if (rank < 2 || rank > kMaxRank) return "the emulator has tensor maps of 2 to 4 dimensions";
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > int64_t(1) << 32) return "a size is not 1 to 2^32";
    if (tile[i] < 1 || tile[i] > 256) return "a size of the tile is not 1 to 256";
  }
  for (int i = 0; i + 1 < rank; ++i) {
    if (strides[i] < 0 || strides[i] % 16) return "a stride is not a multiple of 16 bytes";
    if (strides[i] >= int64_t(1) << 40) return "a stride is not less than 2^40 bytes";
    // cuda.h: the first stride is a row and its padding, each other one a number of the strides before it.
    const int64_t before = i ? strides[i - 1] : kNumberBytes;
    if (strides[i] < before * sizes[i]) return "a stride is less than what it steps over";
    if (strides[i] % before) return "a stride is not a multiple of the one before";
  }
  if (tile[0] * kNumberBytes % 16) return "a row of the tile is not a multiple of 16 bytes";
  if (tile[0] * kNumberBytes > kRowBytes) return "a row of the tile is longer than the swizzle's 128 bytes";
  if (tile[0] * kNumberBytes < kRowBytes) return "the emulator has tiles with rows of 128 bytes";
  *map = {};
  map->base = static_cast<const uint8_t*>(matrix), map->rank = rank, map->described = kDescribed;
  for (int i = 0; i < kMaxRank; ++i) {
    map->sizes[i] = i < rank ? sizes[i] : 1, map->tile[i] = i < rank ? uint32_t(tile[i]) : 1;
    if (i) map->strides[i] = i < rank ? strides[i - 1] : 0;
  }
  map->strides[0] = kNumberBytes;
  return nullptr;
}

// --- The asynchronous proxy: stores of threads are seen by products after a fence

// Pages that only products read were copied by the fence itself.
void refresh(Block& block) {
  if (!block.stale) return;
  block.stale = false;
  size_t from = 0;
  for (size_t i = 0; i <= machine.staged.size(); ++i) {
    const size_t to = i < machine.staged.size() ? std::min(machine.staged[i], machine.shared) : machine.shared;
    if (from < to) std::memcpy(block.view.get() + from, block.bytes + from, to - from);
    from = to + kPage;
  }
}

void mark(uint8_t* pages, uint32_t address, uint32_t bytes) {
  const size_t first = (address - kSharedBegin) / kPage, last = (address - kSharedBegin + bytes - 1) / kPage;
  if (std::all_of(pages + first, pages + last + 1, [](uint8_t marked) { return marked; })) return;
  // Fences until now counted on a later refresh of these pages.
  for (int i = 0; i < machine.n_blocks; ++i) refresh(*machine.blocks[size_t(i)]);
  std::fill(pages + first, pages + last + 1, uint8_t(1));
  machine.staged.clear();
  for (size_t i = 0; i < kMaxPages; ++i)
    if (machine.product_pages[i] && !machine.copy_pages[i]) machine.staged.push_back(i * kPage);
}

bool execute(const Copy& copy) {
  Block& block = *copy.block;
  const TensorMap& map = copy.map;
  const uint32_t rows = rows_of(map);
  for (uint32_t r = 0; r < rows; ++r) {
    const int64_t steps[kMaxRank] = {0, r % map.tile[1], r / map.tile[1] % map.tile[2], r / map.tile[1] / map.tile[2]};
    const uint8_t* row = map.base;
    bool inside = true;
    for (int i = 1; i < kMaxRank; ++i) {
      const int64_t at = copy.at[size_t(i)] + steps[i];
      inside &= at >= 0 && at < map.sizes[i];
      if (inside) row += at * map.strides[i];
    }
    for (int part = 0; part < 8; ++part) {
      uint16_t numbers[8] = {};  // zeros outside the matrix
      const int64_t column = int64_t(copy.at[0]) + 8 * part;
      const int64_t low = std::max<int64_t>(column, 0), high = std::min(column + 8, map.sizes[0]);
      if (inside && low < high)
        std::memcpy(numbers + (low - column), row + low * kNumberBytes, size_t(high - low) * kNumberBytes);
      const uint32_t to = swizzled(copy.to + r * kRowBytes + uint32_t(part) * 16) - kSharedBegin;
      std::memcpy(block.bytes + to, numbers, 16);
      std::memcpy(block.view.get() + to, numbers, 16);
    }
  }
  Barrier barrier;
  if (!read_barrier(block, copy.barrier, barrier) ||
      !add_bytes(block, copy.barrier, barrier, -int64_t(rows) * kRowBytes))
    return false;
  write_barrier(block, copy.barrier, barrier);
  return true;
}

// --- What a thread calls

void prefetch_map(const TensorMap* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 || map->described != kDescribed)
    FAIL("a tensor map that was never encoded, or not at a multiple of 64");
}

void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row) {
  issue_copy(to, map, barrier, 2, {column, row}, this_block());
}

void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, uint16_t blocks) {
  issue_multicast(to, map, barrier, 2, {column, row}, blocks);
}

void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile, int pair) {
  issue_copy(to, map, barrier, 4, {column, 0, tile, pair}, this_block());
}

void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile, int pair,
                      uint16_t blocks) {
  issue_multicast(to, map, barrier, 4, {column, 0, tile, pair}, blocks);
}

void stores_before_products() {
  Block& block = *machine.current->block;
  for (size_t page : machine.staged)
    if (page < machine.shared)
      std::memcpy(block.view.get() + page, block.bytes + page, std::min(kPage, machine.shared - page));
  block.stale = true;
  yield();
}

}  // namespace emulator
}  // namespace smoothie
