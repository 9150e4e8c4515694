// SPDX-License-Identifier: Apache-2.0
// A newer tier is not always a faster one: byte permutes and multishifts cost more on Intel than on AMD. So the tier that
// multiplies a trellis code with int8 activations is measured, once per process. All tiers' sums are the same integers,
// so a result does not depend on what was found.
#pragma once
#include "tiers.h"

namespace quip {

// The classes of numbers of rows, by the largest of each but the last; and the number at which a class is measured.
constexpr int64_t kRowsUpTo[] = {2, 32}, kRowsMeasured[] = {1, 16, 128};

// The tier that multiplies m rows with w the fastest. The first call of a class measures panels of w for some
// milliseconds. That of kernels(), if the user named a tier, if a lattice's blocks were laid out for it, or if no other
// is faster by 5 %.
const Kernels& fastest(const Weight& w, int64_t m);

}  // namespace quip
