// The twin of csrc/cuda/sm90/launch.h on a CPU; a launch returns when the kernel is done, with its error.
#pragma once

#include <hopper.h>

#include <cstddef>
#include <type_traits>

namespace smoothie {
namespace hopper {

using Stream = void*;

struct Grid {
  int x, y, threads, cluster;  // blocks, threads of a block, blocks of a cluster (along x)
  size_t shared;               // bytes of shared memory of a block
};

inline const char* check(int error) { return error == 0 ? nullptr : "an error that a CPU does not have"; }

template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, Stream, const Params& params) {
  static_assert(sizeof(Params) <= 4096 && std::is_trivially_copyable_v<Params>);
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  return emulator::run(
      [](const void* context) {
        const auto& call = *static_cast<const Call*>(context);
        call.kernel(*call.params);
      },
      &call, grid.x, grid.y, grid.threads, grid.cluster, grid.shared);
}

template <class T, int kRank>
const char* describe(TensorMap* map, const void* matrix, const int64_t (&sizes)[kRank],
                     const int64_t (&strides)[kRank - 1], const int64_t (&tile)[kRank]) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  int64_t bytes[kRank - 1];
  for (int i = 0; i + 1 < kRank; ++i) bytes[i] = strides[i] * 2;
  return emulator::encode_tiled(map, matrix, kRank, sizes, bytes, tile);
}

template <class T>
const char* describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int box_rows) {
  return describe<T, 2>(map, matrix, {columns, rows}, {row_stride}, {64, box_rows});
}

template <class T>
const char* describe_strided(TensorMap* map, const void* matrix, int64_t tiles, int64_t columns, int64_t row_stride,
                             int box_pairs) {
  return describe<T, 4>(map, matrix, {columns, 2, tiles, 64}, {row_stride, 2 * row_stride, 2 * tiles * row_stride},
                        {64, 2, 1, box_pairs});
}

}  // namespace hopper
}  // namespace smoothie
