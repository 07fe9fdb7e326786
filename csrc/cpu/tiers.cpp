#include "tiers.h"

namespace smoothie {

#if defined(__x86_64__)
const Tier* const kTiers[] = {&kTierScalar, &kTierAvx2, &kTierAvx512};
#else
const Tier* const kTiers[] = {&kTierScalar};
#endif
const int kTierCount = sizeof(kTiers) / sizeof(kTiers[0]);

const Tier* find_tier(int64_t index) {
  for (int i = kTierCount - 1; i >= 0; --i)
    if (kTiers[i]->supported() && (index < 0 || index == i)) return kTiers[i];
  return nullptr;
}

}  // namespace smoothie
