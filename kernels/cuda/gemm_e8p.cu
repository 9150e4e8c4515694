// SPDX-License-Identifier: Apache-2.0
#include "code_e8p.h"
#include "decode_gemm.h"

namespace quip {
GemmEntry lattice_entry(int bits) { return gemm_entry<Lattice, Lattice, 2, 4>(bits); }
GemmEntry lattice_large_entry(int bits) { return gemm_entry<LatticeLarge, Lattice, 2, 4>(bits); }
}  // namespace quip
