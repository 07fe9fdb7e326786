// Launching a kernel of tiles.h.
#pragma once

#include <launch.h>

#include "tiles.h"

namespace smoothie {
namespace cuda {

static_assert(sizeof(ScoreShared) <= kSharedBytes, "more than a block can have");

inline const char* misshapen(const StepParams& p, int tokens_of_tile) {
  const int tiles = (p.end_token - p.first_token + tokens_of_tile - 1) / tokens_of_tile;
  if (p.chunks < 1 || p.chunks > p.parts || p.parts > tiles) return "chunks <= parts <= tiles of tokens must hold";
  if (p.cluster != 1 && p.cluster != 2 && p.cluster != 4) return "cluster must be 1, 2 or 4";
  return nullptr;
}

template <class T, int kTokens, int kPhases>
const char* launch_tiles(void (*kernel)(ScoreArguments), const StepParams& p, hopper::Stream stream) {
  ScoreArguments a;
  a.p = p;
  if (auto wrong = hopper::describe<T>(&a.x_map, p.x, p.n_rows, p.width, p.width, kTileRows)) return wrong;
  if (auto wrong =
          hopper::describe<T>(&a.table_map, p.table, p.end_token, p.width, p.table_stride, kTokens / p.cluster))
    return wrong;
  if (p.strided_tiles) {
    if (auto wrong = hopper::describe_strided<T>(&a.strided_map, p.table, p.strided_tiles, p.width, p.table_stride,
                                                 kTokens / 2 / p.cluster))
      return wrong;
  }
  const int rows = int((p.n_rows + kTileRows - 1) / kTileRows);
  const hopper::Grid grid{(rows + p.cluster - 1) / p.cluster * p.cluster, p.chunks, threads_of(kPhases), p.cluster,
                          sizeof(ScoreShared)};
  return hopper::launch(kernel, grid, stream, a);
}

}  // namespace cuda
}  // namespace smoothie
