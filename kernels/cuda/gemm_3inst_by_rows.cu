// SPDX-License-Identifier: Apache-2.0
#include "code_3inst.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register three_inst_by_rows("3inst_by_rows", {gemm_entry<ThreeInstByRows, ThreeInstByRows, 1, 8>,
                                                    XOrder::kTilesByRows, 1, [](int) { return 0.0f; }, 4, false, 1, 8});

}  // namespace
}  // namespace quip
