// Launches score.h: x . E^T and what is wanted of it.
#include <launch.h>

#include "launchers.h"
#include "score.h"

namespace smoothie {
namespace cuda {
namespace {

template <class T, Mode kMode>
const char* launch(const StepParams& p, hopper::Stream stream) {
  ScoreArguments a;
  a.p = p;
  if (auto wrong = hopper::describe<T>(&a.x_map, p.x, p.n_rows, p.width, p.width, kTileRows)) return wrong;
  if (auto wrong =
          hopper::describe<T>(&a.table_map, p.table, p.end_token, p.width, p.table_stride, kTileTokens / p.cluster))
    return wrong;
  const int rows = int((p.n_rows + kTileRows - 1) / kTileRows);
  const hopper::Grid grid{(rows + p.cluster - 1) / p.cluster * p.cluster, p.chunks, kScoreThreads, p.cluster,
                          sizeof(ScoreShared)};
  return hopper::launch(score_kernel<T, kMode>, grid, stream, a);
}

template <class T>
const char* launch(Mode mode, const StepParams& p, hopper::Stream stream) {
  switch (mode) {
    case Mode::kNearest: return launch<T, Mode::kNearest>(p, stream);
    case Mode::kStatistics: return launch<T, Mode::kStatistics>(p, stream);
    case Mode::kKeep1: return launch<T, Mode::kKeep1>(p, stream);
    case Mode::kKeep2: return launch<T, Mode::kKeep2>(p, stream);
    case Mode::kKeep4: return launch<T, Mode::kKeep4>(p, stream);
    case Mode::kWeights: return launch<T, Mode::kWeights>(p, stream);
    case Mode::kKeys: return launch<T, Mode::kKeys>(p, stream);
  }
  return "there is no such mode";
}

}  // namespace

static_assert(sizeof(ScoreShared) <= kSharedBytes, "more than a block can have");

const char* score(Mode mode, const StepParams& p, hopper::Stream stream) {
  const int tiles = (p.end_token - p.first_token + kTileTokens - 1) / kTileTokens;
  const int boxes = (p.width + kBoxColumns - 1) / kBoxColumns;
  if (p.chunks < 1 || p.chunks > p.parts || p.parts > tiles) return "chunks <= parts <= tiles of tokens must hold";
  if (p.cluster != 1 && p.cluster != 2 && p.cluster != 4) return "cluster must be 1, 2 or 4";
  // Two boxes' products may be unfinished while the next arrives, and each takes a second slot where x is not resident.
  if (p.resident < 0 || p.resident > kBoxes - (p.resident < boxes ? 6 : 3)) return "too many boxes of x are resident";
  return p.type == Type::kBFloat16 ? launch<hopper::BFloat16>(mode, p, stream) : launch<hopper::Half>(mode, p, stream);
}

}  // namespace cuda
}  // namespace smoothie
