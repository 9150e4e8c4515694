// SPDX-License-Identifier: Apache-2.0
#include "code_3inst.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register mcg_swapped("mcg_swapped", {gemm_entry<McgSwapped, McgSwapped, 1, 8>, XOrder::kTrellis, 1,
                                           [](int) { return 0.0f; }, 4, false, 1, 8});

}  // namespace
}  // namespace quip
