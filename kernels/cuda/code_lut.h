// SPDX-License-Identifier: Apache-2.0
// LUT (QTIP, arXiv 2406.11235, section 3.1): a table of all 65,536 states, fp16, read through the caches.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits>
struct Lut : TrellisCode<bits> {
  static constexpr bool kGathers = true;
  const uint16_t* values;

  DEVICE Lut(const unsigned char*, const void* table) : values(static_cast<const uint16_t*>(table)) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template join_pairs<half>(words, a, [this](uint32_t first, uint32_t second) {
      return uint32_t(values[first]) | uint32_t(values[second]) << 16;
    });
  }
};

}  // namespace quip
