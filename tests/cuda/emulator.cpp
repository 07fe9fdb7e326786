#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SMOOTHIE_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SMOOTHIE_ASAN
#endif
#ifdef SMOOTHIE_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && !defined(SMOOTHIE_UCONTEXT)
#define SMOOTHIE_OWN_SWITCH  // swapcontext asks the system each time
extern "C" void smoothie_switch(void** from, void* to);
#else
#include <ucontext.h>
#endif

smoothie::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace smoothie {
namespace emulator {
namespace {

constexpr uint32_t kSharedBegin = 1024;  // Hopper keeps the first KiB for itself
constexpr size_t kMaxShared = 232448, kGuard = 4096, kPage = 1024, kMaxPages = kMaxShared / kPage;
constexpr uint8_t kPoison = 0xFF, kCanary = 0xA5;
constexpr uint32_t kSumsPoison = 0x7FC0BAD0;  // a NaN that no arithmetic makes
constexpr int kBlockBits = 24, kMaxFlights = 8, kMaxGroups = 8, kMaxTx = (1 << 20) - 1, kSystemPage = 4096;
#ifdef SMOOTHIE_ASAN
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

// --- Fibers

#ifdef SMOOTHIE_OWN_SWITCH
using Context = void*;  // the stack pointer; all else is on the stack
asm(R"(
.text
.p2align 4
.local smoothie_switch
.type smoothie_switch, @function
smoothie_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size smoothie_switch, .-smoothie_switch
)");
#else
using Context = ucontext_t;
#endif

enum class Wait { kNothing, kBarrier, kThreads, kWarp, kCluster, kProducts };

struct Block;
struct Accumulator;

// Registers that products own: from the first product to the wait for the last.
struct Flight {
  float* sums;
  Accumulator* accumulator;
  uint64_t last;  // number of the last product
};

struct Fiber {
  Context context;
  uint8_t* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block;
  uint64_t* priority;  // of its warp
  int thread;
  bool exited;
  Wait wait;
  uint32_t address, parity;  // of what it waits for
  uint64_t given, result;    // of a shuffle
  uint64_t products, uncommitted, groups;
  uint64_t ends[kMaxGroups];  // of the latest groups: products up to there
  uint64_t covered;           // products it has waited for
  bool begun;
  int registers, n_flights;
  Flight flights[kMaxFlights];
};

// --- What blocks have

struct Warp {
  int arrived, bits;
  bool shuffles;
  uint64_t priority;
};

struct NamedBarrier {
  int arrived, count;  // 0: all threads
  uint32_t masks[32];
  std::vector<Fiber*> waiting;
};

// 64 bits of shared memory. The poison is no barrier.
struct Barrier {
  int pending, arrivals, tx;
  uint32_t phase;

  static constexpr uint64_t kMark = 1;
  uint64_t encode() const {
    return uint64_t(pending) | uint64_t(arrivals) << 20 | (uint64_t(tx) & 0x1FFFFF) << 40 | uint64_t(phase) << 61 |
           kMark << 62;
  }
  static bool decode(uint64_t word, Barrier& to) {
    to.pending = int(word & 0xFFFFF), to.arrivals = int(word >> 20 & 0xFFFFF);
    to.tx = int(word >> 40 & 0x1FFFFF) << 11 >> 11, to.phase = uint32_t(word >> 61 & 1);
    return word >> 62 == kMark;
  }
};

struct Accumulator {
  float sums[64 * 128];
  int columns, users;
};

struct Product {
  uint64_t a, b;
  int columns, issued[4];                       // threads of each warp
  bool half, down_a, in_registers, add, fresh;  // fresh: the first of its accumulator; in registers: a, and b is down
  uint8_t done;                                 // warps
  Accumulator* accumulator;
  const uint32_t* registers[128];
};

struct Warpgroup {
  Block* block;
  int first_thread;
  std::deque<Product> products;  // from `first` on
  uint64_t first;
  std::deque<uint64_t> ends;  // of groups, from `first_group` on
  std::deque<int> commits;
  uint64_t first_group;
  uint64_t issued[4], executed[4];  // by warps: products that all 32 threads have issued
  bool queued;
  std::vector<Fiber*> waiting;
};

struct Block {
  int rank;
  Index index;
  uint8_t* memory = nullptr;  // guard, bytes, guard
  uint8_t* bytes;
  std::unique_ptr<uint8_t[]> view;  // what matrix products see of it
  std::vector<bool> barriers;       // by address / 8
  std::vector<Fiber*> waiting;      // for one of the barriers
  Fiber* uninformed;                // initialised a barrier, and has told nobody
  NamedBarrier named[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  int live;
  bool stale;  // a fence was called since `view` was refreshed
  std::vector<Fiber*> fibers;
};

struct Copy {
  TensorMap map;
  Block* block;
  uint32_t to, barrier;
  int column, row, tile;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // grows, and stays from launch to launch
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  std::vector<Accumulator*> free_accumulators;
  int n_threads, n_blocks;
  size_t shared;

  Context context;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
  Fiber* current = nullptr;
  void (*body)(const void*);
  const void* argument;

  std::vector<Fiber*> runnable;
  std::vector<Copy> copies;
  std::vector<Warpgroup*> ready;
  int live, in_cluster;  // threads; those that wait for the cluster
  std::vector<Fiber*> cluster_waiting;

  // Pages that products read, pages that box copies write, pages that only products read: what threads write for them.
  uint8_t product_pages[kMaxPages], box_pages[kMaxPages];
  std::vector<size_t> staged;

  uint64_t random, eagerness;
  int contestants;
  bool by_block;  // blocks run ahead of others, not only warps
  bool failed;
  char error[4096];
  Counts counts;

  ~Machine() {
    for (auto& fiber : fibers) munmap(fiber->stack - kSystemPage, kStack + kSystemPage);
    for (auto& block : blocks) std::free(block->memory);
  }
} machine;

std::mutex one_launch;
uint64_t launches = 0;

uint64_t mixed(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

uint64_t random_bits() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random * 0x2545F4914F6CDD1Du >> 32;
}
size_t below(size_t n) { return size_t(random_bits() * n >> 32); }

// --- Errors: the first one stands

void write_error(const char* prefix, const char* format, va_list arguments) {
  if (machine.failed) return;
  machine.failed = true;
  const int at = std::snprintf(machine.error, sizeof machine.error, "%s", prefix);
  std::vsnprintf(machine.error + at, sizeof machine.error - size_t(at), format, arguments);
}

// Of the thread that runs, or of what happens by itself in a block.
__attribute__((format(printf, 2, 3))) bool wrong(const Block* block, const char* format, ...) {
  char prefix[96] = "";
  if (machine.current) {
    const Fiber& fiber = *machine.current;
    std::snprintf(prefix, sizeof prefix, "block (%u, %u), thread %d: ", fiber.block->index.x, fiber.block->index.y,
                  fiber.thread);
  } else if (block) {
    std::snprintf(prefix, sizeof prefix, "block (%u, %u): ", block->index.x, block->index.y);
  }
  va_list arguments;
  va_start(arguments, format);
  write_error(prefix, format, arguments);
  va_end(arguments);
  return false;
}

// --- Switching

void enter(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = {unsigned(fiber.thread), 0, 0};
  blockIdx = fiber.block->index;
  ++machine.counts.switches;
#ifdef SMOOTHIE_ASAN
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack, kStack);
#endif
#ifdef SMOOTHIE_OWN_SWITCH
  smoothie_switch(&machine.context, fiber.context);
#else
  swapcontext(&machine.context, &fiber.context);
#endif
#ifdef SMOOTHIE_ASAN
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

void leave() {
  Fiber& fiber = *machine.current;
#ifdef SMOOTHIE_ASAN
  __sanitizer_start_switch_fiber(fiber.exited ? nullptr : &fiber.fake_stack, machine.stack_bottom, machine.stack_size);
#endif
#ifdef SMOOTHIE_OWN_SWITCH
  smoothie_switch(&fiber.context, machine.context);
#else
  swapcontext(&fiber.context, &machine.context);
#endif
#ifdef SMOOTHIE_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.stack_bottom, &machine.stack_size);
#endif
}

void yield() {
  machine.runnable.push_back(machine.current);
  leave();
}

void wake(Fiber* fiber) {
  fiber->wait = Wait::kNothing;
  machine.runnable.push_back(fiber);
}

void wait_for(Wait what, uint32_t address = 0, uint32_t parity = 0) {
  Fiber& me = *machine.current;
  me.wait = what, me.address = address, me.parity = parity;
  leave();
}

// The launch is over: nobody comes back to this fiber.
[[noreturn]] void give_up() {
  for (;;) leave();
}

#define FAIL(...) (wrong(nullptr, __VA_ARGS__), give_up())

void exit_thread();

void fiber_main() {
#ifdef SMOOTHIE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  machine.body(machine.argument);
  exit_thread();
  give_up();
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* pages = mmap(nullptr, kStack + kSystemPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    mprotect(pages, kSystemPage, PROT_NONE);
    fiber.stack = static_cast<uint8_t*>(pages) + kSystemPage;
  }
#ifdef SMOOTHIE_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStack);
  fiber.fake_stack = nullptr;
#endif
#ifdef SMOOTHIE_OWN_SWITCH
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + kStack) - 3;  // as after a call
  top[0] = 0;                                                         // fiber_main's return address: none
  *--top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

// --- Barriers in shared memory

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

// Ends the phase where all is there.
void write_barrier(Block& block, uint32_t address, Barrier barrier) {
  const bool ends = barrier.pending == 0 && barrier.tx == 0;
  if (ends) barrier.phase ^= 1, barrier.pending = barrier.arrivals;
  const uint64_t word = barrier.encode();
  std::memcpy(block.bytes + (address - kSharedBegin), &word, 8);
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

bool add_tx(const Block& block, uint32_t address, Barrier& barrier, int64_t bytes) {
  if (std::abs(barrier.tx + bytes) > kMaxTx)
    return wrong(&block, "barrier %u cannot count %lld bytes", address, static_cast<long long>(barrier.tx + bytes));
  barrier.tx += int(bytes);
  return true;
}

bool arrive(const Block& block, uint32_t address, Barrier& barrier) {
  if (barrier.pending == 0)
    return wrong(&block, "barrier %u of block (%u, %u) gets more arrivals in a phase than the %d it was made for",
                 address, block.index.x, block.index.y, barrier.arrivals);
  --barrier.pending;
  return true;
}

bool informed(const Block& block) {
  return !block.uninformed || wrong(nullptr, "barrier_init_done is missing: others do not know the barriers yet");
}

// --- Box copies

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// After a fence, what threads wrote is seen. Pages that only products read were copied by the fence itself.
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
    if (machine.product_pages[i] && !machine.box_pages[i]) machine.staged.push_back(i * kPage);
}

void poison(Block& block, uint32_t address, uint32_t bytes) {
  std::memset(block.bytes + (address - kSharedBegin), kPoison, bytes);
  std::memset(block.view.get() + (address - kSharedBegin), kPoison, bytes);
}

bool execute(const Copy& copy) {
  Block& block = *copy.block;
  const TensorMap& map = copy.map;
  for (int r = 0; r < map.box_rows; ++r)
    for (int part = 0; part < 8; ++part) {
      uint16_t numbers[8] = {};
      const int64_t of_map = int64_t(copy.row) + r, column = int64_t(copy.column) + 8 * part;
      const int64_t row = map.tiles ? 2 * (of_map / 2 * map.tiles + copy.tile) + of_map % 2 : of_map;
      if (of_map >= 0 && of_map < map.rows) {
        const int64_t low = std::max<int64_t>(column, 0), high = std::min(column + 8, map.columns);
        if (low < high)
          std::memcpy(numbers + (low - column), map.base + row * map.row_bytes + low * 2, (high - low) * 2);
      }
      const uint32_t to = swizzled(copy.to + uint32_t(r) * 128 + uint32_t(part) * 16) - kSharedBegin;
      std::memcpy(block.bytes + to, numbers, 16);
      std::memcpy(block.view.get() + to, numbers, 16);
    }
  ++machine.counts.boxes;
  Barrier barrier;
  if (!read_barrier(block, copy.barrier, barrier) ||
      !add_tx(block, copy.barrier, barrier, -int64_t(map.box_rows) * 128))
    return false;
  write_barrier(block, copy.barrier, barrier);
  return true;
}

void issue_boxes(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, uint32_t blocks,
                 int tile = 0) {
  if (reinterpret_cast<uintptr_t>(map) % 64) FAIL("a tensor map that is not at a multiple of 64");
  if (map->described != kDescribed) FAIL("a tensor map that nobody described");
  if (map->tiles ? tile < 0 || tile >= map->tiles : tile)
    FAIL("tile %d of a tensor map with %lld", tile, static_cast<long long>(map->tiles));
  const uint32_t bytes = uint32_t(map->box_rows) * 128;
  if (to % 128 || (map->box_rows >= 8 && to % 1024))
    FAIL("a box copy to %u, which is not a multiple of %d", to, map->box_rows >= 8 ? 1024 : 128);
  if (to < kSharedBegin || to + bytes > kSharedBegin + machine.shared)
    FAIL("a box copy to %u..%u, beyond the block's %zu bytes of shared memory", to, to + bytes, machine.shared);
  if (!blocks || blocks >> machine.n_blocks)
    FAIL("a box copy to blocks 0x%x of a cluster of %d", blocks, machine.n_blocks);
  for (int i = 0; i < machine.n_blocks; ++i) {
    if (!(blocks >> i & 1)) continue;
    Block& block = *machine.blocks[size_t(i)];
    if (!block.live) FAIL("a box copy to block %d of the cluster, which has exited", i);
    Barrier found;
    if (!informed(block) || !read_barrier(block, barrier, found)) give_up();
    for (const Copy& other : machine.copies)
      if (other.block == &block && to < other.to + uint32_t(other.map.box_rows) * 128 && other.to < to + bytes)
        FAIL("a box copy to %u of block %d of the cluster, where another is under way", to, i);
    if (barrier + 8 > to && barrier < to + bytes) FAIL("a box copy onto its barrier %u", barrier);
    poison(block, to, bytes);
    machine.copies.push_back({*map, &block, to, barrier, column, row, tile});
  }
  mark(machine.box_pages, to, bytes);
  yield();
}

// --- Matrix products

struct Operand {
  uint32_t start, stride;
  int eights;  // of rows
};

bool decode(const Block& block, uint64_t description, bool down, int rows, Operand& to) {
  to.start = uint32_t(description & 0x3FFF) << 4, to.stride = uint32_t(description >> 32 & 0x3FFF) << 4;
  if (description >> 62 != 1) return wrong(&block, "a matrix description without the 128-byte swizzle");
  if (description & 0x3FFFC000C000C000u)
    return wrong(&block, "a matrix description 0x%016llx with bits that none has",
                 static_cast<unsigned long long>(description));
  if (to.start & 0x380) return wrong(&block, "a matrix that begins at %u, amid eight swizzled rows", to.start);
  if (down ? to.start & 0x70 : (to.start & 0x70) > 0x60)
    return wrong(&block, "a matrix that begins at %u, and goes beyond its 128 bytes", to.start);
  const int eights = down ? 2 : rows / 8;
  const uint32_t end = (to.start & ~127u) + uint32_t(eights - 1) * to.stride + 1024;
  if (to.start < kSharedBegin || end > kSharedBegin + machine.shared)
    return wrong(&block, "a matrix %u..%u that lies outside shared memory", to.start, end);
  to.eights = eights;
  return true;
}

void widen_eight(const uint8_t* from, bool half, float* to) {
  uint16_t numbers[8];
  std::memcpy(numbers, from, 16);
  if (half)
    for (int i = 0; i < 8; ++i) to[i] = widen(Half{numbers[i]});
  else
    for (int i = 0; i < 8; ++i) to[i] = widen(BFloat16{numbers[i]});
}

// One row of 16 numbers.
void read_row(const Block& block, const Operand& from, int row, bool half, float* to) {
  const uint32_t at = from.start + uint32_t(row / 8) * from.stride + uint32_t(row % 8) * 128;
  for (int part = 0; part < 2; ++part)
    widen_eight(block.view.get() + (swizzled(at + uint32_t(part) * 16) - kSharedBegin), half, to + 8 * part);
}

// 64 numbers of each of 16 rows: columns of a matrix.
template <class To>
void read_columns(const Block& block, const Operand& from, bool half, const To& to) {
  for (int k = 0; k < 16; ++k)
    for (int part = 0; part < 8; ++part) {
      float numbers[8];
      const uint32_t at = from.start + uint32_t(k / 8) * from.stride + uint32_t(k % 8) * 128 + uint32_t(part) * 16;
      widen_eight(block.view.get() + (swizzled(at) - kSharedBegin), half, numbers);
      for (int i = 0; i < 8; ++i) to(8 * part + i, k, numbers[i]);
    }
}

float half_of_word(uint32_t word, int upper, bool half) {
  const uint16_t bits = uint16_t(word >> 16 * upper);
  return half ? widen(Half{bits}) : widen(BFloat16{bits});
}

// sums [rows x kColumns] += a [rows x 16] . b [16 x kColumns]
template <int kColumns>
void product(float* __restrict sums, const float (*__restrict a)[16], const float (*__restrict b)[kColumns], bool add) {
  constexpr int kPart = 32, kRows = 2;
  for (int r = 0; r < 16; r += kRows)
    for (int c = 0; c < kColumns; c += kPart) {
      float total[kRows][kPart] = {};
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kPart; ++j) total[i][j] += a[r + i][k] * b[k][c + j];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kPart; ++j) {
          float& to = sums[(r + i) * kColumns + c + j];
          to = add ? to + total[i][j] : total[i][j];
        }
    }
}

template <int kColumns>
void multiply_warps(const Block& block, const Product& in, const Operand& a, const Operand& b, unsigned warps) {
  alignas(64) float right[16][kColumns], left[64][16];
  if (in.in_registers) {
    if constexpr (kColumns == 64) read_columns(block, b, in.half, [&](int n, int k, float x) { right[k][n] = x; });
  } else {
    for (int n = 0; n < kColumns; ++n) {
      float row[16];
      read_row(block, b, n, in.half, row);
      for (int k = 0; k < 16; ++k) right[k][n] = row[k];
    }
  }
  if (in.in_registers) {
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < 8 && (warps >> thread / 32 & 1);
           ++i)  // word i / 2: row + 8 (word mod 2), column + 8 (word / 2)
        left[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8][thread % 4 * 2 + i % 2 + i / 4 * 8] =
            half_of_word(in.registers[thread][i / 2], i % 2, in.half);
  } else if (in.down_a) {
    read_columns(block, a, in.half, [&](int m, int k, float x) { left[m][k] = x; });
  } else {
    for (int r = 0; r < 64; ++r)
      if (warps >> r / 16 & 1) read_row(block, a, r, in.half, left[r]);
  }
  for (int w = 0; w < 4; ++w)
    if (warps >> w & 1) product<kColumns>(in.accumulator->sums + 16 * w * kColumns, left + 16 * w, right, in.add);
}

bool is_executed(const Warpgroup& group, uint64_t covered) {
  return *std::min_element(group.executed, group.executed + 4) >= covered;
}

bool is_issued(const Product& in) { return *std::min_element(in.issued, in.issued + 4) == 32; }

// The next product of a warpgroup, for the warps that have issued it: each has its own 16 rows.
bool execute(Warpgroup& group) {
  uint64_t number = std::numeric_limits<uint64_t>::max();
  for (int w = 0; w < 4; ++w)
    if (group.executed[w] < group.issued[w]) number = std::min(number, group.executed[w]);
  unsigned warps = 0;
  for (int w = 0; w < 4; ++w)
    if (group.executed[w] == number && number < group.issued[w]) warps |= 1u << w, ++group.executed[w];
  Product& in = group.products[number - group.first];
  Block& block = *group.block;
  refresh(block);
  Operand a{}, b{};
  if (!in.in_registers && !decode(block, in.a, in.down_a, 64, a)) return false;
  if (!decode(block, in.b, in.in_registers, in.columns, b)) return false;
  for (const Operand* read : {&a, &b})
    for (int i = 0; i < read->eights; ++i)
      mark(machine.product_pages, (read->start & ~127u) + uint32_t(i) * read->stride, 1024);
  const auto multiply = in.columns == 128  ? multiply_warps<128>
                        : in.columns == 64 ? multiply_warps<64>
                                           : multiply_warps<32>;
  multiply(block, in, a, b, warps);
  in.done |= uint8_t(warps);
  if (in.done == 15) ++machine.counts.products;
  while (!group.products.empty() && group.products.front().done == 15 && is_issued(group.products.front()))
    group.products.pop_front(), ++group.first;
  auto& waiting = group.waiting;
  for (size_t i = 0; i < waiting.size();)
    if (is_executed(group, waiting[i]->covered)) {
      wake(waiting[i]);
      waiting[i] = waiting.back(), waiting.pop_back();
    } else {
      ++i;
    }
  return true;
}

bool is_ready(const Warpgroup& group) {
  for (int w = 0; w < 4; ++w)
    if (group.executed[w] < group.issued[w]) return true;
  return false;
}

Accumulator* take_accumulator(int columns) {
  if (machine.free_accumulators.empty()) {
    machine.accumulators.push_back(std::make_unique<Accumulator>());
    machine.free_accumulators.push_back(machine.accumulators.back().get());
  }
  Accumulator* taken = machine.free_accumulators.back();
  machine.free_accumulators.pop_back();
  taken->columns = columns, taken->users = 0;
  std::fill_n(taken->sums, 64 * columns, std::numeric_limits<float>::quiet_NaN());
  return taken;
}

float& element(Accumulator& accumulator, int thread, int i) {
  return accumulator.sums[row_of(thread, i) * accumulator.columns + column_of(thread, i)];
}

bool are_poisoned(const float* sums, int n) {
  uint32_t differ = 0;
  for (int i = 0; i < n; ++i) differ |= bits_of(sums[i]) ^ kSumsPoison;
  return !differ;
}

// Registers of products that are done belong to the thread again.
void land(Fiber& fiber, uint64_t covered) {
  for (int i = 0; i < fiber.n_flights;) {
    Flight& flight = fiber.flights[i];
    if (flight.last >= covered) {
      ++i;
      continue;
    }
    Accumulator& accumulator = *flight.accumulator;
    const int n = accumulator.columns / 2;
    if (!are_poisoned(flight.sums, n)) FAIL("sums were written while their product was under way");
    for (int j = 0; j < n; ++j) flight.sums[j] = element(accumulator, fiber.thread, j);
    if (++accumulator.users == 128) machine.free_accumulators.push_back(&accumulator);
    flight = fiber.flights[--fiber.n_flights];
  }
}

Warpgroup& my_group() {
  Fiber& me = *machine.current;
  const size_t group = size_t(me.thread / 128);
  if (group >= me.block->groups.size())
    FAIL("products need a whole warpgroup; the block has %d threads", machine.n_threads);
  return me.block->groups[group];
}

// --- Threads that wait for each other

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
    if (barrier.masks[w] && barrier.masks[w] != live_mask(block, w))
      FAIL("named barrier %d is complete without some threads of warp %d: 0x%08x are there",
           int(&barrier - block.named), w, barrier.masks[w]);
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
  barrier.arrived = 0;
  std::memset(barrier.masks, 0, sizeof barrier.masks);
}

