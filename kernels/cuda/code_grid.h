// SPDX-License-Identifier: Apache-2.0
// QuIP's grid (arXiv 2307.13304): a weight is 2 k - (2^bits - 1), and k is in the low bits of a state. At the top of the
// mantissa of 2^(bits + 1) they make 2^(bits + 1) + 2 k. The constant comes off the result.
#pragma once
#include "trellis_stream.h"

namespace quip {

template <int bits>
struct Grid : TrellisCode<bits> {
  static constexpr uint32_t kTwice = 0x10001, kMantissa = 10;

  DEVICE Grid(const unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<8>([&](auto index) {
      constexpr int i = decltype(index)::value, first = bits * (2 * i + 1) + kMantissa - bits;
      const uint32_t pair = device::permute_bytes(stream.template low_window<first>(),
                                                  stream.template low_window<first + bits>(), 0x5410);
      constexpr uint32_t kNumber = ((1 << bits) - 1) << (kMantissa - bits), kOne = (15 + bits + 1) << kMantissa;
      a[0][i / 4][i % 4] = (pair & kTwice * kNumber) | kTwice * kOne;
    });
  }
};

}  // namespace quip
