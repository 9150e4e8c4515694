// SPDX-License-Identifier: Apache-2.0
// MUL1 (EXL3): a weight is fp16(a (1024 + sum of the bytes of a product) - b), a fused multiply-add in fp16.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits, TileOrder order, bool half_rate = false>
struct Mul1InOrder : TrellisCode<bits, order, half_rate> {
  DEVICE Mul1InOrder(const unsigned char*, const void*) {}

  // 0x6400 is 1024 in fp16, to which the sum is added exactly; 0x1EEE is a, and 0xC931 is -b.
  DEVICE static uint32_t sum(uint32_t state) { return device::sum_bytes(state * 0x83DCD12Du, 0x6400); }

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template join_pairs<half>(words, a, [](uint32_t first, uint32_t second) {
      const uint32_t sums = device::permute_bytes(sum(first), sum(second), 0x5410);
      return device::multiply_add_halves(sums, 0x1EEE1EEEu, 0xC931C931u);
    });
  }
};

template <int bits>
using Mul1 = Mul1InOrder<bits, TileOrder::kOurs>;
template <int bits>
using Mul1Swapped = Mul1InOrder<bits, TileOrder::kSwapped>;
template <int bits>
using Mul1HalfSwapped = Mul1InOrder<bits, TileOrder::kSwapped, true>;

}  // namespace quip
