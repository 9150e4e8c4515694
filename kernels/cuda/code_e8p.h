// SPDX-License-Identifier: Apache-2.0
// The lattice of QuIP# (arXiv 2402.04396, section 4.2): one code is eight weights of a row, absolute values and signs.
//
// Nibble j of a row of the first table is 2 v, rounded down to even, plus 8, of component 2 j (j < 4) or 2 (j - 4) + 1.
// A row of the second has, for a byte of signs, 14 in the nibbles to negate, and in all of them 1 where a quarter is
// added. Their exclusive or n gives v -+ 1/4 = n / 2 + 1/4 - 4. Put above the lowest four bits of the mantissa of 32,
// which hold 1/4, a nibble is the number 32 + n / 2 + 1/4: four operations and three shifts make eight weights of a
// code, and 36 too much comes off the result. E81B, the second stage at 3 bits, is one table of nibbles 2 v + 8; there
// 36 1/4 are too much.
//
// The tables have 16 copies side by side, so that two lanes at most meet in a bank, or 32, where a block may have 96 KB
// for them: no conflicts. Words are stored rotated left by 7: the byte at bits 7..14 is, where it stands, multiplied by
// 128, the bytes of 32 copies.
//
//   word half            rotated [row g + 8: absolute, signs | row g: absolute, signs]         first stage
//   word 2 + half        the same of the second stage, 4 bits
//   word 2               rotated [half 1, row g + 8 | half 1, row g | half 0, row g + 8 | half 0, row g]     3 bits
#pragma once
#include "device.h"
#include "table_copies.h"
#include "thread_block.h"

namespace quip {

template <int bits_, int kCopies>
struct LatticeTables {
  static constexpr int bits = bits_, kVectors = 1, kSums = bits > 2 ? 2 : 1, kTables = bits == 3 ? 3 : 2;
  static constexpr int kRow = 4 * kCopies, kTable = 256 * kRow, kTableBytes = kTables * kTable;
  static constexpr XOrder kOrder = XOrder::kLattice;
  static constexpr float kSecond = bits == 3 ? 1 / 2.04f : bits == 4 ? 1 / 3.45f : 0;  // scale of the second stage
  static constexpr bool kGathers = false;
  static constexpr int kLightDepth = kNever;
  using Sum = float;
  using Words = uint32_t[bits];
  const unsigned char* table;
  uint32_t copy;  // 4 * this lane's copy: bits of an address that no row has
  uint32_t
      number;  // 32 1/4, twice: from memory, for an instruction takes one constant only and the compiler knows them all

  // tables: uint32 [3][256] and 0x50085008: absolute values, signs, E81B.
  DEVICE LatticeTables(const unsigned char* memory, const void* tables)
      : table(memory),
        copy(4 * (device::lane_index() & (kCopies - 1))),
        number(static_cast<const uint32_t*>(tables)[3 * 256]) {}
  DEVICE static void fill(unsigned char* memory, const void* tables) {
    fill_copies<kTables * 256, kCopies>(memory, [tables](int i) { return static_cast<const uint32_t*>(tables)[i]; });
  }

  DEVICE static void follow(Words&) {}  // a lane has whole codes

  // A row of a table, by byte i of a word before it was rotated.
  DEVICE uint32_t look_up(int which, uint32_t word, int i) const {
    const uint32_t row = device::funnel_left(word, word, (64 - 8 * i - (kCopies == 16)) % 32) & (255u * kRow);
    return *reinterpret_cast<const uint32_t*>(table + which * kTable + (row | copy));
  }

  // Eight nibbles to the A registers of rows g (row = 0) or g + 8 of two multiplications.
  DEVICE void expand(uint32_t nibbles, int row, uint32_t (&a)[2][4]) const {
    const auto two = [this](uint32_t v) { return (v & 0x00F000F0u) | number; };
    a[0][row] = two(nibbles << 4);
    a[0][row + 2] = two(nibbles);
    a[1][row] = two(nibbles >> 4);
    a[1][row + 2] = two(nibbles >> 8);
  }

  template <int half>
  DEVICE void decode(const Words& words, uint32_t (&a)[kSums][2][4]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      expand(look_up(0, words[half], 2 * row + 1) ^ look_up(1, words[half], 2 * row), row, a[0]);
      if constexpr (bits == 3) expand(look_up(2, words[2], 2 * half + row), row, a[1]);
      if constexpr (bits == 4)
        expand(look_up(0, words[2 + half], 2 * row + 1) ^ look_up(1, words[2 + half], 2 * row), row, a[1]);
    }
  }
};

template <int bits>
using Lattice = LatticeTables<bits, 16>;
template <int bits>
using LatticeLarge = LatticeTables<bits, 32>;

}  // namespace quip
