// SPDX-License-Identifier: Apache-2.0
// Decodes lattice codes to bytes for int8 activations, 64 codes (16 rows x 32 columns) at a time, all in registers.
//
// Component j of the 64 codes of a block (lattice_layout.h) is one vector: 16 rows, the 32-bit lanes, x 4 columns
// {j, 8+j, 16+j, 24+j}.
//
// Each component of the table of absolute vectors is 1/2, 3/2 or 5/2, which is d = 0, 1, 2 in two bits. A byte holds
// four components, so two tables of 256 bytes hold all. In quarters, 4|v| = d<<2 | 2, and both sign and shift are an
// exclusive or:
//
//     4 (+-|v| +- 1/4) = (d<<2 | 2) ^ 1 ^ (shift down ? 2 : 0) ^ (negative ? 0xFC : 0)
//
// The parity of the signs, the sign bit of a component and the parity fix of component 7 (odd number of 3/2) are sums
// modulo 2 of stored bits. So GF2P8AFFINEQB, a matrix product over GF(2) in each byte, computes each in one step.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "../lattice_layout.h"
#include "lanes_avx512.h"

namespace quip {
namespace {

// Component i of a row in its bits of a byte: |v| - 1/2 of E8P, four per byte, and 2 v of E81B as a 4-bit integer, two
// per byte.
constexpr uint8_t field_of(int row, int i) { return uint8_t(int(kLattice.absolute[i][row] - 0.5f) << (2 * (i % 4))); }
constexpr uint8_t nibble_of(int row, int i) { return uint8_t((int(2 * kLattice.e81b[row][i]) & 15) << (4 * (i % 2))); }

// The matrix whose output bit i is the parity of the input bits in rows[i].
struct BitMatrix {
  uint8_t rows[8] = {};
  constexpr long long word() const {
    unsigned long long w = 0;
    for (int i = 0; i < 8; ++i) w |= (unsigned long long)(rows[i]) << (8 * (7 - i));
    return (long long)w;
  }
};

struct LatticeTables8 {
  alignas(64) uint8_t fields[2][256] = {};   // E8P: components 0..3 and 4..7
  alignas(64) uint8_t nibbles[4][256] = {};  // E81B: components 2 i and 2 i + 1
  long long nibble[2] = {};                  // the matrices that extend the sign of the low and the high four bits

