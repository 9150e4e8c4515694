// SPDX-License-Identifier: Apache-2.0
#include "code_1mad.h"
#include "decode_gemm.h"

namespace quip {
GemmEntry one_mad_bytes_entry(int bits) { return gemm_entry<OneMadBytes, OneMadBytes, 1, 8>(bits); }
}  // namespace quip
