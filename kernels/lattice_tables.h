// SPDX-License-Identifier: Apache-2.0
// The E8P codebook of QuIP# (arXiv 2402.04396, section 4.2): its tables.
//
// The high byte of a 16-bit code is a row of the table of 256 absolute vectors, and the low byte is the signs s. With
// the parity of s in bit 0, s' = s ^ parity flips an even number of components. Then all components move by +1/4
// (parity 0) or -1/4 (parity 1). Component i has sign bit {0,4,1,5,2,6,3,7}[i] of s'.
#pragma once
#include <algorithm>
#include <cstdint>

namespace quip {
namespace {

struct LatticeTables {
  float rows[256][8] = {};  // signed: the sum of a row is even
  alignas(64) float absolute[8][256] = {};
  alignas(64) float half_norm[256] = {};
  alignas(64) float odd[256] = {};  // 1 where component 7 of the row is negative
  uint32_t signs[256][8] = {};      // sign masks of s (already s')
  float shift[256] = {};
  float e81b[256][8] = {};

  static constexpr int kSignBit[8] = {0, 4, 1, 5, 2, 6, 3, 7};

  // Calls f for each vector of 8 digits below `base`, in lexicographic order.
  template <class F>
  static constexpr void each(int base, F f) {
    int count = 1;
    for (int i = 0; i < 8; ++i) count *= base;
    for (int number = 0; number < count; ++number) {
      int digit[8] = {};
      for (int i = 7, rest = number; i >= 0; --i, rest /= base) digit[i] = rest % base;
      f(digit);
    }
  }

  constexpr LatticeTables() {
    int row = 0;
    each(3, [&](const int* digit) {
      int norm4 = 0;  // four times the squared norm
      for (int i = 0; i < 8; ++i) norm4 += (2 * digit[i] + 1) * (2 * digit[i] + 1);
      if (norm4 > 40) return;
      for (int i = 0; i < 8; ++i) rows[row][i] = digit[i] + 0.5f;
      ++row;
    });
    // The 29 rows of squared norm 12: positions of their three halves, the other five components are 3/2.
    const char* const kHalves[29] = {"123", "023", "013", "012", "367", "357", "347", "356", "346", "345",
                                     "267", "257", "247", "256", "246", "245", "167", "157", "147", "156",
                                     "146", "045", "067", "057", "047", "056", "046", "014", "237"};
    for (const char* halves : kHalves) {
      for (int i = 0; i < 8; ++i) rows[row][i] = 1.5f;
      for (int i = 0; i < 3; ++i) rows[row][halves[i] - '0'] = 0.5f;
      ++row;
    }
    for (int r = 0; r < 256; ++r) {
      float total = 0, norm = 0;
      for (int i = 0; i < 8; ++i) {
        absolute[i][r] = rows[r][i];
        total += rows[r][i];
        norm += rows[r][i] * rows[r][i];
      }
      half_norm[r] = norm / 2;
      odd[r] = int(total) % 2;
      if (odd[r]) rows[r][7] = -rows[r][7];
    }
    for (int s = 0; s < 256; ++s) {
      int parity = __builtin_popcount(s) & 1;
      for (int i = 0; i < 8; ++i) signs[s][i] = uint32_t((s ^ parity) >> kSignBit[i] & 1) << 31;
      shift[s] = parity ? -0.25f : 0.25f;
    }
    row = 0;
    each(3, [&](const int* digit) {  // integer vectors of E8 with squared norm at most 2
      int norm = 0, total = 0;
      for (int i = 0; i < 8; ++i) norm += (digit[i] - 1) * (digit[i] - 1), total += digit[i] - 1;
      if (norm > 2 || total % 2 != 0) return;
      for (int i = 0; i < 8; ++i) e81b[row][i] = digit[i] - 1;
      ++row;
    });
    each(2, [&](const int* digit) {  // halves with an even number of minus signs
      int minus = 0;
      for (int i = 0; i < 8; ++i) minus += digit[i] == 0;
      if (minus % 2 != 0) return;
      for (int i = 0; i < 8; ++i) e81b[row][i] = digit[i] - 0.5f;
      ++row;
    });
    for (int i = 0; row < 256; ++i, ++row) {
      std::fill(e81b[row], e81b[row] + 8, 0.0f);
      e81b[row][i % 8] = i < 8 ? 2.0f : -2.0f;
    }
  }
};
}  // namespace
}  // namespace quip
