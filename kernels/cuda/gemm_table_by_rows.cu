// SPDX-License-Identifier: Apache-2.0
#include "code_lut.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register table_by_rows("table_by_rows", {gemm_entry<TableByRows, TableByRows, 1, 8>, XOrder::kTilesByRows, 1,
                                               [](int) { return 0.0f; }, 32768, true, 1, 8});

}  // namespace
}  // namespace quip
