// The kernel for one instruction set; setup.py gives this file, and no other, the flags.
#include "simd_avx2.h"
#include "step_impl.h"

namespace smoothie {

static bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const Tier kTierAvx2{"avx2", supported, step_fwd<Avx2>, bias<Avx2>, gaussian<Avx2>};

}  // namespace smoothie
