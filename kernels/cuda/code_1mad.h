// SPDX-License-Identifier: Apache-2.0
// 1MAD (QTIP, arXiv 2406.11235, section 3.1.1): a weight is (sum of the bytes of a state + b - 510) / 147.8, modulo 2^32.
#pragma once
#include "trellis_stream.h"

namespace quip {

constexpr float kOneMadUnit = 1.0f / 147.800537109375f;

DEVICE uint32_t one_mad(uint32_t state) { return state * 34038481u + 76625530u; }

// fp16: adding the bytes to the bit pattern of 1024 gives the number 1024 + sum exactly. The constant comes off the result.
template <int bits_>
struct OneMad {
  static constexpr int bits = bits_, kVectors = 1, kSums = 1, kTableBytes = 0;
  static constexpr XOrder kOrder = XOrder::kTrellis;
  static constexpr float kSecond = 0;
  static constexpr bool kGathers = false;
  using Sum = float;

  DEVICE OneMad(const unsigned char*, const void*) {}
  DEVICE static void fill(unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const uint32_t (&words)[bits], uint32_t (&a)[1][2][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<8>([&](auto index) {
      constexpr int tile = decltype(index)::value / 4, j = decltype(index)::value % 4;
      const uint32_t first = one_mad(stream.template window<tile, bits*(2 * j + 1)>());
      const uint32_t second = one_mad(stream.template window<tile, bits*(2 * j + 2)>());
      a[0][tile][j] = device::permute_bytes(device::sum_bytes(first, 0x6400), device::sum_bytes(second, 0x6400), 0x5410);
    });
  }
};

// int8: the bytes themselves are multiplied, each with the same activation; the tensor core sums them.
template <int bits_>
struct OneMadBytes {
  static constexpr int bits = bits_, kVectors = 2, kSums = 1, kTableBytes = 0;
  static constexpr XOrder kOrder = XOrder::kBytes;
  static constexpr float kSecond = 0;
  static constexpr bool kGathers = false;
  using Sum = int32_t;

  DEVICE OneMadBytes(const unsigned char*, const void*) {}
  DEVICE static void fill(unsigned char*, const void*) {}

  template <int half>
  DEVICE void decode(const uint32_t (&words)[bits], uint32_t (&a)[1][4][4]) const {
    const TrellisStream<bits, half> stream(words);
    unrolled<16>([&](auto index) {
      constexpr int tile = decltype(index)::value / 8, i = decltype(index)::value % 8;
      a[0][2 * tile + i % 2][i / 2] = one_mad(stream.template window<tile, bits*(i + 1)>());
    });
  }
};

}  // namespace quip
