// SPDX-License-Identifier: Apache-2.0
#include "code_hyb.h"
#include "decode_gemm.h"

namespace quip {
GemmEntry hyb_entry(int bits) { return gemm_entry<Hyb, Hyb, 1, 4>(bits); }
GemmEntry hyb_large_entry(int bits) { return gemm_entry<HybLarge, Hyb, 1, 4>(bits); }
}  // namespace quip
