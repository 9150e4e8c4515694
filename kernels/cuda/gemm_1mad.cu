// SPDX-License-Identifier: Apache-2.0
#include "code_1mad.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register one_mad("1mad", {gemm_entry<OneMad, OneMad, 1, 8>, XOrder::kTrellis, 1 / 147.800537109375f,
                                [](int) { return 1024.0f + 510; }, 0, false, 1, 8});

}  // namespace
}  // namespace quip
