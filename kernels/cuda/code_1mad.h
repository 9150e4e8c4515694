// SPDX-License-Identifier: Apache-2.0
// 1MAD (QTIP, arXiv 2406.11235, section 3.1.1): a weight is (sum of the bytes of a state + b - 510) / 147.8, modulo
// 2^32.
#pragma once
#include "trellis_stream.h"

namespace quip {

constexpr float kOneMadUnit = 1.0f / 147.800537109375f;

DEVICE uint32_t one_mad(uint32_t state) { return state * 34038481u + 76625530u; }

// fp16: adding the bytes to the bit pattern of 1024 gives the number 1024 + sum exactly. The constant comes off the
// result.
template <int bits, TileOrder order>
struct OneMadInOrder : TrellisCode<bits, order> {
  // Of which shared memory holds two blocks; tiles by rows keep two streams in registers.
  static constexpr int kLightDepth = order == TileOrder::kByRows ? kNever : bits == 1 ? 1 : bits == 2 ? 4 : kNever;

  DEVICE OneMadInOrder(const unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][2][4]) const {
    this->template join_pairs<half>(words, a, [](uint32_t first, uint32_t second) {
      return device::permute_bytes(device::sum_bytes(one_mad(first), 0x6400),
                                   device::sum_bytes(one_mad(second), 0x6400), 0x5410);
    });
  }
};

template <int bits>
using OneMad = OneMadInOrder<bits, TileOrder::kOurs>;
template <int bits>
using OneMadByRows = OneMadInOrder<bits, TileOrder::kByRows>;

// int8: the bytes themselves are multiplied, each with the same activation, and the tensor core sums them.
template <int bits>
struct OneMadBytes : TrellisCode<bits> {
  static constexpr int kVectors = 2;
  static constexpr XOrder kOrder = XOrder::kBytes;
  static constexpr int kLightDepth = bits == 1 ? 1 : kNever;  // at 2 the compiler takes no more, either
  using Sum = int32_t;

  DEVICE OneMadBytes(const unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const TrellisWords<bits>& words, uint32_t (&a)[1][4][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<16>([&](auto index) {
      constexpr int i = decltype(index)::value;
      a[0][i / 8 * 2 + i % 2][i % 8 / 2] = one_mad(stream.template window<bits*(i + 1)>());
    });
  }
};

}  // namespace quip
