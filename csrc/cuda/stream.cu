// Launches stream.h: few rows, both products in one pass.
#include <launch.h>

#include "launchers.h"
#include "stream.h"

namespace smoothie {
namespace cuda {
namespace {

template <class T>
const char* launch(const StepParams& p, hopper::Stream s) {
  StreamArguments a;
  a.p = p;
  if (auto wrong = hopper::describe<T>(&a.x_map, p.x, p.n_rows, p.width, p.width, kStreamRows)) return wrong;
  if (auto wrong = hopper::describe<T>(&a.table_map, p.table, p.end_token, p.width, p.table_stride, kStreamTokens))
    return wrong;
  const int rows = int((p.n_rows + kStreamRows - 1) / kStreamRows);
  return hopper::launch(stream_kernel<T>, {rows, p.chunks, kStreamThreads, 1, kSharedBytes}, s, a);
}

}  // namespace

const char* stream(const StepParams& p, hopper::Stream s) {
  const int tiles = (p.end_token - p.first_token + kStreamTokens - 1) / kStreamTokens;
  if (p.chunks < 1 || p.chunks > tiles || p.parts != p.chunks) return "chunks = parts <= tiles of tokens must hold";
  if (p.width > kMostBoxes * kBoxColumns) return "rows are wider than 1,024";
  return p.type == Type::kBFloat16 ? launch<hopper::BFloat16>(p, s) : launch<hopper::Half>(p, s);
}

}  // namespace cuda
}  // namespace smoothie
