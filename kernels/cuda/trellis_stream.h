// SPDX-License-Identifier: Apache-2.0
// The bit stream of a lane. In a half, lane 4 g + t has run 2 g + t % 2 of 16 positions (formats/tile.py) of tile 2 half +
// t / 2, and decodes it. Of tiles by rows it has runs g and g + 8, which are rows, of tile t, and decodes a half of each.
// A run has `bits` units U0 U1 .. of 16 bits, and a shuffle fetches the first unit N0 of the next run.
// The units begin `step` bits before the first window. That puts the last window at the end of N0, where it needs no
// shift.
//
// A word is a pair of units, with U0 or U1 in the upper half. A funnel shift of two neighbouring words gives any
// window. With an odd number of units the first ones of both halves share a word, and so they share a shuffle.
// At a half rate (formats/trellis.py) a run ends 8 bits before its units do: these are the first bits of the next run, and
// N0 begins there.
//
//   word half * (bits / 2) + i     even bits [U2i | U2i+1], odd bits [U2i+1 | U2i+2]     of the half
//   word bits - 1                  odd bits  [half 1: U0 | half 0: U0]
#pragma once
#include <type_traits>

#include "device.h"
#include "thread_block.h"

namespace quip {

// A lane's words of a tile's chunk, then the word that each half goes on with. With odd bits both halves share it.
template <int bits>
using TrellisWords = uint32_t[bits + 2 - bits % 2];

template <int bits, int half, bool half_rate = false>
struct TrellisStream {
  static constexpr int kBefore = bits % 2 ? 16 : 0;  // bits of no meaning in front
  uint32_t part[bits / 2 + 1 + bits % 2];            // of which the last has 16 bits

  DEVICE explicit TrellisStream(const TrellisWords<bits>& words) {
    constexpr int kFirst = bits % 2, kLast = bits / 2 + bits % 2;
#pragma unroll
    for (int i = 0; i < bits / 2; ++i) part[kFirst + i] = words[half * (bits / 2) + i];
    if constexpr (bits % 2) part[0] = half ? words[bits - 1] >> 16 : words[bits - 1];
    part[kLast] = bits % 2 == 0 ? words[bits + half] : half ? words[bits] : words[bits] << 16;
    if constexpr (half_rate) part[kLast] <<= 8;
  }

  // 32 bits of the stream from bit `at` of the parts.
  template <int at>
  DEVICE uint32_t word() const {
    if constexpr (at % 32 == 0)
      return part[at / 32];
    else
      return device::funnel_left(part[at / 32], part[at / 32 + 1], at % 32);
  }

  // The 16 bits from bit `start` > 0, in the low half of the result; what the high half holds is not said.
  template <int start>
  DEVICE uint32_t low_window() const {
    constexpr int at = kBefore + start;
    if constexpr (at % 32 <= 16)
      return part[at / 32] >> (16 - at % 32);
    else
      return word<at - 16>();
  }

  // The 16 bits from bit `start` > 0: two bytes of a part, or of a shifted word, which up to three windows share.
  template <int start>
  DEVICE uint32_t window() const {
    constexpr int at = kBefore + start, place = at % 32;
    constexpr int byte = place % 8 == 0 && place < 24 ? place / 8 : start / 8 % 3;
    return device::permute_bytes(word<at - 8 * byte>(), 0, byte == 0 ? 0x4432 : byte == 1 ? 0x4421 : 0x4410);
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

// What trellis codes have in common; a code says what differs. In a swapped tile the two quarters off the diagonal have
// changed places (formats/tile.py), and so have the registers that hold them.
template <int bits_, TileOrder order = TileOrder::kOurs, bool half_rate = false>
struct TrellisCode {
  static constexpr bool kByRows = order == TileOrder::kByRows;
  static constexpr int bits = bits_;
  using Words = TrellisWords<bits>;
  static constexpr int kVectors = 1;     // of 16 bytes of x in a half
  static constexpr int kSums = 1;        // that an output has: stages of the code
  static constexpr int kTableBytes = 0;  // of shared memory
  static constexpr XOrder kOrder = kByRows ? XOrder::kTilesByRows : XOrder::kTrellis;
  static constexpr float kSecond = 0;         // scale of the second stage
  static constexpr bool kGathers = false;     // whether weights come from memory
  static constexpr int kLightDepth = kNever;  // depth from which 64 registers of a thread are enough for up to 8 rows
  using Sum = float;

  // Where the window of a position begins. At a half rate every other step is a bit shorter.
  static constexpr int window_of(int position) {
    return half_rate ? bits * (position + 1) - 1 - position / 2 : bits * (position + 1);
  }

  // Fills the table in shared memory; all threads of a block call it.
  DEVICE static void fill(unsigned char*, const void*) {}

  // Fetches what a lane's streams go on with from the lanes of the next runs: of the last run the first, tail-biting.
  DEVICE static void follow(Words& words) {
    const int lane = device::lane_index(), next = kByRows ? lane + 4 : lane + 1 + (lane & 1) * 2;
#pragma unroll
    for (int i = 0; i < 2 - bits % 2; ++i)
      words[bits + i] = device::shuffle(words[bits % 2 ? bits - 1 : i * (bits / 2)], next);
    if (kByRows && lane >= kLanes - 4) {  // rows 7 and 15 go on with those of the other half
      if constexpr (bits % 2) {
        words[bits] = device::funnel_left(words[bits], words[bits], 16);
      } else {
        const uint32_t first = words[bits];
        words[bits] = words[bits + 1], words[bits + 1] = first;
      }
    }
  }

  // Calls f(i, stream, position) for register i of the A registers of a half, four for each multiplication, with the
  // first of the two positions of the stream that it holds; i and position are std::integral_constant.
  template <int half, class F>
  DEVICE static void each_register(const Words& words, F f) {
    if constexpr (kByRows) {
      const TrellisStream<bits, 0> upper(words);
      const TrellisStream<bits, 1> lower(words);
      unrolled<8>([&](auto index) {
        constexpr int i = decltype(index)::value;
        const std::integral_constant<int, 8 * half + 2 * (i / 2)> position;
        if constexpr (i % 2)
          f(index, lower, position);
        else
          f(index, upper, position);
      });
    } else {
      const TrellisStream<bits, half, half_rate> stream(words);
      unrolled<8>([&](auto index) {
        constexpr int i = decltype(index)::value, place = i % 4;
        constexpr int to = order == TileOrder::kSwapped ? place / 2 + place % 2 * 2 : place;
        f(std::integral_constant<int, i / 4 * 4 + to>(), stream, std::integral_constant<int, 2 * i>());
      });
    }
  }

  // The A registers of a half, two fp16 weights each: what join makes of two neighbouring states.
  template <int half, class F>
  DEVICE static void join_pairs(const Words& words, uint32_t (&a)[1][2][4], F join) {
    each_register<half>(words, [&](auto index, const auto& stream, auto position) {
      constexpr int i = decltype(index)::value, first = decltype(position)::value;
      a[0][i / 4][i % 4] =
          join(stream.template window<window_of(first)>(), stream.template window<window_of(first + 1)>());
    });
  }
};

}  // namespace quip
