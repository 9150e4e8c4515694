// SPDX-License-Identifier: Apache-2.0
// The kernels that multiply asynchronously, which are compiled for compute capability 9.0 alone ("90a").
#include "code_1mad.h"
#include "code_3inst.h"
#include "code_e8p.h"
#include "code_hyb.h"
#include "code_mul1.h"
#include "wgmma_gemm.h"

namespace quip {
namespace {

template <template <int> class Code>
bool add(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    wgmma_kernels()[{name, 2}] = {run_wgmma<Code<2>>, wgmma_shared_bytes<Code<2>>};
    wgmma_kernels()[{name, 3}] = {run_wgmma<Code<3>>, wgmma_shared_bytes<Code<3>>};
    wgmma_kernels()[{name, 4}] = {run_wgmma<Code<4>>, wgmma_shared_bytes<Code<4>>};
  }
  return true;
}

[[maybe_unused]] const bool added = add<OneMad>({"1mad"}) && add<Hyb>({"hyb", "hyb_large"}) &&
                                    add<Lattice>({"e8p", "e8p_large"}) && add<Mcg>({"mcg"}) && add<Mul1>({"mul1"}) &&
                                    add<McgSwapped>({"mcg_swapped"}) && add<Mul1Swapped>({"mul1_swapped"}) &&
                                    add<Mul1HalfSwapped>({"mul1_half_swapped"});

}  // namespace
}  // namespace quip
