// What the forward and the backward share: memory, threads, how rows lie along the lanes, tiles of the table in fp32.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "convert.h"
#include "step_panel.h"
#include "step_params.h"

namespace smoothie {
namespace {  // one copy per tier

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
class Buffer {  // aligned to a cache line, never initialised
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kAlign))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlign); }
  operator T*() { return data_; }
  operator const T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

inline uint32_t row_id(const int64_t* row_ids, int64_t row_offset, int64_t i) {
  return uint32_t(row_ids ? row_ids[i] : row_offset + i);
}

// Denormal numbers are zero on this thread while it lives. Gradients of a cross-entropy are full of them, and
// processors take over a hundred cycles for each: a backward pass of 256 such rows (V = 30,522, D = 384, two AVX-512
// cores) took 10 s, and takes 0.23.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | uint64_t(1) << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

// Runs work(worker, task) for every task; threads take the next one as they come free.
template <class Work>
void share(const Threads& threads, int64_t tasks, const Work& work) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Work& work;
  } context{{}, tasks, work};
  threads.run(
      least(threads.count, tasks),
      [](void* raw, int64_t worker) {
        auto& c = *static_cast<Context*>(raw);
        const FlushDenormals flush;
        for (int64_t task; (task = c.next.fetch_add(1)) < c.tasks;) c.work(worker, task);
      },
      &context);
}

// Where rows lie in panels of two vectors: along the lanes, each in one lane or, where rows are few, in a group of
// them. n_rows are those of the call, also where a pass takes some of them: the group decides how scores round, and the
// weights of a far row add up to 1 only where all passes round alike.
template <class S>
class Layout {
 public:
  static constexpr int kLanes = S::kLanes, kPanel = 2 * S::kLanes;  // rows

  Layout(int64_t n_rows, int64_t width) {
    while (n_rows << (group_log_ + 1) <= kLanes && width % (2 << group_log_) == 0) ++group_log_;
  }

  int group() const { return 1 << group_log_; }                              // lanes of a row
  int64_t row_of(int64_t lane) const { return lane >> group_log_; }          // in its panel
  int64_t lane_of(int64_t i) const { return i << group_log_; }               // the first of row i
  static int vectors_of(int64_t n_rows) { return n_rows > kLanes ? 2 : 1; }  // of the panel that these rows begin

  // Where column d of a panel's row i stands in the panel, [D / group][row][group].
  int64_t element(int64_t i, int64_t d, int64_t lanes) const {
    return (d >> group_log_) * lanes + (i << group_log_) + (d & ((1 << group_log_) - 1));
  }

  // Packs `count` rows of D columns, row(i) in fp32, into a panel whose other lanes hold zeros.
  template <class Row>
  void pack(int64_t count, int64_t width, const Row& row, float* panel) const {
    const int64_t lanes = vectors_of(count) * kLanes;
    std::memset(panel, 0, size_t(width * lanes) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const float* values = row(i);
      for (int64_t d = 0; d < width; ++d) panel[element(i, d, lanes)] = values[d];
    }
  }

  // Calls body(vectors, group) with both as compile-time constants, for a panel of so many rows.
  template <class Body>
  void with(int64_t n_rows, const Body& body) const {
    if (vectors_of(n_rows) == 2)
      body(std::integral_constant<int, 2>{}, std::integral_constant<int, 1>{});
    else
      with_group<1>(body);
  }

 private:
  template <int kGroup, class Body>
  void with_group(const Body& body) const {
    if (group() == kGroup)
      body(std::integral_constant<int, 1>{}, std::integral_constant<int, kGroup>{});
    else if constexpr (kGroup < kLanes)
      with_group<2 * kGroup>(body);
  }

  int group_log_ = 0;
};

// Some tokens of the table in fp32: where it stands, or widened into `room`.
struct Tile {
  const float* rows;
  int64_t stride, first, count;
};

// An odd number of cache lines: the rows of a tile spread over all sets of a cache.
inline int64_t spread_stride(int64_t width) { return (width + 15) / 16 * 16 + 16; }

inline int64_t tile_room(const StepInputs& p) {
  return p.table_dtype == DType::kFloat32 ? 0 : kTile * spread_stride(p.width);
}

// Of the table or of another one like it.
template <class S>
Tile read_tile(const StepInputs& p, const void* table, int64_t table_stride, int64_t index, float* room) {
  const int64_t first = index * kTile, count = least(kTile, p.n_vocab - first);
  if (p.table_dtype == DType::kFloat32)
    return {static_cast<const float*>(table) + first * table_stride, table_stride, first, count};
  const int64_t stride = spread_stride(p.width);
  for (int64_t v = 0; v < count; ++v)
    widen<S>(at(table, p.table_dtype, (first + v) * table_stride), p.table_dtype, p.width, room + v * stride);
  return {room, stride, first, count};
}

// Tokens for the scores, and for the mean.
struct Tiles {
  Tile scores, mean;
};

template <class S>
Tiles read_tiles(const StepInputs& p, int64_t index, float* room, float* room_of_values) {
  const Tile tile = read_tile<S>(p, p.table, p.table_stride, index, room);
  return {tile, p.values ? read_tile<S>(p, p.values, p.values_stride, index, room_of_values) : tile};
}

template <class S>
inline double sum_of_squares(const float* v, int64_t count) {
  double lanes[8] = {};
  int64_t d = 0;
  for (; d + 8 <= count; d += 8)
    for (int i = 0; i < 8; ++i) lanes[i] = S::fma(double(v[d + i]), double(v[d + i]), lanes[i]);
  for (; d < count; ++d) lanes[0] = S::fma(double(v[d]), double(v[d]), lanes[0]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// use(i, ||row_i||^2 / 2), summed in float64: next to it the scores of near tokens cancel.
template <class S, class Use>
void half_squares(const void* matrix, DType dtype, int64_t stride, int64_t n_rows, int64_t width,
                  const Threads& threads, const Use& use) {
  constexpr int64_t kRows = 256;  // a task
  std::vector<Buffer<float>> widened;
  for (int64_t i = 0; i < threads.count; ++i) widened.emplace_back(width);
  share(threads, ceil_div(n_rows, kRows), [&](int64_t worker, int64_t task) {
    for (int64_t i = task * kRows; i < least(n_rows, (task + 1) * kRows); ++i) {
      const void* row = at(matrix, dtype, i * stride);
      if (dtype != DType::kFloat32) widen<S>(row, dtype, width, widened[size_t(worker)]);
      use(i, sum_of_squares<S>(dtype == DType::kFloat32 ? static_cast<const float*>(row) : widened[size_t(worker)],
                               width) /
                 2);
    }
  });
}

}  // namespace
}  // namespace smoothie
