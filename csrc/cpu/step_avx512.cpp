// The kernel for one instruction set; setup.py gives this file, and no other, the flags.
#include "simd_avx512.h"
#include "step_impl.h"

namespace smoothie {

static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Tier kTierAvx512{"avx512",        supported,    step_fwd<Avx512>, step_bwd<Avx512>,
                       average<Avx512>, bias<Avx512>, gaussian<Avx512>};

}  // namespace smoothie
