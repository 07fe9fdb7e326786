// The kernel for one instruction set; setup.py gives this file, and no other, the flags.
#include "simd_avx2.h"
#include "step_impl.h"

namespace smoothie {

static bool supported() {
  // F16C comes with every AVX2; older compilers have no name for it.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const Tier kTierAvx2{"avx2", supported, step_fwd<Avx2>, step_bwd<Avx2>, average<Avx2>, bias<Avx2>, gaussian<Avx2>};

}  // namespace smoothie