void sync(int id, int count) {
  Fiber& me = *machine.current;
  Block& block = *me.block;
  NamedBarrier& barrier = block.named[id];
  if (barrier.arrived && barrier.count != count)
    FAIL("named barrier %d for %d threads, which others use for %d (0: all)", id, count, barrier.count);
  barrier.count = count;
  ++barrier.arrived;
  barrier.masks[me.thread / 32] |= 1u << me.thread % 32;
  barrier.waiting.push_back(&me);
  me.wait = Wait::kThreads, me.address = uint32_t(id), me.parity = uint32_t(count);
  if (is_complete(block, barrier)) release(block, barrier);
  leave();
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

void release_cluster() {
  for (Fiber* fiber : machine.cluster_waiting) wake(fiber);
  machine.cluster_waiting.clear();
}

// --- The end of a thread, of a block

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

void exit_thread() {
  Fiber& me = *machine.current;
  Block& block = *me.block;
  if (me.uncommitted) FAIL("the thread exits with products that it has not committed");
  if (me.n_flights) FAIL("the thread exits with products that it has not waited for");
  const Warp& warp = block.warps[size_t(me.thread / 32)];
  if (warp.arrived) FAIL("the thread exits while others of its warp wait for it");
  me.exited = true;
  --machine.live;
  if (--block.live) {
    if (is_complete(block, block.named[0]) && !block.named[0].count) release(block, block.named[0]);
  } else {
    for (const Copy& copy : machine.copies)
      if (copy.block == &block) FAIL("the block exits while a box copy to it, at %u, is under way", copy.to);
    for (const Warpgroup& group : block.groups)
      for (int i = 0; i < 128; ++i)
        if (block.fibers[size_t(group.first_thread + i)]->products !=
            me.block->fibers[size_t(group.first_thread)]->products)
          FAIL("threads of warpgroup %d issued different numbers of products", group.first_thread / 128);
    for (size_t i = 0; i < kGuard; ++i)
      if (block.bytes[machine.shared + i] != kCanary || block.memory[i] != kCanary)
        FAIL("shared memory was written outside its %zu bytes", machine.shared);
    check_registers(block);
  }
  if (machine.live && int(machine.cluster_waiting.size()) == machine.live) release_cluster();
}

// --- The scheduler

void append(std::string& to, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string& to, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  to += text;
}

std::string what_for(const Fiber& fiber) {
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
               barrier.arrivals, barrier.tx);
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
    for (const Fiber* fiber : block.fibers) reasons.push_back(fiber->exited ? "" : what_for(*fiber));
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

// Some warps run ahead of others: the best of a few drawn at random, and now and then other ones are best.
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
  // Box copies and products: at once, soon, late, or only when no thread can go on.
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

// --- Numbers

void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = std::isnan(x) ? uint16_t(0x7FFF) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void narrow(float x, Half& to) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) {
    to.bits = 0x7FFF;
  } else if (magnitude >= 65520.0f) {
    to.bits = sign | 0x7C00;
  } else if (magnitude < 0x1p-14f) {
    to.bits = sign | uint16_t(std::lrint(double(magnitude) * 0x1p24));  // to even; 1024 is the smallest normal number
  } else {
    const uint32_t bits = bits_of(magnitude) - (112u << 23);
    to.bits = sign | uint16_t((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
  }
}

// --- Launching

const char* describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int box_rows, int64_t tiles) {
  constexpr int64_t kMaxSize = int64_t(1) << 32;
  if (reinterpret_cast<uintptr_t>(map) % 64) return "the tensor map is not at a multiple of 64 bytes";
  if (!matrix || reinterpret_cast<uintptr_t>(matrix) % 16) return "the matrix does not begin at a multiple of 16 bytes";
  if (rows <= 0 || columns <= 0 || rows > kMaxSize || columns > kMaxSize)
    return "the matrix has no rows or no columns, or more than 2^32";
  if (row_stride < 0 || row_stride * 2 % 16 || row_stride >= int64_t(1) << 39)
    return "the rows are not a multiple of 16 bytes apart";
  if (rows > 1 && row_stride < columns) return "the rows overlap";
  if (box_rows < 1 || box_rows > 256) return "a box has 1 to 256 rows";
  *map = {};
  map->base = static_cast<const uint8_t*>(matrix);
  map->rows = rows, map->columns = columns, map->row_bytes = row_stride * 2;
  map->box_rows = box_rows, map->tiles = tiles;
  map->described = kDescribed;
  return nullptr;
}

