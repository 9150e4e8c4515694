// SPDX-License-Identifier: Apache-2.0
// LUT (QTIP, arXiv 2406.11235, section 3.1) and TABLE: a table of all 65,536 states, fp16, read through the caches.
// PAIRS: a table of two weights for each.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits, TileOrder order>
struct LutInOrder : TrellisCode<bits, order> {
  static constexpr bool kGathers = true;
  const uint16_t* values;

  DEVICE LutInOrder(const unsigned char*, const void* table) : values(static_cast<const uint16_t*>(table)) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template join_pairs<half>(words, a, [this](uint32_t first, uint32_t second) {
      return uint32_t(values[first]) | uint32_t(values[second]) << 16;
    });
  }
};

template <int bits>
using Lut = LutInOrder<bits, TileOrder::kOurs>;
template <int bits>
using TableByRows = LutInOrder<bits, TileOrder::kByRows>;

template <int bits>
struct PairsByRows : TrellisCode<bits, TileOrder::kByRows> {
  static constexpr bool kGathers = true;
  const uint32_t* values;

  DEVICE PairsByRows(const unsigned char*, const void* table) : values(static_cast<const uint32_t*>(table)) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template each_register<half>(words, [&](auto index, const auto& stream, auto position) {
      constexpr int i = decltype(index)::value, first = decltype(position)::value;
      a[0][i / 4][i % 4] = values[stream.template window<bits*(first + 2)>()];  // a step before it is in front
    });
  }
};

}  // namespace quip
