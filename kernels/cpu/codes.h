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
  CODE(kMul1Half, "mul1_half")   \
  CODE(kGrid, "grid")            \
  CODE(kTable, "table")          \
  CODE(kPairs, "pairs")

namespace quip {

#define QUIP_ENUMERATOR(enumerator, name) enumerator,
enum class Code { QUIP_TRELLIS_CODES(QUIP_ENUMERATOR) kE8p };
#undef QUIP_ENUMERATOR

// Whether a code stores half a bit less per weight (formats/trellis.py).
constexpr bool is_half(Code code) { return code == Code::kMul1Half; }
constexpr int least_bits(Code code) { return is_half(code) ? 2 : 1; }
constexpr int most_bits(Code code) { return code == Code::kHyb || is_half(code) ? 4 : 8; }

// Whether tiles in EXL3's order are decoded.
constexpr bool has_swapped(Code code) {
  return code == Code::kThreeInst || code == Code::kMcg || code == Code::kMul1 || code == Code::kMul1Half;
}

}  // namespace quip