const char* run(void (*body)(const void*), const void* context, int64_t x, int64_t y, int threads, int cluster,
                size_t shared) {
  const std::lock_guard<std::mutex> lock(one_launch);
  thread_local char message[sizeof machine.error];
  if (x < 1 || y < 1 || x > 0x7FFFFFFF || y > 65535) return "the grid has no blocks, or too many";
  if (threads < 32 || threads > 1024 || threads % 32) return "a block has 32 to 1024 threads, in whole warps";
  if (cluster < 1 || cluster > 8 || x % cluster) return "a cluster has 1 to 8 blocks, and divides the grid";
  if (shared > kMaxShared) return "a block has at most 232448 bytes of shared memory";

  const char* given = std::getenv("SMOOTHIE_EMULATOR_SEED");
  const uint64_t seed = given ? std::strtoull(given, nullptr, 0) : 0, launch = launches++;
  machine.random = mixed(mixed(seed) + launch) | 1;
  machine.body = body, machine.argument = context;
  machine.n_threads = threads, machine.n_blocks = cluster, machine.shared = shared;
  machine.failed = false;
  machine.counts = {};
  std::memset(machine.product_pages, 0, sizeof machine.product_pages);
  std::memset(machine.box_pages, 0, sizeof machine.box_pages);
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

// --- What a thread may do

uint8_t* shared_memory() { return machine.current->block->bytes; }

uint32_t address_of(const void* shared) {
  const uint8_t* bytes = machine.current->block->bytes;
  const auto* at = static_cast<const uint8_t*>(shared);
  if (at < bytes || at > bytes + machine.shared) FAIL("an address outside the block's shared memory");
  return kSharedBegin + uint32_t(at - bytes);
}

void barrier_init(uint32_t address, uint32_t arrivals) {
  Block& block = *machine.current->block;
  if (address % 8 || address < kSharedBegin || address + 8 > kSharedBegin + machine.shared)
    FAIL("barrier %u is not at a multiple of 8, or outside shared memory", address);
  if (!arrivals || arrivals > uint32_t(kMaxTx)) FAIL("barrier %u for %u arrivals", address, arrivals);
  if (block.barriers[address / 8]) FAIL("barrier %u is initialised twice", address);
  block.barriers[address / 8] = true;
  block.uninformed = machine.current;
  const uint64_t word = Barrier{int(arrivals), int(arrivals), 0, 0}.encode();
  std::memcpy(block.bytes + (address - kSharedBegin), &word, 8);
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
  if (!read_barrier(block, address, barrier) || !add_tx(block, address, barrier, bytes) ||
      !arrive(block, address, barrier))
    give_up();
  write_barrier(block, address, barrier);
  yield();
}

// Never an address of the block's own: the block stands above.
uint32_t barrier_of_block(uint32_t barrier, uint32_t block) { return barrier | (block + 1) << kBlockBits; }

void barrier_arrive(uint32_t remote) {
  const uint32_t address = remote & ((1u << kBlockBits) - 1), rank = (remote >> kBlockBits) - 1;
  if (!(remote >> kBlockBits)) FAIL("an arrival at %u, which is no barrier_of_block", remote);
  if (rank >= uint32_t(machine.n_blocks)) FAIL("an arrival at block %u of a cluster of %d", rank, machine.n_blocks);
  Block& block = *machine.blocks[rank];
  if (!block.live) FAIL("an arrival at block %u of the cluster, which has exited", rank);
  Barrier barrier;
  if ((&block != machine.current->block && !informed(block)) || !read_barrier(block, address, barrier) ||
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

void prefetch_map(const TensorMap* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 || map->described != kDescribed)
    FAIL("a tensor map that nobody described, or not at a multiple of 64");
}

void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row) {
  issue_boxes(to, map, barrier, column, row, 1u << machine.current->block->rank);
}

void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, uint16_t blocks) {
  issue_boxes(to, map, barrier, column, row, blocks);
}

