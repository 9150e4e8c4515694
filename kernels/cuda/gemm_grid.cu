// SPDX-License-Identifier: Apache-2.0
#include "code_grid.h"
#include "decode_gemm.h"

namespace quip {
namespace {

float offset(int bits) { return 3.0f * float(1 << bits) - 1; }

const Register grid("grid", {gemm_entry<Grid, Grid, 2, 8>, XOrder::kTrellis, 1, offset, 0, false, 2, 8});

}  // namespace
}  // namespace quip
