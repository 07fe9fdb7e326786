// The emulated machine: one cluster of blocks at a time, and what its threads, copies and products share. Internal; the
// kernels see emulator.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "../emulator.h"

#if defined(__x86_64__) && !defined(SMOOTHIE_UCONTEXT)
#define SMOOTHIE_OWN_SWITCH  // swapcontext makes a system call each time
#else
#include <ucontext.h>
#endif

namespace smoothie {
namespace emulator {

constexpr uint32_t kSharedBegin = 1024;  // the first address of shared memory: Hopper reserves the first KiB
constexpr size_t kMaxShared = 232448, kGuard = 4096, kPage = 1024, kMaxPages = kMaxShared / kPage;
constexpr int kBlockBits = 24;  // of an address in the cluster: the block's number stands above
constexpr int kMaxFlights = 8, kMaxGroups = 8;
constexpr uint8_t kPoison = 0xFF, kCanary = 0xA5;  // of memory that nothing was written to, and of the guards

#ifdef SMOOTHIE_OWN_SWITCH
using Context = void*;  // the stack pointer; everything else is on the stack
#else
using Context = ucontext_t;
#endif

enum class Wait { kNothing, kBarrier, kThreads, kWarp, kCluster, kProducts };

struct Block;

// The matrix units' copy of a warpgroup's sums.
struct Accumulator {
  float sums[64 * 128];
  int columns, users;
};

// Registers that products own, from the first product until the wait for the last.
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
  uint32_t address, parity;  // of the barrier it waits for
  uint64_t given, result;    // of a shuffle
  uint64_t products, uncommitted, groups;
  uint64_t ends[kMaxGroups];  // of the latest groups: the number of products up to there
  uint64_t covered;           // products it has waited for
  bool begun;
  int registers, n_flights;
  Flight flights[kMaxFlights];

  ~Fiber();
};

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

struct Product {
  uint64_t a, b;  // descriptors
  int columns;
  bool half, transposed_a, in_registers, add;  // in_registers: a; b is then transposed
  int issued[4];                               // threads of each warp
  bool fresh;                                  // the first of its accumulator
  uint8_t done;                                // warps
  Accumulator* accumulator;
  const uint32_t* registers[128];
};

struct Warpgroup {
  Block* block;
  int first_thread;
  std::deque<Product> products;  // from number `first` on
  uint64_t first;
  std::deque<uint64_t> ends;  // of groups, from number `first_group` on
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
  std::unique_ptr<uint8_t[]> view;  // shared memory as matrix products see it
  std::vector<bool> barriers;       // by address / 8
  std::vector<Fiber*> waiting;      // for one of the barriers
  Fiber* uninformed;                // has initialised a barrier without a fence after it
  NamedBarrier named[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  int live;
  bool stale;  // a fence was called since `view` was refreshed
  std::vector<Fiber*> fibers;

  ~Block();
};

struct Copy {
  TensorMap map;
  Block* block;
  uint32_t to, barrier;
  Coordinates at;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // grows, and stays from launch to launch
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  std::vector<Accumulator*> free_accumulators;
  int n_threads, n_blocks, extra_bits;
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
  int live;  // threads
  std::vector<Fiber*> cluster_waiting;

  // Pages that products read; pages that copies write; offsets of those that products alone read: threads write these.
  uint8_t product_pages[kMaxPages], copy_pages[kMaxPages];
  std::vector<size_t> staged;

  uint64_t random, eagerness;
  int contestants;
  bool by_block;  // whole blocks run ahead of others, not only warps
  bool failed;
  char error[4096];
  Counts counts;
};
extern Machine machine;

inline uint64_t random_bits() {  // 32
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random * 0x2545F4914F6CDD1Du >> 32;
}
inline size_t below(size_t n) { return size_t(random_bits() * n >> 32); }

// --- fibers.cpp

// Records the first error of a launch, with the running thread or else the block; returns false.
__attribute__((format(printf, 2, 3))) bool wrong(const Block* block, const char* format, ...);
[[noreturn]] void give_up();  // the launch has failed: this fiber never runs again
#define FAIL(...) (wrong(nullptr, __VA_ARGS__), give_up())

void prepare(Fiber& fiber);
void enter(Fiber& fiber);
void leave();
void yield();
void wake(Fiber* fiber);
void wait_for(Wait what, uint32_t address = 0, uint32_t parity = 0);

// --- barriers.cpp

// A barrier in shared memory. Memory that was never written holds no valid barrier.
struct Barrier {
  int pending, arrivals, bytes;
  uint32_t phase;

  uint64_t encode() const;
  static bool decode(uint64_t word, Barrier& to);
};
bool read_barrier(const Block& block, uint32_t address, Barrier& barrier);
void write_barrier(Block& block, uint32_t address, Barrier barrier);  // ends the phase where nothing is missing
bool add_bytes(const Block& block, uint32_t address, Barrier& barrier, int64_t bytes);
bool is_informed(const Block& block);

// --- threads.cpp

void exit_thread();

// --- copies.cpp

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
void refresh(Block& block);                                   // products see what was written before the last fence
void mark(uint8_t* pages, uint32_t address, uint32_t bytes);  // as product_pages or copy_pages
bool execute(const Copy& copy);

// --- products.cpp

bool execute(Warpgroup& group);  // its next product
bool is_ready(const Warpgroup& group);

}  // namespace emulator
}  // namespace smoothie
