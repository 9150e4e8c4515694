// SPDX-License-Identifier: Apache-2.0
// HYB (QTIP, arXiv 2406.11235, section 3.1.2): bits 14..6 of h = x^2 + x choose a row of two weights, bit 15 negates the
// first. The small table has 16 copies, side by side, so that two lanes at most meet in a bank; 32 KB. The large one has a
// copy a lane and 1024 rows, the second half with the sign applied: no conflicts, an operation less, 128 KB.
#pragma once
#include "table_copies.h"
#include "trellis_stream.h"

namespace quip {

template <int bits, int kRows, int kCopies>
struct HybTable : TrellisCode<bits> {
  static constexpr int kTableBytes = kRows * kCopies * 4;
  const unsigned char* table;  // + 4 * kCopies * row: this lane's copy

  // lut: fp16 [512][2], 32 bits a row.
  DEVICE HybTable(const unsigned char* memory, const void*) : table(memory + 4 * (threadIdx.x % kCopies)) {}
  DEVICE static void fill(unsigned char* memory, const void* lut) {
    fill_copies<kRows, kCopies>(memory, [lut](int i) {
      return static_cast<const uint32_t*>(lut)[i % 512] ^ (i < 512 ? 0 : 0x8000u);
    });
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
