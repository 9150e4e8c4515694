// SPDX-License-Identifier: Apache-2.0
// The bit stream of a lane: its own 8 * bits bits, then the first 16 of the next lane. A lane decodes positions 8 lane ..
// 8 lane + 7 of a tile (formats/tile.py); its own bits begin `step` bits before the first of their windows, which puts the
// last window at the end of a word, where it needs no shift.
//
// Of the `bits` bytes B0 B1 .. that a lane owns of each tile, two at a time are a big-endian number of 16 bits. A word
// holds such a pair of two tiles; with odd bits, the last byte of all four tiles of the chunk is one word more.
//
//   word 2 p + half     [tile 2 half + 1: B2p B2p+1 | tile 2 half: B2p B2p+1]
//   word bits - 1       [tile 3: B | tile 2: B | tile 1: B | tile 0: B]         B the last byte, for odd bits
#pragma once
#include <type_traits>

#include "device.h"
#include "layout.h"

namespace quip {

template <int bits, int half>
struct TrellisStream {
  static constexpr int kPairs = bits / 2 + 2;
  uint32_t pair[kPairs];  // bytes 2 p and 2 p + 1 of the stream, of both tiles of the half

  DEVICE explicit TrellisStream(const uint32_t (&words)[bits]) {
    const int lane = threadIdx.x % kLanes;
    if constexpr (bits == 1) {
      const uint32_t next = device::shuffle(words[0], lane + 1), after = device::shuffle(words[0], lane + 2);
      pair[0] = device::permute_bytes(words[0], next, half ? 0x3726 : 0x1504);
      pair[1] = device::permute_bytes(after, after, half ? 0x3020 : 0x1000);
    } else {
      const uint32_t next = device::shuffle(words[half], lane + 1);  // of the last lane the first: tail-biting
#pragma unroll
      for (int p = 0; p < bits / 2; ++p) pair[p] = words[2 * p + half];
      if constexpr (bits % 2 == 0) {
        pair[bits / 2] = next;
      } else {
        pair[bits / 2] = device::permute_bytes(words[bits - 1], next, half ? 0x3725 : 0x1705);
        pair[bits / 2 + 1] = next;  // of which the second byte is meant
      }
    }
  }

  // 32 bits of the stream of tile 2 half + tile, from bit 16 * p.
  template <int tile, int p>
  DEVICE uint32_t word() const {
    constexpr bool kSecondByte = bits % 2 && bits > 1 && p == bits / 2;
    constexpr int kSelector = kSecondByte ? (tile ? 0x7622 : 0x5400) : (tile ? 0x7632 : 0x5410);
    return device::permute_bytes(pair[p + 1], pair[p], kSelector);
  }

  // The 16 bits from bit `start` > 0, in the low half of the result; what the high half holds is not said.
  template <int tile, int start>
  DEVICE uint32_t low_window() const {
    constexpr int p = (start - 1) / 16, shift = 16 * (p + 1) - start;
    return word<tile, p>() >> shift;
  }

  // The 16 bits from bit `start` > 0. Windows whose shifts differ by 8 share the shifted word.
  template <int tile, int start>
  DEVICE uint32_t window() const {
    constexpr int p = (start - 1) / 16, shift = 16 * (p + 1) - start;
    return device::permute_bytes(word<tile, p>() >> (shift % 8), 0, shift < 8 ? 0x4410 : 0x4421);
  }
};

// Calls f(std::integral_constant) for 0 .. count - 1.
template <int count, class F>
DEVICE void unrolled(F f) {
  if constexpr (count > 0) {
    unrolled<count - 1>(f);
    f(std::integral_constant<int, count - 1>());
  }
}

// What trellis codes have in common; a code says what differs.
template <int bits_>
struct TrellisCode {
  static constexpr int bits = bits_;
  static constexpr int kVectors = 1;     // of 16 bytes of x in a half
  static constexpr int kSums = 1;        // that an output has: stages of the code
  static constexpr int kTableBytes = 0;  // of shared memory
  static constexpr XOrder kOrder = XOrder::kTrellis;
  static constexpr float kSecond = 0;      // scale of the second stage
  static constexpr bool kGathers = false;  // whether weights come from memory
  using Sum = float;

  // Fills the table in shared memory; all threads of a block call it.
  DEVICE static void fill(unsigned char*, const void*) {}

  // The A registers of a half, two fp16 weights each: what join makes of two neighbouring states.
  template <int half, class F>
  DEVICE static void join_pairs(const uint32_t (&words)[bits], uint32_t (&a)[1][2][4], F join) {
    const TrellisStream<bits, half> stream(words);
    unrolled<8>([&](auto index) {
      constexpr int tile = decltype(index)::value / 4, j = decltype(index)::value % 4;
      a[0][tile][j] = join(stream.template window<tile, bits*(2 * j + 1)>(), stream.template window<tile, bits*(2 * j + 2)>());
    });
  }
};

}  // namespace quip
