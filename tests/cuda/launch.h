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

template <class T>
const char* describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int box_rows) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  return emulator::describe(map, matrix, rows, columns, row_stride, box_rows);
}

template <class T>
const char* describe_strided(TensorMap* map, const void* matrix, int64_t tiles, int64_t columns, int64_t row_stride,
                             int box_pairs) {
  return emulator::describe(map, matrix, 128, columns, row_stride, 2 * box_pairs, tiles);
}

}  // namespace hopper
}  // namespace smoothie
