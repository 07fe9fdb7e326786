// A launch: its clusters one after the other, and in each the fibers, copies and products in a random order.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "machine.h"
#include "matrix_unit.h"

namespace smoothie {
namespace emulator {
namespace {

std::mutex one_launch;
uint64_t launches = 0;

uint64_t mixed(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// An integer from the environment.
uint64_t setting(const char* name, uint64_t otherwise) {
  const char* given = std::getenv(name);
  return given ? std::strtoull(given, nullptr, 0) : otherwise;
}

// --- Deadlocks

void append(std::string& to, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string& to, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  to += text;
}

// What the fiber waits for.
std::string reason_of(const Fiber& fiber) {
  std::string text;
  const Block& block = *fiber.block;
  switch (fiber.wait) {
    case Wait::kNothing: return "nothing";
    case Wait::kBarrier: {
      uint64_t word;
      Barrier barrier;
      std::memcpy(&word, block.bytes + (fiber.address - kSharedBegin), 8);
      append(text, "barrier %u (byte %u of shared memory), parity %u", fiber.address, fiber.address - kSharedBegin,
             fiber.parity);
      if (Barrier::decode(word, barrier))
        append(text, " (its phase has parity %u, lacks %d of %d arrivals and %d bytes)", barrier.phase, barrier.pending,
               barrier.arrivals, barrier.bytes);
      return text;
    }
    case Wait::kThreads:
      append(text, "named barrier %u (%d of %d threads are there)", fiber.address, block.named[fiber.address].arrived,
             block.named[fiber.address].count ? block.named[fiber.address].count : block.live);
      return text;
    case Wait::kWarp:
      append(text, "its warp (%d of 32 threads are there)", block.warps[size_t(fiber.thread / 32)].arrived);
      return text;
    case Wait::kCluster: return "the cluster";
    case Wait::kProducts: return "products that not all warps of the warpgroup have issued";
  }
  return text;
}

void report_deadlock() {
  std::string text = "deadlock:";
  for (int b = 0; b < machine.n_blocks; ++b) {
    const Block& block = *machine.blocks[size_t(b)];
    std::vector<std::string> reasons;
    for (const Fiber* fiber : block.fibers) reasons.push_back(fiber->exited ? "" : reason_of(*fiber));
    for (size_t first = 0; first < reasons.size(); ++first) {
      const std::string reason = reasons[first];
      if (reason.empty()) continue;
      append(text, "\n  block (%u, %u), threads", block.index.x, block.index.y);
      for (size_t i = first; i < reasons.size(); ++i) {
        if (reasons[i] != reason) continue;
        const size_t begin = i;
        for (; i < reasons.size() && reasons[i] == reason; ++i) reasons[i].clear();
        append(text, i - begin == 1 ? " %zu" : " %zu-%zu", begin, i - 1);
      }
      append(text, " wait for %s", reason.c_str());
    }
  }
  wrong(nullptr, "%s", text.c_str());
}

// --- A cluster

// The fiber of the highest priority among a few drawn at random, so that some warps run ahead; priorities change at
// random.
Fiber* pick() {
  auto& runnable = machine.runnable;
  size_t best = below(runnable.size());
  for (int i = 1; i < machine.contestants; ++i) {
    const size_t other = below(runnable.size());
    if (*runnable[other]->priority > *runnable[best]->priority) best = other;
  }
  Fiber* picked = runnable[best];
  runnable[best] = runnable.back(), runnable.pop_back();
  if (random_bits() % 256 == 0) *picked->priority = (*picked->priority & ~0xFFFFFFFFull) + random_bits();
  return picked;
}

// One copy, or one product.
bool run_event() {
  const size_t which = below(machine.copies.size() + machine.ready.size());
  if (which < machine.copies.size()) {
    const Copy copy = machine.copies[which];
    machine.copies[which] = machine.copies.back(), machine.copies.pop_back();
    return execute(copy);
  }
  const size_t i = which - machine.copies.size();
  Warpgroup& group = *machine.ready[i];
  if (!execute(group)) return false;
  if (!is_ready(group)) {
    group.queued = false;
    machine.ready[i] = machine.ready.back(), machine.ready.pop_back();
  }
  return true;
}

void begin_block(Block& block, int rank, Index index, size_t first_fiber) {
  block.rank = rank, block.index = index;
  if (!block.memory) {
    block.memory = static_cast<uint8_t*>(std::aligned_alloc(1024, kGuard + kMaxShared + kGuard + 1024));
    block.bytes = block.memory + kGuard;
    block.view = std::make_unique<uint8_t[]>(kMaxShared);
    block.barriers.resize((kSharedBegin + kMaxShared) / 8);
  }
  std::memset(block.memory, kCanary, kGuard);
  std::memset(block.bytes, kPoison, machine.shared);
  std::memset(block.bytes + machine.shared, kCanary, kGuard);
  std::memset(block.view.get(), kPoison, machine.shared);
  block.barriers.assign(block.barriers.size(), false);
  block.waiting.clear();
  block.uninformed = nullptr;
  for (auto& barrier : block.named) {
    barrier.arrived = barrier.count = 0;
    std::memset(barrier.masks, 0, sizeof barrier.masks);
    barrier.waiting.clear();
  }
  block.warps.assign(size_t(machine.n_threads / 32), {});
  const uint64_t priority = machine.by_block ? random_bits() << 32 : 0;
  for (auto& warp : block.warps) warp.priority = priority + random_bits();
  block.groups.resize(size_t(machine.n_threads / 128));
  for (size_t g = 0; g < block.groups.size(); ++g) {
    Warpgroup& group = block.groups[g];
    group.block = &block, group.first_thread = int(128 * g);
    group.products.clear(), group.ends.clear(), group.commits.clear(), group.waiting.clear();
    group.first = group.first_group = 0;
    group.queued = false;
    for (int w = 0; w < 4; ++w) group.issued[w] = group.executed[w] = 0;
  }
  block.live = machine.n_threads;
  block.stale = false;
  block.fibers.clear();
  for (int t = 0; t < machine.n_threads; ++t) {
    Fiber& fiber = *machine.fibers[first_fiber + size_t(t)];
    fiber.block = &block, fiber.thread = t;
    fiber.priority = &block.warps[size_t(t / 32)].priority;
    fiber.exited = fiber.begun = false;
    fiber.wait = Wait::kNothing;
    fiber.products = fiber.groups = fiber.covered = fiber.uncommitted = 0;
    fiber.registers = fiber.n_flights = 0;
    prepare(fiber);
    block.fibers.push_back(&fiber);
    machine.runnable.push_back(&fiber);
  }
}

void run_cluster(int64_t x, int64_t y) {
  machine.runnable.clear(), machine.copies.clear(), machine.ready.clear(), machine.cluster_waiting.clear();
  machine.free_accumulators.clear();
  for (auto& accumulator : machine.accumulators) machine.free_accumulators.push_back(accumulator.get());
  // Copies and products: at once, soon, late, or only when no thread can go on.
  constexpr uint64_t kEagerness[] = {0, 1ull << 22, 1ull << 26, 1ull << 29, 1ull << 31, 1ull << 32};
  constexpr int kContestants[] = {1, 1, 3, 8};
  machine.eagerness = kEagerness[below(6)];
  machine.contestants = kContestants[below(4)];
  machine.by_block = below(2);
  for (int i = 0; i < machine.n_blocks; ++i)
    begin_block(*machine.blocks[size_t(i)], i, {unsigned(x * machine.n_blocks + i), unsigned(y), 0},
                size_t(i) * size_t(machine.n_threads));
  machine.live = machine.n_blocks * machine.n_threads;
  while (machine.live && !machine.failed) {
    const bool events = !machine.copies.empty() || !machine.ready.empty();
    if (events && (machine.runnable.empty() || random_bits() < machine.eagerness)) {
      if (!run_event()) return;
    } else if (machine.runnable.empty()) {
      report_deadlock();
    } else {
      enter(*pick());
    }
  }
}

}  // namespace

Block::~Block() { std::free(memory); }

const char* run(void (*body)(const void*), const void* context, int64_t x, int64_t y, int threads, int cluster,
                size_t shared) {
  const std::lock_guard<std::mutex> lock(one_launch);
  thread_local char message[sizeof machine.error];
  if (x < 1 || y < 1 || x > 0x7FFFFFFF || y > 65535) return "the grid has no blocks, or too many";
  if (threads < 32 || threads > 1024 || threads % 32) return "a block has 32 to 1024 threads, in whole warps";
  if (cluster < 1 || cluster > 8 || x % cluster) return "a cluster has 1 to 8 blocks, and divides the grid";
  if (shared > kMaxShared) return "a block has at most 232448 bytes of shared memory";
  const uint64_t extra_bits = setting("SMOOTHIE_EMULATOR_EXTRA_BITS", kExtraBits);
  if (extra_bits < kMinExtraBits || extra_bits > kMaxExtraBits) return "SMOOTHIE_EMULATOR_EXTRA_BITS is not 1 to 3";

  const uint64_t seed = setting("SMOOTHIE_EMULATOR_SEED", 0), launch = launches++;
  machine.random = mixed(mixed(seed) + launch) | 1;
  machine.body = body, machine.argument = context;
  machine.n_threads = threads, machine.n_blocks = cluster, machine.shared = shared;
  machine.extra_bits = int(extra_bits);
  machine.failed = false;
  machine.counts = {};
  std::memset(machine.product_pages, 0, sizeof machine.product_pages);
  std::memset(machine.copy_pages, 0, sizeof machine.copy_pages);
  machine.staged.clear();
  while (machine.fibers.size() < size_t(threads) * size_t(cluster)) machine.fibers.push_back(std::make_unique<Fiber>());
  while (machine.blocks.size() < size_t(cluster)) machine.blocks.push_back(std::make_unique<Block>());
  ::gridDim = {unsigned(x), unsigned(y), 1};
  ::blockDim = {unsigned(threads), 1, 1};

  std::vector<int64_t> order(size_t(x / cluster * y));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[below(i)]);
  for (int64_t i : order) {
    run_cluster(i % (x / cluster), i / (x / cluster));
    if (machine.failed) break;
  }
  if (!machine.failed) return nullptr;
  std::snprintf(message, sizeof message, "%.3900s (emulator, seed %llu, launch %llu)", machine.error,
                static_cast<unsigned long long>(seed), static_cast<unsigned long long>(launch));
  return message;
}

Counts counts() { return machine.counts; }

}  // namespace emulator
}  // namespace smoothie
