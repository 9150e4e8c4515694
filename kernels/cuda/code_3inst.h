// SPDX-License-Identifier: Apache-2.0
// 3INST (QTIP, arXiv 2406.11235, section 3.1.1): a weight is the sum of the two fp16 halves of a masked multiply-add.
//
// The second mask comes from memory: an instruction takes one constant only, and the compiler would spend two.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits_>
struct ThreeInst {
  static constexpr int bits = bits_, kVectors = 1, kSums = 1, kTableBytes = 0;
  static constexpr XOrder kOrder = XOrder::kTrellis;
  static constexpr float kSecond = 0;
  static constexpr bool kGathers = false;
  using Sum = float;

  uint32_t flips;  // 0x3B603B60

  // table: uint32 [4], the first is it.
  DEVICE ThreeInst(const unsigned char*, const void* table) : flips(*static_cast<const uint32_t*>(table)) {}
  DEVICE static void fill(unsigned char*, const void*) {}

  DEVICE uint32_t halves(uint32_t state) const {
    return ((state * 89226354u + 64248484u) & 0x8FFF8FFFu) ^ flips;
  }

  template <int half>
  DEVICE void decode(const uint32_t (&words)[bits], uint32_t (&a)[1][2][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<8>([&](auto index) {
      constexpr int tile = decltype(index)::value / 4, j = decltype(index)::value % 4;
      const uint32_t first = halves(stream.template window<tile, bits*(2 * j + 1)>());
      const uint32_t second = halves(stream.template window<tile, bits*(2 * j + 2)>());
      a[0][tile][j] = device::add_halves(device::permute_bytes(first, second, 0x5410),
                                         device::permute_bytes(first, second, 0x7632));
    });
  }
};

}  // namespace quip
