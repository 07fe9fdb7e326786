// Barriers in shared memory (mbarrier): arrivals and bytes that a phase waits for.
#include <algorithm>
#include <cstdlib>

#include "machine.h"

namespace smoothie {
namespace emulator {
namespace {

constexpr int kMaxCount = (1 << 20) - 1;
constexpr uint64_t kMark = 1;  // of a valid barrier; poisoned memory has 3

bool arrive(const Block& block, uint32_t address, Barrier& barrier) {
  if (barrier.pending == 0)
    return wrong(&block, "barrier %u of block (%u, %u) gets more arrivals in a phase than the %d it was made for",
                 address, block.index.x, block.index.y, barrier.arrivals);
  --barrier.pending;
  return true;
}

void store(Block& block, uint32_t address, const Barrier& barrier) {
  const uint64_t word = barrier.encode();
  std::memcpy(block.bytes + (address - kSharedBegin), &word, 8);
}

}  // namespace

uint64_t Barrier::encode() const {
  return uint64_t(pending) | uint64_t(arrivals) << 20 | (uint64_t(bytes) & 0x1FFFFF) << 40 | uint64_t(phase) << 61 |
         kMark << 62;
}

bool Barrier::decode(uint64_t word, Barrier& to) {
  to.pending = int(word & 0xFFFFF), to.arrivals = int(word >> 20 & 0xFFFFF);
  to.bytes = int(uint32_t(word >> 40 & 0x1FFFFF) << 11) >> 11, to.phase = uint32_t(word >> 61 & 1);
  return word >> 62 == kMark;
}

bool read_barrier(const Block& block, uint32_t address, Barrier& barrier) {
  if (address % 8) return wrong(&block, "barrier %u is not at a multiple of 8", address);
  if (address < kSharedBegin || address + 8 > kSharedBegin + machine.shared)
    return wrong(&block, "barrier %u lies outside shared memory", address);
  uint64_t word;
  std::memcpy(&word, block.bytes + (address - kSharedBegin), 8);
  if (!block.barriers[address / 8]) return wrong(&block, "barrier %u is not initialised", address);
  if (!Barrier::decode(word, barrier)) return wrong(&block, "barrier %u was overwritten", address);
  return true;
}

void write_barrier(Block& block, uint32_t address, Barrier barrier) {
  const bool ends = barrier.pending == 0 && barrier.bytes == 0;
  if (ends) barrier.phase ^= 1, barrier.pending = barrier.arrivals;
  store(block, address, barrier);
  if (!ends) return;
  auto& waiting = block.waiting;
  for (size_t i = 0; i < waiting.size();)
    if (waiting[i]->address == address) {
      wake(waiting[i]);
      waiting[i] = waiting.back(), waiting.pop_back();
    } else {
      ++i;
    }
}

bool add_bytes(const Block& block, uint32_t address, Barrier& barrier, int64_t bytes) {
  if (std::abs(barrier.bytes + bytes) > kMaxCount)
    return wrong(&block, "barrier %u cannot count %lld bytes", address, static_cast<long long>(barrier.bytes + bytes));
  barrier.bytes += int(bytes);
  return true;
}

bool is_informed(const Block& block) {
  return !block.uninformed ||
         wrong(nullptr, "barrier_init_done is missing: copies and other blocks do not see the barriers yet");
}

// --- What a thread calls

void barrier_init(uint32_t address, uint32_t arrivals) {
  Block& block = *machine.current->block;
  if (address % 8 || address < kSharedBegin || address + 8 > kSharedBegin + machine.shared)
    FAIL("barrier %u is not at a multiple of 8, or outside shared memory", address);
  if (!arrivals || arrivals > uint32_t(kMaxCount)) FAIL("barrier %u for %u arrivals", address, arrivals);
  if (block.barriers[address / 8]) FAIL("barrier %u is initialised twice", address);
  block.barriers[address / 8] = true;
  block.uninformed = machine.current;
  store(block, address, {int(arrivals), int(arrivals), 0, 0});
  yield();
}

void barrier_init_done() {
  Block& block = *machine.current->block;
  if (block.uninformed == machine.current) block.uninformed = nullptr;
  yield();
}

void barrier_expect(uint32_t address, uint32_t bytes) {
  Block& block = *machine.current->block;
  Barrier barrier;
  if (!read_barrier(block, address, barrier) || !add_bytes(block, address, barrier, bytes) ||
      !arrive(block, address, barrier))
    give_up();
  write_barrier(block, address, barrier);
  yield();
}

// Never an address in the block's own memory: the block's number + 1 stands above.
uint32_t barrier_of_block(uint32_t barrier, uint32_t block) { return barrier | (block + 1) << kBlockBits; }

void barrier_arrive(uint32_t remote) {
  const uint32_t address = remote & ((1u << kBlockBits) - 1), rank = (remote >> kBlockBits) - 1;
  if (!(remote >> kBlockBits)) FAIL("an arrival at %u, which is no barrier_of_block", remote);
  if (rank >= uint32_t(machine.n_blocks)) FAIL("an arrival at block %u of a cluster of %d", rank, machine.n_blocks);
  Block& block = *machine.blocks[rank];
  if (!block.live) FAIL("an arrival at block %u of the cluster, which has exited", rank);
  Barrier barrier;
  if ((&block != machine.current->block && !is_informed(block)) || !read_barrier(block, address, barrier) ||
      !arrive(block, address, barrier))
    give_up();
  write_barrier(block, address, barrier);
  yield();
}

void barrier_wait(uint32_t address, uint32_t parity) {
  Fiber& me = *machine.current;
  if (parity > 1) FAIL("parity %u", parity);
  yield();
  for (;;) {
    Barrier barrier;
    if (!read_barrier(*me.block, address, barrier)) give_up();
    if (barrier.phase != parity) return;
    me.block->waiting.push_back(&me);
    wait_for(Wait::kBarrier, address, parity);
  }
}

}  // namespace emulator
}  // namespace smoothie