void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile, int pair,
                      uint16_t blocks) {
  if (!map->tiles) FAIL("a strided box of a tensor map without strides");
  issue_boxes(to, map, barrier, column, 2 * pair, blocks, tile);
}

void stores_before_products() {
  Block& block = *machine.current->block;
  for (size_t page : machine.staged)
    if (page < machine.shared)
      std::memcpy(block.view.get() + page, block.bytes + page, std::min(kPage, machine.shared - page));
  block.stale = true;
  yield();
}

uint32_t block_in_cluster() { return uint32_t(machine.current->block->rank); }

void cluster_sync() {
  Fiber& me = *machine.current;
  machine.cluster_waiting.push_back(&me);
  me.wait = Wait::kCluster;
  if (int(machine.cluster_waiting.size()) == machine.live) release_cluster();
  leave();
}

void sync_threads(int barrier, int threads) {
  if (barrier < 0 || barrier > 15) FAIL("named barrier %d; there are 16", barrier);
  if (threads < 32 || threads % 32 || threads > machine.n_threads)
    FAIL("named barrier %d for %d threads of a block of %d", barrier, threads, machine.n_threads);
  sync(barrier, threads);
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

void products_begin() {
  my_group();
  machine.current->begun = true;
}

void products_commit() {
  Fiber& me = *machine.current;
  Warpgroup& group = my_group();
  me.ends[me.groups % kMaxGroups] = me.products;
  const uint64_t number = me.groups++ - group.first_group;
  if (number == group.ends.size()) group.ends.push_back(me.products), group.commits.push_back(0);
  if (group.ends[number] != me.products) FAIL("threads of the warpgroup committed different products");
  ++group.commits[number];
  while (!group.ends.empty() && group.commits.front() == 128)
    group.ends.pop_front(), group.commits.pop_front(), ++group.first_group;
  me.uncommitted = 0;
  me.begun = false;
  yield();
}

void products_wait(int groups) {
  Fiber& me = *machine.current;
  Warpgroup& group = my_group();
  if (me.uncommitted) FAIL("a wait for products that are not committed");
  me.begun = false;
  yield();
  if (me.groups > uint64_t(groups))
    me.covered = std::max(me.covered, me.ends[(me.groups - uint64_t(groups) - 1) % kMaxGroups]);
  if (!is_executed(group, me.covered)) {
    group.waiting.push_back(&me);
    wait_for(Wait::kProducts);
  }
  land(me, me.covered);
}

namespace {
void issue(float* sums, int columns, bool half, bool down_a, const uint32_t* registers, uint64_t a, uint64_t b,
           bool add) {
  Fiber& me = *machine.current;
  Warpgroup& group = my_group();
  if (!me.begun) FAIL("a product without products_begin");
  const uint64_t number = me.products++;
  if (number == group.first + group.products.size()) {
    Operand unused;
    if (!registers && !decode(*me.block, a, down_a, 64, unused)) give_up();
    if (!decode(*me.block, b, registers, columns, unused)) give_up();
    group.products.push_back({a, b, columns, {}, half, down_a, registers != nullptr, add, false, 0, nullptr, {}});
  }
  Product& in = group.products[number - group.first];
  if (in.a != a || in.b != b || in.columns != columns || in.half != half || in.down_a != down_a || in.add != add ||
      in.in_registers != (registers != nullptr))
    FAIL("product %llu is another one than the rest of the warpgroup has issued",
         static_cast<unsigned long long>(number));

  in.registers[me.thread % 128] = registers;

  Flight* flight = nullptr;
  for (int i = 0; i < me.n_flights; ++i) {
    Flight& other = me.flights[i];
    if (other.sums == sums && other.accumulator->columns == columns)
      flight = &other;
    else if (other.sums < sums + columns / 2 && sums < other.sums + other.accumulator->columns / 2)
      FAIL("a product into some of the sums of another that is under way");
  }
  const int n = columns / 2;
  if (flight) {
    if (!are_poisoned(sums, n)) FAIL("sums were written while their product was under way");
    if (!in.accumulator) in.accumulator = flight->accumulator;
    if (in.fresh || in.accumulator != flight->accumulator)
      FAIL("threads of the warpgroup waited for different products");
    flight->last = number;
  } else {
    if (!in.accumulator) in.accumulator = take_accumulator(columns), in.fresh = true;
    if (!in.fresh) FAIL("threads of the warpgroup waited for different products");
    if (me.n_flights == kMaxFlights) FAIL("more than %d sums under way", kMaxFlights);
    me.flights[me.n_flights++] = {sums, in.accumulator, number};
    if (add)
      for (int i = 0; i < n; ++i) element(*in.accumulator, me.thread, i) = sums[i];
    for (int i = 0; i < n; ++i) sums[i] = float_of(kSumsPoison);
  }
  ++me.uncommitted;
  const int warp = me.thread % 128 / 32;
  if (++in.issued[warp] == 32) {
    ++group.issued[warp];
    if (!group.queued) group.queued = true, machine.ready.push_back(&group);
  }
  if (random_bits() % 32 == 0) yield();
}
}  // namespace

void multiply(float* sums, int columns, bool half, bool down_a, uint64_t a, uint64_t b, bool add) {
  issue(sums, columns, half, down_a, nullptr, a, b, add);
}
void multiply(float* sums, int columns, bool half, const uint32_t* a, uint64_t b, bool add) {
  issue(sums, columns, half, false, a, 0, b, add);
}

}  // namespace emulator
}  // namespace smoothie
