// The tiers of this build, slowest first, and the choice among them at run time.
#pragma once

#include <cstdint>

#include "step_params.h"

namespace smoothie {

extern const Tier* const kTiers[];
extern const int kTierCount;

// kTiers[index], or the best that this processor runs where index is negative; nullptr where it runs no such tier.
const Tier* find_tier(int64_t index);

}  // namespace smoothie