  constexpr LatticeTables8() {
    for (int half = 0; half < 2; ++half) {
      BitMatrix n;
      for (int b = 0; b < 8; ++b) n.rows[b] = uint8_t(1 << (4 * half + std::min(b, 3)));
      nibble[half] = n.word();
    }
    for (int r = 0; r < 256; ++r)
      for (int i = 0; i < 8; ++i) {
        fields[i / 4][r] |= field_of(r, i);
        nibbles[i / 2][r] |= nibble_of(r, i);
      }
  }
};
constexpr LatticeTables8 kLattice8;

// What stored signs add to 4 v << low, or, where low is -1, to the four bits 4 v >> 1.
template <int low>
struct SignMatrices {
  long long sign[8] = {}, odd = 0;
  constexpr SignMatrices() {
    constexpr int top = low < 0 ? 4 : 8;
    BitMatrix o;
    for (int b = 2 + low; b < top; ++b) o.rows[b] = 0x55;
    odd = o.word();
    for (int i = 0; i < 8; ++i) {
      BitMatrix s;
      const int bit = LatticeTables::kSignBit[i];
      s.rows[1 + low] = 0xFF;
      for (int b = 2 + low; b < top; ++b) s.rows[b] = bit == 0 ? 0xFE : uint8_t(1 << bit);  // parity flips bit 0
      sign[i] = s.word();
    }
  }
};
template <int low>
constexpr SignMatrices<low> kSigns;

template <int kTables>
inline void look_up_bytes(__m512i index, const uint8_t (*tables)[256], __m512i* out) {
  const __mmask64 upper = _mm512_movepi8_mask(index);
  for (int t = 0; t < kTables; ++t) {
    const __m512i* part = reinterpret_cast<const __m512i*>(tables[t]);
    __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    out[t] = _mm512_mask_blend_epi8(upper, low, high);
  }
}

inline __m512i shift_left(__m512i v, int bits) {
  return bits >= 0 ? _mm512_slli_epi16(v, bits) : _mm512_srli_epi16(v, -bits);
}

// 64 E8P codes: component i of all is (4 v << low) ^ flip, or the four bits 4 v >> 1 where low is -1.
template <int low, int flip>
struct E8pCodes {
  __m512i fields[2], signs, odd;
  explicit E8pCodes(const uint8_t* codes) : signs(_mm512_loadu_si512(codes + 64)) {
    look_up_bytes<2>(_mm512_loadu_si512(codes), kLattice8.fields, fields);
    odd = _mm512_gf2p8affine_epi64_epi8(_mm512_xor_si512(fields[0], fields[1]), _mm512_set1_epi64(kSigns<low>.odd), 0);
  }
  __m512i component(int i) const {
    constexpr int constant = (low < 0 ? 3 >> -low : 3 << low) ^ flip, place = low < 0 ? 12 >> -low : 12 << low;
    __m512i sign = _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(kSigns<low>.sign[i]), constant);
    if (i == 7) sign = _mm512_xor_si512(sign, odd);
    const __m512i d = shift_left(fields[i / 4], 2 + low - 2 * (i % 4));
    return _mm512_ternarylogic_epi32(d, _mm512_set1_epi8(place), sign, 0x6A);  // (d & place) ^ sign
  }
};

// 64 E81B codes: component i of all is 2 v.
struct E81bCodes {
  __m512i nibbles[4];
  explicit E81bCodes(const uint8_t* codes) { look_up_bytes<4>(_mm512_loadu_si512(codes), kLattice8.nibbles, nibbles); }
  __m512i component(int i) const {
    return _mm512_gf2p8affine_epi64_epi8(nibbles[i / 2], _mm512_set1_epi64(kLattice8.nibble[i % 2]), 0);
  }
};

// 7 * 4 v + 128 by the four bits 4 v >> 1.
struct Sevenfold {
  alignas(64) uint8_t bytes[64] = {};
  constexpr Sevenfold() {
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(kOffset8 + 7 * (2 * ((i & 15) - (i & 8 ? 16 : 0)) + 1));
  }
};
constexpr Sevenfold kSevenfold;

// The lattice at 2, 3 or 4 bits. So that both stages add up to one byte, the second is divided by 2 instead of 2.04 at
// 3 bits, and by 3.5 instead of 3.45 at 4. Then a weight is (4 v + 2 w) / 4, or (7 * 4 v + 2 * 4 w) / 28.
template <int bits>
struct Lattice8 : FormatDefaults {
  static constexpr int kColumns = kBlockColumns, kQuads = 8, kBytes = int(block_bytes(bits)), kFew = 16,
                       kOffset = kOffset8;
  explicit Lattice8(const Weight&) {}
  float unit() const { return bits == 4 ? 1 / 28.0f : 1 / 4.0f; }

  // emit(quad, bytes): see panel.h.
  template <class Emit>
  void decode(const uint8_t* block, Emit emit) const {
    if constexpr (bits == 2) {
      const E8pCodes<0, kOffset8> codes(block);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) emit(i, codes.component(i));
    } else if constexpr (bits == 3) {
      const E8pCodes<0, kOffset8> first(block);
      const E81bCodes second(block + 128);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) emit(i, _mm512_add_epi8(first.component(i), second.component(i)));
    } else {
      const E8pCodes<-1, 0> first(block);
      const E8pCodes<1, 0> second(block + 128);
      const __m512i sevenfold = _mm512_load_si512(kSevenfold.bytes);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        emit(i, _mm512_add_epi8(_mm512_shuffle_epi8(sevenfold, first.component(i)), second.component(i)));
    }
  }
  static int place(int column) { return column / 32 * 32 + column % 8 * 4 + column % 32 / 8; }
  static __m512i in_row_order(__m512i lanes) { return lanes; }
};
template <int bits>
using LatticeFew8 = Lattice8<bits>;

}  // namespace
}  // namespace quip
