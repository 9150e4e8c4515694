// SPDX-License-Identifier: Apache-2.0
// 3INST (QTIP, arXiv 2406.11235, section 3.1.1): a weight is the sum of the two fp16 halves of a masked multiply-add.
// MCG (EXL3): of a masked product.
//
// The second mask comes from memory: an instruction takes one constant only, and the compiler would spend two.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits, TileOrder order, uint32_t factor, uint32_t term>
struct TwoHalves : TrellisCode<bits, order> {
  uint32_t flips;  // 0x3B603B60

  // table: uint32 [4], the first is it.
  DEVICE TwoHalves(const unsigned char*, const void* table) : flips(*static_cast<const uint32_t*>(table)) {}

  DEVICE uint32_t halves(uint32_t state) const { return ((state * factor + term) & 0x8FFF8FFFu) ^ flips; }

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template join_pairs<half>(words, a, [this](uint32_t first_state, uint32_t second_state) {
      const uint32_t first = halves(first_state), second = halves(second_state);
      return device::add_halves(device::permute_bytes(first, second, 0x5410),
                                device::permute_bytes(first, second, 0x7632));
    });
  }
};

template <int bits>
using ThreeInst = TwoHalves<bits, TileOrder::kOurs, 89226354u, 64248484u>;
template <int bits>
using ThreeInstSwapped = TwoHalves<bits, TileOrder::kSwapped, 89226354u, 64248484u>;
template <int bits>
using ThreeInstByRows = TwoHalves<bits, TileOrder::kByRows, 89226354u, 64248484u>;
template <int bits>
using Mcg = TwoHalves<bits, TileOrder::kOurs, 0xCBAC1FEDu, 0>;
template <int bits>
using McgSwapped = TwoHalves<bits, TileOrder::kSwapped, 0xCBAC1FEDu, 0>;

}  // namespace quip
