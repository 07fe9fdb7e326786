// The kernel for one instruction set; setup.py gives this file, and no other, the flags.
#include "simd_scalar.h"
#include "step_impl.h"

namespace smoothie {

static bool supported() { return true; }

const Tier kTierScalar{"scalar",        supported,    step_fwd<Scalar>, step_bwd<Scalar>,
                       average<Scalar>, bias<Scalar>, gaussian<Scalar>};

}  // namespace smoothie
