// SPDX-License-Identifier: Apache-2.0
// HYB (QTIP, arXiv 2406.11235, section 3.1.2): bits 14..6 of h = x^2 + x choose a row of two weights, and bit 15
// negates the first. The small table, 32 KB, has 16 copies side by side, so that at most two lanes meet in a bank. The
// large table, 128 KB, has one copy per lane and 1024 rows, of which the second half has the sign applied. It takes one
// operation less, and no lanes meet.
#pragma once
#include "table_copies.h"
#include "trellis_stream.h"

namespace quip {

template <int bits, int kRows, int kCopies>
struct HybTable : TrellisCode<bits> {
  static constexpr int kTableBytes = kRows * kCopies * 4;
  const unsigned char* table;  // + 4 * kCopies * row: this lane's copy

  // lut: fp16 [512][2], 32 bits per row.
  DEVICE HybTable(const unsigned char* memory, const void*) : table(memory + 4 * (threadIdx.x % kCopies)) {}
  DEVICE static void fill(unsigned char* memory, const void* lut) {
    fill_copies<kRows, kCopies>(
        memory, [lut](int i) { return static_cast<const uint32_t*>(lut)[i % 512] ^ (i < 512 ? 0 : 0x8000u); });
  }

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<8>([&](auto index) {
      constexpr int i = decltype(index)::value;
      const uint32_t x = stream.template low_window<2 * bits*(i + 1)>();
      const uint32_t h = x * x + x;  // its low 16 bits are right whatever is above x
      constexpr uint32_t kIndex = (kRows - 1) << 6;
      const uint32_t row = *reinterpret_cast<const uint32_t*>(table + kCopies / 16 * (h & kIndex));
      a[0][i / 4][i % 4] = kRows == 512 ? row ^ (h & 0x8000u) : row;
    });
  }
};

template <int bits>
using Hyb = HybTable<bits, 512, 16>;
template <int bits>
using HybLarge = HybTable<bits, 1024, 32>;

}  // namespace quip
