// SPDX-License-Identifier: Apache-2.0
#include "code_1mad.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register one_mad_by_rows("1mad_by_rows", {gemm_entry<OneMadByRows, OneMadByRows, 1, 8>, XOrder::kTilesByRows,
                                                kOneMadUnit, [](int) { return 1024.0f + 510; }, 0, false, 1, 8});

}  // namespace
}  // namespace quip
