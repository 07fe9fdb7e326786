// Launches small.h: what surrounds the two passes.
#include <launch.h>

#include "launchers.h"
#include "small.h"

namespace smoothie {
namespace cuda {
namespace {

// A warp a row.
template <class Params>
const char* per_row(void (*bf16)(Params), void (*f16)(Params), const Params& p, hopper::Stream stream) {
  const int blocks = int((p.n_rows + kSmallWarps - 1) / kSmallWarps);
  return hopper::launch(p.type == Type::kBFloat16 ? bf16 : f16, {blocks, 1, kSmallThreads, 1, 0}, stream, p);
}

}  // namespace

const char* prepare(const PrepareParams& p, hopper::Stream stream) {
  return per_row(prepare_kernel<hopper::BFloat16>, prepare_kernel<hopper::Half>, p, stream);
}

const char* nearest(const NearestParams& p, hopper::Stream stream) {
  return per_row(nearest_kernel<hopper::BFloat16>, nearest_kernel<hopper::Half>, p, stream);
}

const char* merge(const MergeParams& p, hopper::Stream stream) {
  const int columns = kSmallThreads / (p.sums > 1 ? kSmallWarps : 1) * 4;
  const int blocks = p.smoothed ? (p.width + columns - 1) / columns : 1;
  const auto kernel = p.type == Type::kBFloat16 ? merge_kernel<hopper::BFloat16> : merge_kernel<hopper::Half>;
  return hopper::launch(kernel, {int(p.n_rows), blocks, kSmallThreads, 1, kSmallThreads * 4 * sizeof(float)}, stream,
                        p);
}

const char* gaussian(const GaussianParams& p, hopper::Stream stream) {
  const int64_t blocks = (p.n_rows * ((p.columns + 1) / 2) + kSmallThreads - 1) / kSmallThreads;
  if (blocks > INT32_MAX) return "more blocks than a grid has";
  return hopper::launch(gaussian_kernel, {int(blocks), 1, kSmallThreads, 1, 0}, stream, p);
}

}  // namespace cuda
}  // namespace smoothie
