// SPDX-License-Identifier: Apache-2.0
#include "code_1mad.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register one_mad_bytes("1mad_int8", {gemm_entry<OneMadBytes, OneMadBytes, 1, 8>, XOrder::kBytes,
                                           1 / 147.800537109375f, [](int) { return 510.0f; }, 0, false, 1, 8});

}  // namespace
}  // namespace quip
