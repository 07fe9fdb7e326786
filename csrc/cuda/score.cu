// Launches score.h: x . E^T and its epilogue.
#include "launch_tiles.h"
#include "launchers.h"
#include "score.h"

namespace smoothie {
namespace cuda {
namespace {

template <class T, Mode kMode, Noise kNoise>
const char* launch(const StepParams& p, hopper::Stream stream) {
  return launch_tiles<T, kScoreTokens, phases_of(kMode, kNoise)>(score_kernel<T, kMode, kNoise>, p, stream);
}

// Statistics and weights are compiled for each Noise. The other modes ask at run time.
template <class T, Mode kMode>
const char* launch(const StepParams& p, hopper::Stream stream) {
  if constexpr (kMode == Mode::kStatistics || kMode == Mode::kWeights) {
    if (!p.std) return launch<T, kMode, Noise::kNone>(p, stream);
    if (p.n_fields == 1) return launch<T, kMode, Noise::kOne>(p, stream);
  }
  return launch<T, kMode, kMode == Mode::kNearest ? Noise::kNone : Noise::kAny>(p, stream);
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
    case Mode::kMean: break;  // narrow.cu
  }
  return "there is no such mode";
}

}  // namespace

const char* score(Mode mode, const StepParams& given, hopper::Stream stream) {
  StepParams p = given;
  if (kept_in(mode)) p.strided_tiles = p.end_token / kScoreTokens;
  if (kept_in(mode) && p.first_token) return "buckets are of the whole table";
  if (auto wrong = misshapen(p, kScoreTokens)) return wrong;
  const int boxes = (p.width + kBoxColumns - 1) / kBoxColumns;
  // Two boxes' products may be unfinished while the next arrives, and each takes a second slot where x is not resident.
  if (p.resident < 0 || p.resident > kBoxes - (p.resident < boxes ? 4 : 3)) return "too many boxes of x are resident";
  return p.type == Type::kBFloat16 ? launch<hopper::BFloat16>(mode, p, stream) : launch<hopper::Half>(mode, p, stream);
}

}  // namespace cuda
}  // namespace smoothie
