// SPDX-License-Identifier: Apache-2.0
// Every code that the CPU kernels decode: a row per trellis code, with its enumerator and its name.
#pragma once

#define QUIP_TRELLIS_CODES(CODE) \
  CODE(kOneMad, "1mad")          \
  CODE(kThreeInst, "3inst")      \
  CODE(kHyb, "hyb")              \
  CODE(kLut, "lut")              \
  CODE(kMcg, "mcg")              \
  CODE(kMul1, "mul1")            \
  CODE(kGrid, "grid")            \
  CODE(kTable, "table")          \
  CODE(kPairs, "pairs")

namespace quip {

#define QUIP_ENUMERATOR(enumerator, name) enumerator,
enum class Code { QUIP_TRELLIS_CODES(QUIP_ENUMERATOR) kE8p };
#undef QUIP_ENUMERATOR

}  // namespace quip
