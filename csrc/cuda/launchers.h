// One launch each; nullptr, or what went wrong. Their caller knows nothing of CUDA, and compiles without its headers.
#pragma once

#include "params.h"

#ifdef SMOOTHIE_EMULATED
#include <launch.h>
#else
struct CUstream_st;
namespace smoothie {
namespace hopper {
using Stream = CUstream_st*;  // cudaStream_t
}
}  // namespace smoothie
#endif

namespace smoothie {
namespace cuda {

const char* score(Mode mode, const StepParams& p, hopper::Stream stream);
const char* narrow(const StepParams& p, hopper::Stream stream);
const char* stream(const StepParams& p, hopper::Stream s);
const char* prepare(const PrepareParams& p, hopper::Stream stream);
const char* merge(const MergeParams& p, hopper::Stream stream);
const char* nearest(const NearestParams& p, hopper::Stream stream);
const char* gaussian(const GaussianParams& p, hopper::Stream stream);

}  // namespace cuda
}  // namespace smoothie
