// SPDX-License-Identifier: Apache-2.0
// Chooses the search of one trellis sequence: 16-bit costs where the tier has them, else floats.
#pragma once
#include "viterbi.h"
#include "viterbi16.h"

namespace quip {
namespace {

template <int KV, int V>
void encode(const float* target, const float* values, int32_t* states, void* work) {
#if defined(__AVX512BW__)
  if constexpr (KV / V <= 4)  // beyond, errors are too small for 16-bit costs
    if (tail_biting16<KV, V, (KV / V > 2)>(target, values, states, work)) return;
#endif
  search_vectors::tail_biting<KV, V>(target, values, states, work);
}

template <int V>
void viterbi_of(const float* target, const float* values, int step_bits, int32_t* states, void* work) {
  switch (step_bits) {
    case 1: return encode<1, V>(target, values, states, work);
    case 2: return encode<2, V>(target, values, states, work);
    case 3: return encode<3, V>(target, values, states, work);
    case 4: return encode<4, V>(target, values, states, work);
    case 5: return encode<5, V>(target, values, states, work);
    case 6: return encode<6, V>(target, values, states, work);
    case 7: return encode<7, V>(target, values, states, work);
    case 8: return encode<8, V>(target, values, states, work);
  }
}

inline void viterbi(const float* target, const float* values, int step_bits, int dim, int32_t* states, void* work) {
  if (dim == 1) viterbi_of<1>(target, values, step_bits, states, work);
  if (dim == 2) viterbi_of<2>(target, values, step_bits, states, work);
}

}  // namespace
}  // namespace quip
