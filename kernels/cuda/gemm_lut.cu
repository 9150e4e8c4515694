// SPDX-License-Identifier: Apache-2.0
#include "code_lut.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register lut("lut",
                   {gemm_entry<Lut, Lut, 1, 8>, XOrder::kTrellis, 1, [](int) { return 0.0f; }, 32768, false, 1, 8});

}  // namespace
}  // namespace quip
