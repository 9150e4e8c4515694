// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace quip {

// The floating-point types of activations.
enum class Type : int { kFloat, kHalf, kBfloat };

}  // namespace quip
