// SPDX-License-Identifier: Apache-2.0
#include "code_mul1.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register mul1_half_swapped("mul1_half_swapped", {gemm_entry<Mul1HalfSwapped, Mul1HalfSwapped, 2, 4>,
                                                       XOrder::kTrellis, 1, [](int) { return 0.0f; }, 0, false, 2, 4});

}  // namespace
}  // namespace quip
