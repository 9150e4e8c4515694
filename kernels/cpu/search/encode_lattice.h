// SPDX-License-Identifier: Apache-2.0
// The exact nearest E8P code of a vector of eight numbers.
#pragma once
#include <cmath>

#include "../lattice.h"

namespace quip {
namespace {

// For each shift, the signs follow y = x - shift. Where a row then flips an odd number of components, the cheapest flip
// (smallest |y_i| |T_i|) is undone. The score is <y, v> - |v|^2 / 2, so the distance is |y|^2 - 2 score. Of equal ones the
// lowest row is taken, and the first shift. A GPU finds the same codes (cuda/encode_lattice.cu).
inline int16_t encode_lattice(const float* x) {
  float best_distance = INFINITY;
  int best_code = 0;
  for (int parity = 0; parity < 2; ++parity) {
    float y[8], magnitude[8], norm = 0;
    int negatives = 0;
    for (int i = 0; i < 8; ++i) {
      y[i] = x[i] - (parity ? -0.25f : 0.25f);
      magnitude[i] = std::fabs(y[i]);
      negatives += y[i] < 0;
      norm += rounded(y[i] * y[i]);
    }
    const float y_odd = negatives & 1;
    RegisterFloats best = -INFINITY - RegisterFloats{};
    RegisterInts best_row = {};
    for (int row = 0; row < 256; row += kRegisterLanes) {
      RegisterFloats dot = {}, cheapest = INFINITY - RegisterFloats{};
      for (int i = 0; i < 8; ++i) {
        const RegisterFloats term = rounded(load<RegisterFloats>(kLattice.absolute[i] + row) * magnitude[i]);
        dot += term;
        cheapest = term < cheapest ? term : cheapest;
      }
      const RegisterFloats odd = load<RegisterFloats>(kLattice.odd + row);
      const RegisterFloats mismatch = odd + y_odd - 2.0f * odd * y_odd;
      const RegisterFloats score = dot - 2.0f * mismatch * cheapest - load<RegisterFloats>(kLattice.half_norm + row);
      const RegisterInts better = score > best;
      best = better ? score : best;
      best_row = better ? row + lanes<RegisterInts>([](int lane) { return lane; }) : best_row;
    }
    int lane = 0;
    for (int i = 1; i < kRegisterLanes; ++i)
      if (best[i] > best[lane] || (best[i] == best[lane] && best_row[i] < best_row[lane])) lane = i;
    float distance = norm - 2 * best[lane];
    if (!(distance < best_distance)) continue;
    best_distance = distance;
    int row = best_row[lane], flips = 0, cheapest = 0;
    for (int i = 0; i < 8; ++i) {
      if ((y[i] < 0) != (kLattice.rows[row][i] < 0)) flips ^= 1 << LatticeTables::kSignBit[i];
      if (magnitude[i] * kLattice.absolute[i][row] < magnitude[cheapest] * kLattice.absolute[cheapest][row])
        cheapest = i;
    }
    if (__builtin_popcount(flips) & 1) flips ^= 1 << LatticeTables::kSignBit[cheapest];
    best_code = row << 8 | (flips ^ parity);
  }
  return int16_t(best_code);
}

}  // namespace
}  // namespace quip
