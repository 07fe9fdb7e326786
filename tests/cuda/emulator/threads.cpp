// Threads that wait for each other (warps, named barriers, clusters), ask for registers, and exit.
#include <algorithm>

#include "machine.h"

namespace smoothie {
namespace emulator {
namespace {

uint32_t live_mask(const Block& block, int warp) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= uint32_t(!block.fibers[size_t(32 * warp + i)]->exited) << i;
  return mask;
}

bool is_complete(const Block& block, const NamedBarrier& barrier) {
  return barrier.arrived && barrier.arrived == (barrier.count ? barrier.count : block.live);
}

void release(Block& block, NamedBarrier& barrier) {
  for (int w = 0; w < machine.n_threads / 32; ++w)
    if (barrier.masks[w] && live_mask(block, w) & ~barrier.masks[w])  // some may have arrived and exited
      FAIL("named barrier %d is complete without some threads of warp %d: 0x%08x are there",
           int(&barrier - block.named), w, barrier.masks[w]);
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
  barrier.arrived = 0;
  std::memset(barrier.masks, 0, sizeof barrier.masks);
}

NamedBarrier& arrive(int id, int count) {
  const Fiber& me = *machine.current;
  NamedBarrier& barrier = me.block->named[id];
  const uint32_t lane = 1u << me.thread % 32;
  if (barrier.arrived && barrier.count != count)
    FAIL("named barrier %d for %d threads, which others use for %d (0: all)", id, count, barrier.count);
  if (barrier.masks[me.thread / 32] & lane) FAIL("thread %d arrives twice at named barrier %d", me.thread, id);
  barrier.count = count;
  ++barrier.arrived;
  barrier.masks[me.thread / 32] |= lane;
  return barrier;
}

void sync(int id, int count) {
  Fiber& me = *machine.current;
  NamedBarrier& barrier = arrive(id, count);
  barrier.waiting.push_back(&me);
  me.wait = Wait::kThreads, me.address = uint32_t(id), me.parity = uint32_t(count);
  if (is_complete(*me.block, barrier)) release(*me.block, barrier);
  leave();
}

void check_named(int barrier, int threads) {
  if (barrier < 0 || barrier > 15) FAIL("named barrier %d; there are 16", barrier);
  if (threads < 32 || threads % 32 || threads > machine.n_threads)
    FAIL("named barrier %d for %d threads of a block of %d", barrier, threads, machine.n_threads);
}

uint64_t meet(bool shuffles, int bits, uint64_t given) {
  Fiber& me = *machine.current;
  Warp& warp = me.block->warps[size_t(me.thread / 32)];
  if (warp.arrived && (warp.shuffles != shuffles || warp.bits != bits))
    FAIL("threads of a warp meet in different shuffles or syncs");
  warp.shuffles = shuffles, warp.bits = bits;
  me.given = given;
  if (++warp.arrived < 32) {
    wait_for(Wait::kWarp);
    return me.result;
  }
  warp.arrived = 0;
  Fiber* const* fibers = &me.block->fibers[size_t(me.thread / 32 * 32)];
  for (int i = 0; i < 32; ++i) {
    fibers[i]->result = fibers[i ^ bits]->given;
    wake(fibers[i]);
  }
  leave();
  return me.result;
}

void release_cluster_if_complete() {
  auto& waiting = machine.cluster_waiting;
  if (int(waiting.size()) != machine.live) return;
  for (Fiber* fiber : waiting) wake(fiber);
  waiting.clear();
}

void check_registers(const Block& block) {
  int registers = 0, calls = 0;
  for (int first = 0; first < machine.n_threads; first += 128) {
    const int wanted = block.fibers[size_t(first)]->registers;
    for (int i = first; i < std::min(first + 128, machine.n_threads); ++i)
      if (block.fibers[size_t(i)]->registers != wanted)
        FAIL("warpgroup %d has not all of its threads at the same number of registers", first / 128);
    registers += 128 * wanted, calls += wanted != 0;
  }
  if (calls && calls != (machine.n_threads + 127) / 128) FAIL("some warpgroups have asked for registers, and some not");
  if (registers > 65536) FAIL("the block's warpgroups take %d registers; there are 65536", registers);
}

void exit_block(const Block& block) {
  for (const Copy& copy : machine.copies)
    if (copy.block == &block) FAIL("the block exits while a TMA copy to it, at %u, is under way", copy.to);
  for (const Warpgroup& group : block.groups)
    for (int i = 0; i < 128; ++i)
      if (block.fibers[size_t(group.first_thread + i)]->products != block.fibers[size_t(group.first_thread)]->products)
        FAIL("threads of warpgroup %d issued different numbers of products", group.first_thread / 128);
  for (size_t i = 0; i < kGuard; ++i)
    if (block.bytes[machine.shared + i] != kCanary || block.memory[i] != kCanary)
      FAIL("shared memory was written outside its %zu bytes", machine.shared);
  check_registers(block);
}

}  // namespace

void exit_thread() {
  Fiber& me = *machine.current;
  Block& block = *me.block;
  if (me.uncommitted) FAIL("the thread exits with products that it has not committed");
  if (me.n_flights) FAIL("the thread exits with products that it has not waited for");
  if (block.warps[size_t(me.thread / 32)].arrived) FAIL("the thread exits while others of its warp wait for it");
  me.exited = true;
  --machine.live;
  if (--block.live == 0)
    exit_block(block);
  else if (is_complete(block, block.named[0]) && !block.named[0].count)
    release(block, block.named[0]);
  if (machine.live) release_cluster_if_complete();
}

// --- What a thread calls

uint8_t* shared_memory() { return machine.current->block->bytes; }

uint32_t address_of(const void* shared) {
  const uint8_t* bytes = machine.current->block->bytes;
  const auto* at = static_cast<const uint8_t*>(shared);
  if (at < bytes || at > bytes + machine.shared) FAIL("an address outside the block's shared memory");
  return kSharedBegin + uint32_t(at - bytes);
}

uint32_t block_in_cluster() { return uint32_t(machine.current->block->rank); }

void cluster_sync() {
  Fiber& me = *machine.current;
  machine.cluster_waiting.push_back(&me);
  me.wait = Wait::kCluster;
  release_cluster_if_complete();
  leave();
}

void sync_threads(int barrier, int threads) {
  check_named(barrier, threads);
  sync(barrier, threads);
}

void arrive_threads(int barrier, int threads) {
  check_named(barrier, threads);
  NamedBarrier& reached = arrive(barrier, threads);
  if (is_complete(*machine.current->block, reached)) release(*machine.current->block, reached);
}

void sync_block() { sync(0, 0); }
void sync_warp() { meet(false, 0, 0); }

uint64_t shuffle_xor(uint64_t bytes, int bits) {
  if (bits < 0 || bits > 31) FAIL("a shuffle by %d", bits);
  return meet(true, bits, bytes);
}

void set_registers(int registers) {
  if (registers < 24 || registers > 256 || registers % 8)
    FAIL("%d registers; there are 24 to 256, in eights", registers);
  machine.current->registers = registers;
  yield();
}

}  // namespace emulator
}  // namespace smoothie
