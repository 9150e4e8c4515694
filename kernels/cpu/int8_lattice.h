// SPDX-License-Identifier: Apache-2.0
// Lattice codes to bytes for int8 activations: 64 codes (16 rows x 32 columns) at a time, all in registers.
//
// A block is 64 rows-of-table indices, then 64 sign bytes (kernels.h); byte 4*row + g belongs to columns 8g .. 8g+7, so
// component j of the 64 codes is one vector: 16 rows (32-bit lanes) x 4 columns {j, 8+j, 16+j, 24+j}.
//
// Each component of the table of absolute vectors is 1/2, 3/2 or 5/2: d = 0, 1, 2 in two bits, four components a byte, so
// two tables of 256 bytes hold it. In quarters, the value is 4|v| = d<<2 | 2, and both sign and shift are an exclusive or:
//
//     4 (+-|v| +- 1/4) = (d<<2 | 2) ^ 1 ^ (shift down ? 2 : 0) ^ (negative ? 0xFC : 0)
//
// The parity of the signs, the sign bit of a component and the parity fix of component 7 (odd number of 3/2) are all sums
// modulo 2 of stored bits, so GF2P8AFFINEQB, a matrix product over GF(2) in each byte, computes each in one step. d<<2
// comes from a shift: on Zen 4 it runs beside the multiplications, which the matrix product does not.
#pragma once
#include <immintrin.h>

#include "lattice.h"

namespace quip {
namespace {

constexpr float kE8pUnit = 0.25f, kE81bUnit = 0.5f;
constexpr int kOffset8 = 128;  // decoded bytes are value + 128, unsigned, as vpdpbusd wants its first operand

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
  alignas(64) uint8_t fields[2][256] = {};   // e8p: components 0..3 and 4..7, two bits each
  alignas(64) uint8_t nibbles[4][256] = {};  // e81b: two components a byte, 2 v as a 4-bit integer
  long long sign[8] = {}, odd = 0, nibble[2] = {};

  constexpr LatticeTables8() {
    for (int r = 0; r < 256; ++r)
      for (int i = 0; i < 8; ++i) {
        fields[i / 4][r] |= uint8_t(int(kLattice.absolute[i][r] - 0.5f) << (2 * (i % 4)));
        nibbles[i / 2][r] |= uint8_t((int(2 * kLattice.e81b[r][i]) & 15) << (4 * (i % 2)));
      }
    for (int i = 0; i < 8; ++i) {
      BitMatrix s;
      const int bit = LatticeTables::kSignBit[i];
      s.rows[1] = 0xFF;
      for (int b = 2; b < 8; ++b) s.rows[b] = bit == 0 ? 0xFE : uint8_t(1 << bit);  // bit 0 is flipped by the parity of all
      sign[i] = s.word();
    }
    BitMatrix o;
    for (int b = 2; b < 8; ++b) o.rows[b] = 0x55;
    odd = o.word();
    for (int half = 0; half < 2; ++half) {
      BitMatrix n;
      for (int b = 0; b < 8; ++b) n.rows[b] = uint8_t(1 << (4 * half + std::min(b, 3)));
      nibble[half] = n.word();
    }
  }
};
constexpr LatticeTables8 kLattice8;

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

// emit(quad, bytes): see int8.h.
template <class Emit>
inline void emit_e8p(const uint8_t* block, Emit emit) {
  const __m512i index = _mm512_loadu_si512(block), signs = _mm512_loadu_si512(block + 64);
  __m512i fields[2];
  look_up_bytes<2>(index, kLattice8.fields, fields);
  const __m512i odd = _mm512_gf2p8affine_epi64_epi8(_mm512_xor_si512(fields[0], fields[1]), _mm512_set1_epi64(kLattice8.odd), 0);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    __m512i sign = _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(kLattice8.sign[i]), 0x83);
    if (i == 7) sign = _mm512_xor_si512(sign, odd);
    const __m512i field = fields[i / 4];
    const __m512i d = i % 4 == 0 ? _mm512_slli_epi16(field, 2) : _mm512_srli_epi16(field, 2 * (i % 4) - 2);
    emit(i, _mm512_ternarylogic_epi32(d, _mm512_set1_epi8(12), sign, 0x6A));  // (d & 12) ^ sign
  }
}

template <class Emit>
inline void emit_e81b(const uint8_t* block, Emit emit) {
  __m512i nibbles[4];
  look_up_bytes<4>(_mm512_loadu_si512(block), kLattice8.nibbles, nibbles);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    emit(i, _mm512_gf2p8affine_epi64_epi8(nibbles[i / 2], _mm512_set1_epi64(kLattice8.nibble[i % 2]), 0x80));
}

// The lattice at 2, 3 or 4 bits. Stage 1 is summed apart from stage 0 and joined in floats.
template <int bits>
struct Lattice8 {
  static constexpr int kColumns = 32, kQuads = 8, kStages = bits == 2 ? 1 : 2;
  static constexpr int kBytes = 64 * bits, kFew = bits == 2 ? 16 : 4;
  static constexpr float kUnits[2] = {kE8pUnit, bits == 3 ? kE81bUnit / 2.04f : kE8pUnit / 3.45f};
  explicit Lattice8(const Weight&) {}
  float unit(int stage) const { return kUnits[stage]; }

  template <class Emit>
  void decode(const uint8_t* block, Emit emit) const {
    emit_e8p(block, [&](int quad, __m512i d) { emit(0, quad, d); });
    if constexpr (bits == 3) emit_e81b(block + 128, [&](int quad, __m512i d) { emit(1, quad, d); });
    if constexpr (bits == 4) emit_e8p(block + 128, [&](int quad, __m512i d) { emit(1, quad, d); });
  }
  static int place(int column) { return column / 32 * 32 + column % 8 * 4 + column % 32 / 8; }
  static __m512i in_row_order(__m512i lanes) { return lanes; }
};

}  // namespace
}  // namespace quip
