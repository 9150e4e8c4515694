// SPDX-License-Identifier: Apache-2.0
// Chooses the search of trellis sequences: 16-bit costs where the tier has them, else floats.
#pragma once
#include <memory>

#include "viterbi.h"
#include "viterbi16.h"

namespace quip {
namespace {

// Memory is aligned to lines of the cache: a vector that crosses one is two accesses.
struct alignas(64) Line {
  uint8_t bytes[64];
};

template <int KV, int V>
void encode(const float* targets, int64_t count, const float* values, int32_t* states) {
  [[maybe_unused]] constexpr bool kCosts16 = KV / V <= 4;  // beyond, errors are too small for 16-bit costs
  constexpr int64_t kSteps = kSequence / V, kBytes[] = {2 * kCosts * 4, kSteps * (kStates >> KV), V * kStates * 2};
  const std::unique_ptr<Line[]> work(new Line[(kBytes[0] + kBytes[1] + kBytes[2]) / 64]);  // without zeros
  uint8_t* const first = work[0].bytes;
  float* const costs = reinterpret_cast<float*>(first);
  const Search search{values, costs, costs + kCosts, first + kBytes[0]};
#if defined(QUIP_COSTS16)
  uint16_t* const costs16 = reinterpret_cast<uint16_t*>(first);
  int16_t* const integers = reinterpret_cast<int16_t*>(first + kBytes[0] + kBytes[1]);
  const float unit = kCosts16 ? to_integers(values, V * kStates, integers) : 0;
  const Search16 search16{integers, costs16, costs16 + kCosts, search.choice};
#endif
  for (int64_t i = 0; i < count; ++i, targets += kSequence, states += kSteps) {
#if defined(QUIP_COSTS16)
    if constexpr (kCosts16)
      if (tail_biting16<KV, V, (KV / V > 2)>(search16, targets, unit, states)) continue;
#endif
    tail_biting<KV, V>(search, targets, states);
  }
}

inline void encode_trellis(const float* targets, int64_t count, const float* values, int step_bits, int dim,
                           int32_t* states) {
  if (dim == 1) with_bits<8>(step_bits, [&](auto bits) { encode<bits, 1>(targets, count, values, states); });
  if (dim == 2) with_bits<4>(step_bits / 2, [&](auto bits) { encode<2 * bits, 2>(targets, count, values, states); });
}

}  // namespace
}  // namespace quip
