// SPDX-License-Identifier: Apache-2.0
#include "code_e8p.h"
#include "decode_gemm.h"

namespace quip {
namespace {

// The second stage has an offset of its own: E81B's numbers are 36.25 too large, E8P's 36.
float offset(int bits) { return 36 + (bits == 3 ? 36.25f / 2.04f : bits == 4 ? 36.0f / 3.45f : 0); }

const Register lattice("e8p",
                       {gemm_entry<Lattice, Lattice, 2, 4>, XOrder::kLattice, 1, offset, 3 * 256 + 4, false, 2, 4});
const Register lattice_large("e8p_large", {gemm_entry<LatticeLarge, Lattice, 2, 4>, XOrder::kLattice, 1, offset,
                                           3 * 256 + 4, false, 2, 4});

}  // namespace
}  // namespace quip
