// SPDX-License-Identifier: Apache-2.0
#include "code_lut.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register pairs_by_rows("pairs_by_rows", {gemm_entry<PairsByRows, PairsByRows, 1, 8>, XOrder::kTilesByRows, 1,
                                               [](int) { return 0.0f; }, 65536, true, 1, 8});

}  // namespace
}  // namespace quip
