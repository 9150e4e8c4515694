// SPDX-License-Identifier: Apache-2.0
// How a tier lays out the codes of a lattice weight (n, k) at load. There are blocks of kBlockRows rows x kBlockColumns
// columns, block row by block row, and n and k are padded to whole blocks with zeros.
#pragma once
#include <cstring>

#include "lattice.h"

namespace quip {
namespace {

// A code with its second stage, which is a row of E81B at 3 bits and another E8P code at 4.
struct LatticeCode {
  uint8_t row, signs, second_row, second_signs;
};

#if !defined(__AVX2__) || defined(__AVX512VNNI__)

// A block has 16 x 32 weights, which are 64 codes, in planes of 64 bytes. Byte 4 * row + g of a plane belongs to
// columns 8g .. 8g+7. The planes are rows of the table, signs, and the second stage: rows of E81B at 3 bits, rows and
// signs at 4.
constexpr int kBlockRows = 16, kBlockColumns = 32;
constexpr int64_t block_bytes(int bits) { return 64 * bits; }

inline void put_code(uint8_t* block, int bits, unsigned row, unsigned group, LatticeCode code) {
  const uint8_t planes[4] = {code.row, code.signs, code.second_row, code.second_signs};
  for (int plane = 0; plane < bits; ++plane) block[64 * plane + 4 * row + group] = planes[plane];
}

#else
#define QUIP_LATTICE_PARTS

// A block has 32 x 64 weights, which are 256 codes. AVX2 has no look-up of 256 bytes, so the parts of a code are kept:
// 17 bits for an E8P code, 9 for an E81B code.
//
//     E8P stage, 544 bytes    8 x (32 indices, 32 signs), one pair per 8 columns, then 8 x 32 bits "large"
//     E81B stage, 288 bytes   8 x 32 pairs, then 8 x 32 bits "halves"
//
// A block is an E8P stage, followed by an E81B stage at 3 bits and by another E8P stage at 4. Byte (and bit)
// place_of(row) of each 32 belongs to a row.
//
//     index   Bit i is set where component i is 3/2, and the others are 1/2. A "large" code has one component of 5/2:
//             the upper four bits are its number, and the lower four are the number of the one that is 3/2, or 8.
//     signs   Bit i is set where component i is negative. Bit 7 is flipped where the code moves by -1/4. The signs of a
//             row of the table have the parity of its 3/2s, so the parity of signs and 3/2s is 1 where the code does.
//     pairs   Two nibbles. Of "halves" they are the signs of components 0..3 and 4..7. Of integers they are the two
//             components that change by one, plus 8 where it is by +1. That says 0 and +-2, too.
constexpr int kBlockRows = 32, kBlockColumns = 64;
constexpr int64_t kE8pBytes = 544, kE81bBytes = 288;
constexpr int64_t block_bytes(int bits) { return kE8pBytes + (bits == 4 ? kE8pBytes : bits == 3 ? kE81bBytes : 0); }

// In this order two unpackings (int8/lattice_avx2.h) give rows 8p .. 8p+7.
constexpr unsigned place_of(unsigned row) { return row % 8 / 4 * 16 + row / 8 * 4 + row % 4; }

struct LatticeParts {
  uint8_t index[256] = {}, pairs[256] = {};
  bool large[256] = {}, halves[256] = {};
  uint8_t components[256] = {};  // bit i: bit kSignBit[i]

  constexpr LatticeParts() {
    for (int r = 0; r < 256; ++r) {
      int p = 0, q = 8;
      for (int i = 0; i < 8; ++i) {
        if (kLattice.absolute[i][r] == 1.5f) index[r] |= uint8_t(1 << i), q = i;
        if (kLattice.absolute[i][r] == 2.5f) large[r] = true, p = i;
        if (r >> LatticeTables::kSignBit[i] & 1) components[r] |= uint8_t(1 << i);
      }
      if (large[r]) index[r] = uint8_t(p << 4 | q);

      const float* w = kLattice.e81b[r];
      int nibbles[2] = {}, count = 0;
      halves[r] = w[0] == 0.5f || w[0] == -0.5f;
      for (int i = 0; i < 8; ++i) {
        if (halves[r]) {
          if (w[i] < 0) nibbles[i / 4] |= 1 << i % 4;
        } else {
          for (int step = 0; step < (w[i] < 0 ? -w[i] : w[i]); ++step) nibbles[count++] = i | (w[i] > 0 ? 8 : 0);
        }
      }
      if (!halves[r] && count == 0) nibbles[1] = 8;  // 0 = -1 + 1
      pairs[r] = uint8_t(nibbles[0] | nibbles[1] << 4);
    }
  }
};
constexpr LatticeParts kLatticeParts;

inline void put_bit(uint8_t* bits, unsigned place, bool bit) { bits[place / 8] |= uint8_t(bit << place % 8); }

inline void put_e8p(uint8_t* stage, unsigned place, unsigned group, uint8_t row, uint8_t s) {
  const int parity = __builtin_popcount(s) & 1;
  const uint8_t signs = kLatticeParts.components[s ^ parity] ^ uint8_t((int(kLattice.odd[row]) ^ parity) << 7);
  stage[64 * group + place] = kLatticeParts.index[row];
  stage[64 * group + 32 + place] = signs;
  put_bit(stage + 512 + 4 * group, place, kLatticeParts.large[row]);
}

inline void put_code(uint8_t* block, int bits, unsigned row, unsigned group, LatticeCode code) {
  const unsigned place = place_of(row);
  put_e8p(block, place, group, code.row, code.signs);
  uint8_t* second = block + kE8pBytes;
  if (bits == 3) {
    second[32 * group + place] = kLatticeParts.pairs[code.second_row];
    put_bit(second + 256 + 4 * group, place, kLatticeParts.halves[code.second_row]);
  }
  if (bits == 4) put_e8p(second, place, group, code.second_row, code.second_signs);
}

#endif

inline int64_t block_row_bytes(int64_t k, int bits) {
  return (k + kBlockColumns - 1) / kBlockColumns * block_bytes(bits);
}

inline int64_t lattice_bytes(int64_t n, int64_t k, int bits) {
  return (n + kBlockRows - 1) / kBlockRows * block_row_bytes(k, bits);
}

// Puts rows row0 .. row0 + rows - 1 of a part in its blocks, which are zero. row0 is a multiple of 32, and so is rows,
// except for the last. codes is int16 [n, k/8]; second has the same shape, uint8 at 3 bits and int16 at 4.
inline void put_rows(const int16_t* codes, const void* second, int64_t row0, int64_t rows, int64_t k, int bits,
                     uint8_t* blocks) {
  for (int64_t r = row0; r < row0 + rows; ++r)
    for (int64_t g = 0; g < k / 8; ++g) {
      const int64_t at = r * (k / 8) + g;
      const uint16_t code = uint16_t(codes[at]);
      LatticeCode parts{uint8_t(code >> 8), uint8_t(code), 0, 0};
      if (bits == 3) parts.second_row = static_cast<const uint8_t*>(second)[at];
      if (bits == 4) {
        const uint16_t rest = uint16_t(static_cast<const int16_t*>(second)[at]);
        parts.second_row = uint8_t(rest >> 8), parts.second_signs = uint8_t(rest);
      }
      uint8_t* block = blocks + r / kBlockRows * block_row_bytes(k, bits) + 8 * g / kBlockColumns * block_bytes(bits);
      put_code(block, bits, unsigned(r % kBlockRows), unsigned(g % (kBlockColumns / 8)), parts);
    }
}

}  // namespace
}  // namespace quip
