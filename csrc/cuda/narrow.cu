// Launches narrow.h: many rows, narrow tables, both products in one pass.
#include "launch_tiles.h"
#include "launchers.h"
#include "narrow.h"

namespace smoothie {
namespace cuda {

const char* narrow(const StepParams& p, hopper::Stream stream) {
  if (auto wrong = misshapen(p, kNarrowTokens)) return wrong;
  if (p.chunks != p.parts) return "chunks = parts must hold";
  if (p.width > kNarrowBoxes * kBoxColumns) return "rows are wider than 256";
  StepParams all = p;
  all.resident = kNarrowBoxes;
  return p.type == Type::kBFloat16
             ? launch_tiles<hopper::BFloat16, kNarrowTokens, 1>(narrow_kernel<hopper::BFloat16>, all, stream)
             : launch_tiles<hopper::Half, kNarrowTokens, 1>(narrow_kernel<hopper::Half>, all, stream);
}

}  // namespace cuda
}  // namespace smoothie
