// SPDX-License-Identifier: Apache-2.0
// The instruction-set tiers of the library, and which of them this CPU runs. CMakeLists.txt has their compiler flags.
#pragma once
#include <vector>

#include "kernels.h"

namespace quip {

struct Feature {
  const char* name;  // as compilers call it
  bool here;
};

struct Tier {
  const Kernels* kernels;
  std::vector<Feature> needs;

  bool runs() const {
    for (const Feature& feature : needs)
      if (!feature.here) return false;
    return true;
  }
};

// All tiers, best first. The first that runs is used. `portable` runs anywhere, so those behind it are used only where
// the user names them.
const std::vector<Tier>& tiers();

// The tier that QUIP_VLLM_CPU_TIER names, or null.
const char* named_tier();

// The kernels in use: those of the tier that QUIP_VLLM_CPU_TIER names, else of the first that runs. Throws
// std::runtime_error if the CPU does not run the named tier.
const Kernels& kernels();

}  // namespace quip
