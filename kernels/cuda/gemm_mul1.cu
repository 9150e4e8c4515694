// SPDX-License-Identifier: Apache-2.0
#include "code_mul1.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register mul1("mul1",
                    {gemm_entry<Mul1, Mul1, 1, 8>, XOrder::kTrellis, 1, [](int) { return 0.0f; }, 0, false, 1, 8});

}  // namespace
}  // namespace quip
