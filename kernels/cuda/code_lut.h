// SPDX-License-Identifier: Apache-2.0
// LUT (QTIP, arXiv 2406.11235, section 3.1): a table of all 65,536 states, fp16, read through the caches.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits_>
struct Lut {
  static constexpr int bits = bits_, kVectors = 1, kSums = 1, kTableBytes = 0;
  static constexpr XOrder kOrder = XOrder::kTrellis;
  static constexpr float kSecond = 0;
  static constexpr bool kGathers = true;
  using Sum = float;
  const uint16_t* values;

  DEVICE Lut(const unsigned char*, const void* table) : values(static_cast<const uint16_t*>(table)) {}
  DEVICE static void fill(unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const uint32_t (&words)[bits], uint32_t (&a)[1][2][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<8>([&](auto index) {
      constexpr int tile = decltype(index)::value / 4, j = decltype(index)::value % 4;
      const uint32_t first = values[stream.template window<tile, bits*(2 * j + 1)>()];
      const uint32_t second = values[stream.template window<tile, bits*(2 * j + 2)>()];
      a[0][tile][j] = first | second << 16;
    });
  }
};

}  // namespace quip
