// The tiers of this build, slowest first, and the choice among them at run time.
#pragma once

#include <cstring>

#include "step_params.h"

namespace smoothie {

extern const Tier* const kTiers[];
extern const int kTierCount;

// The tier of that name, "" for the best that this processor runs; nullptr where there is none.
const Tier* find_tier(const char* name);

}  // namespace smoothie
