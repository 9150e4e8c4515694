// SPDX-License-Identifier: Apache-2.0
#include "code_3inst.h"
#include "decode_gemm.h"

namespace quip {
GemmEntry three_inst_entry(int bits) { return gemm_entry<ThreeInst, ThreeInst, 1, 8>(bits); }
}  // namespace quip
