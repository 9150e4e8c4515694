// SPDX-License-Identifier: Apache-2.0
#include "code_hyb.h"
#include "decode_gemm.h"

namespace quip {
namespace {

const Register hyb("hyb", {gemm_entry<Hyb, Hyb, 1, 4>, XOrder::kTrellis, 1, [](int) { return 0.0f; }, 512, true, 1, 4});
const Register hyb_large("hyb_large", {gemm_entry<HybLarge, Hyb, 1, 4>, XOrder::kTrellis, 1, [](int) { return 0.0f; },
                                       512, true, 1, 4});

}  // namespace
}  // namespace quip
