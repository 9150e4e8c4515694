// SPDX-License-Identifier: Apache-2.0
#include "code_lut.h"
#include "decode_gemm.h"

namespace quip {
GemmEntry lut_entry(int bits) { return gemm_entry<Lut, Lut, 1, 8>(bits); }
}  // namespace quip
