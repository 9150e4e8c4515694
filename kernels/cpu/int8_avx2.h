// SPDX-License-Identifier: Apache-2.0
// Lattice and trellis codes to small integers on AVX2, a half (8 rows) of a unit of 16 rows at a time; lane = row.
//
// AVX2 looks bytes up in 16 entries at a time (vpshufb); a table of 256 is 16 of these and a tree of selections by the upper
// four bits of the index, which costs a lattice code, eight weights, little. Values and the order of columns in a quad are
// those of int8_lattice.h and int8_trellis.h, save that bytes have a smaller offset and what does not fit is int16.
#pragma once
#include <immintrin.h>

#include "decode_trellis.h"
#include "kernels.h"
#include "lanes_avx2.h"
#include "lattice.h"
#include "vector.h"

namespace quip {
namespace {

[[gnu::always_inline]] inline __m256i splat8(int v) { return _mm256_set1_epi8(char(v)); }
[[gnu::always_inline]] inline __m256i select(__m256i low, __m256i high, __m256i top_bit) { return _mm256_blendv_epi8(low, high, top_bit); }

// Bits 0..3 of an index, and bits 4..7 each in the uppermost place of a byte.
struct ByteIndex {
  __m256i low, bit[4];
  [[gnu::always_inline]] explicit ByteIndex(__m256i index) : low(_mm256_and_si256(index, splat8(15))) {
    for (int b = 0; b < 4; ++b) bit[b] = _mm256_slli_epi16(index, 3 - b);
  }
};

// table[index & (16 * kParts - 1)]; each 16 entries lie there twice.
template <int kParts>
[[gnu::always_inline]] inline __m256i look_up(const uint8_t (*table)[32], const ByteIndex& index, int bit = kParts == 16 ? 3 : 2) {
  if constexpr (kParts == 1) {
    return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table[0])), index.low);
  } else {
    const __m256i low = look_up<kParts / 2>(table, index, bit - 1);
    return select(low, look_up<kParts / 2>(table + kParts / 2, index, bit - 1), index.bit[bit]);
  }
}

// Bytes of a quad as int16: columns 0 and 2, then 1 and 3.
[[gnu::always_inline]] inline __m256i even_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
[[gnu::always_inline]] inline __m256i odd_bytes(__m256i v) { return _mm256_srai_epi16(v, 8); }
// Where a column goes that lies in byte `place` of the quads.
inline int wide_place(int place) { return place / 4 * 4 + place % 2 * 2 + place % 4 / 2; }

// ---- The lattice ----

struct LatticeTables8 {
  alignas(32) uint8_t fields[2][16][32] = {};   // e8p: |v| - 1/2 of components 0..3 and 4..7, two bits each
  alignas(32) uint8_t nibbles[4][16][32] = {};  // e81b: two components a byte, 2 v as a 4-bit integer
  alignas(32) uint8_t parity[32] = {};          // of four bits
  alignas(32) uint8_t integers[32] = {};        // 2 v by its 4 bits
  alignas(32) uint8_t sevenfold[32] = {};       // 7 * 4 v by (4 v + kOffset8) / 2

  constexpr LatticeTables8() {
    for (int r = 0; r < 256; ++r)
      for (int i = 0; i < 8; ++i)
        for (int copy = 0; copy < 32; copy += 16) {
          const int at = r % 16 + copy;
          fields[i / 4][r / 16][at] |= field_of(r, i);
          nibbles[i / 2][r / 16][at] |= nibble_of(r, i);
        }
    for (int i = 0; i < 32; ++i) {
      const int n = i % 16;
      parity[i] = (n ^ n >> 1 ^ n >> 2 ^ n >> 3) & 1;
      integers[i] = uint8_t(n < 8 ? n : n - 16);
      sevenfold[i] = uint8_t(7 * (2 * n + 1 - kOffset8));
    }
  }
};
constexpr LatticeTables8 kLattice8;

[[gnu::always_inline]] inline __m256i table16(const uint8_t* table, __m256i index) {
  return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)), index);
}

// 32 E8P codes: component i of all is 4 v + offset.
struct E8pCodes {
  __m256i fields[2], signs, odd, shift;
  [[gnu::always_inline]] E8pCodes(const uint8_t* codes, int offset) : signs(load<__m256i>(codes + 64)) {
    const ByteIndex index(load<__m256i>(codes));
    for (int half = 0; half < 2; ++half) fields[half] = look_up<16>(kLattice8.fields[half], index);
    const __m256i folded = _mm256_xor_si256(signs, _mm256_srli_epi16(signs, 4));
    const __m256i parity = table16(kLattice8.parity, _mm256_and_si256(folded, splat8(15)));
    signs = _mm256_xor_si256(signs, parity);
    shift = _mm256_sub_epi8(splat8(offset + 1), _mm256_add_epi8(parity, parity));
    // The number of components of 3/2 is that of fields whose low bit is set: parity of bits 0, 2, 4, 6 of both.
    __m256i thirds = _mm256_xor_si256(fields[0], fields[1]);
    thirds = _mm256_and_si256(_mm256_xor_si256(thirds, _mm256_srli_epi16(thirds, 4)), splat8(5));
    odd = _mm256_slli_epi16(table16(kLattice8.parity, thirds), 7);
  }
  [[gnu::always_inline]] __m256i component(int i) const {
    const int place = 2 - 2 * (i % 4);
    const __m256i field = place >= 0 ? _mm256_slli_epi16(fields[i / 4], place) : _mm256_srli_epi16(fields[i / 4], -place);
    const __m256i magnitude = _mm256_or_si256(_mm256_and_si256(field, splat8(12)), splat8(2));
    __m256i negative = _mm256_slli_epi16(signs, 7 - LatticeTables::kSignBit[i]);
    if (i == 7) negative = _mm256_xor_si256(negative, odd);
    return _mm256_add_epi8(_mm256_sign_epi8(magnitude, _mm256_or_si256(negative, splat8(1))), shift);
  }
};

// 32 E81B codes: component i of all is 2 v.
struct E81bCodes {
  __m256i nibbles[4];
  [[gnu::always_inline]] explicit E81bCodes(const uint8_t* codes) {
    const ByteIndex index(load<__m256i>(codes));
    for (int t = 0; t < 4; ++t) nibbles[t] = look_up<16>(kLattice8.nibbles[t], index);
  }
  [[gnu::always_inline]] __m256i component(int i) const {
    const __m256i nibble = i % 2 ? _mm256_srli_epi16(nibbles[i / 2], 4) : nibbles[i / 2];
    return table16(kLattice8.integers, _mm256_and_si256(nibble, splat8(15)));
  }
};

// As in int8_lattice.h: 4 v at 2 bits, 4 v + 2 w at 3, and at 4 bits 7 * 4 v + 2 * 4 w, which is int16.
template <int bits>
struct Lattice8 {
  static constexpr int kColumns = 32, kQuads = bits == 4 ? 16 : 8, kBytes = 64 * bits, kFew = 4;
  explicit Lattice8(const Weight&) {}
  float unit() const { return bits == 4 ? 1 / 28.0f : 1 / 4.0f; }

  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* block, Emit emit) const {
    const E8pCodes first(block + 32 * half, kOffset8);
    if constexpr (bits == 2) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) emit(i, first.component(i));
    } else if constexpr (bits == 3) {
      const E81bCodes second(block + 128 + 32 * half);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) emit(i, _mm256_add_epi8(first.component(i), second.component(i)));
    } else {
      const E8pCodes second(block + 128 + 32 * half, 0);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m256i index = _mm256_and_si256(_mm256_srli_epi16(first.component(i), 1), splat8(15)), w = second.component(i);
        const __m256i v = _mm256_add_epi8(table16(kLattice8.sevenfold, index), _mm256_add_epi8(w, w));
        emit(2 * i, even_bytes(v));
        emit(2 * i + 1, odd_bytes(v));
      }
    }
  }
  static int place(int column) {
    return bits == 4 ? wide_place(quad_byte(column)) : quad_byte(column);
  }
};

// ---- Trellis codes ----

// Lane rrr = the run of 32 positions of rows rrr and rrr + 8: half(j) = its bits 16 j .. 16 j + 31, wrapping into the next.
template <int bits>
struct Runs {
  __m256i word[bits + 1];  // bits 32 j .. 32 j + 31
  [[gnu::always_inline]] explicit Runs(const uint8_t* tile) {
    const __m256i swap = _mm256_set1_epi32(0x01000302);  // stream order puts the second 16 bits of 32 lowest
    __m256i part[bits];
    for (int s = 0; s < bits; ++s) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile) + s);
      part[s] = _mm256_shuffle_epi8(words, _mm256_add_epi8(swap, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                               0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12))));
    }
    for (int j = 0; j < bits; ++j) {  // word bits * rrr + j, from whichever part holds it
      const Ints at = lanes<Ints>([&](int lane) { return bits * (lane % 8) + j; });
      const __m256i index = load<__m256i>(&at);
      word[j] = _mm256_permutevar8x32_epi32(part[0], index);
      for (int s = 1; s < bits; ++s) {
        const Ints inside = lanes<Ints>([&](int lane) { return (bits * (lane % 8) + j) / 8 == s ? -1 : 0; });
        word[j] = _mm256_blendv_epi8(word[j], _mm256_permutevar8x32_epi32(part[s], index), load<__m256i>(&inside));
      }
    }
    word[bits] = _mm256_permutevar8x32_epi32(word[0], _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
  }
  [[gnu::always_inline]] __m256i half(int j) const {
    if (j % 2 == 0) return word[j / 2];
    return _mm256_or_si256(_mm256_slli_epi32(word[j / 2], 16), _mm256_srli_epi32(word[j / 2 + 1], 16));
  }
  // The 16 bits from `offset` at the top or the bottom of each lane, beside others.
  [[gnu::always_inline]] __m256i at_top(int offset) const {
    return _mm256_slli_epi32(half(offset / 16), offset % 16);
  }
  [[gnu::always_inline]] __m256i at_bottom(int offset) const {
    return _mm256_srli_epi32(half(offset / 16), 16 - offset % 16);
  }
};

// Codes of one weight a state.
template <int bits>
struct Windows {
  static constexpr int kColumns = 16, kBytes = 32 * bits;
  // emit(cc, C, c, states): of column 8C + 2cc + c.
  template <int half, class Emit>
  [[gnu::always_inline]] void states(const uint8_t* tile, Emit emit) const {
    const Runs<bits> runs(tile);
#pragma GCC unroll 4
    for (int cc = 0; cc < 4; ++cc)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int offset = bits * (8 * cc + 4 * (i >> 1) + 2 * half + (i & 1));
        emit(cc, i >> 1, i & 1, _mm256_srli_epi32(runs.at_top(offset), 16));
      }
  }
};

[[gnu::always_inline]] inline __m256i congruence(__m256i state, uint32_t factor, uint32_t term) {
  return _mm256_add_epi32(_mm256_mullo_epi32(state, _mm256_set1_epi32(int(factor))), _mm256_set1_epi32(int(term)));
}
// The low halves of `even` and those of `odd`, side by side.
[[gnu::always_inline]] inline __m256i pair(__m256i even, __m256i odd) {
  return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
}

template <int bits>
struct OneMadSums : Windows<bits> {
  static constexpr int kOffset = kOneMadMean;
  float unit() const { return kOneMadUnit; }
  // Two int16 whose sum is that of the product's bytes.
  [[gnu::always_inline]] static __m256i sums(__m256i state) {
    return _mm256_maddubs_epi16(congruence(state, kOneMadFactor, kOneMadTerm), splat8(1));
  }
};

// For few rows: vpmaddwd with the activation twice multiplies and sums.
template <int bits>
struct OneMad8 : OneMadSums<bits> {
  static constexpr int kQuads = 16, kRepeat = 2, kFew = 4;
  explicit OneMad8(const Weight&) {}
  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->template states<half>(tile, [&](int cc, int C, int c, __m256i state) { emit(8 * C + 2 * cc + c, this->sums(state)); });
  }
};

// For many rows: two columns of int16 a lane.
template <int bits>
struct OneMad16 : OneMadSums<bits> {
  static constexpr int kQuads = 8, kFew = 0;
  explicit OneMad16(const Weight&) {}
  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    __m256i even = _mm256_setzero_si256();
    this->template states<half>(tile, [&](int cc, int C, int c, __m256i state) {
      const __m256i sums = this->sums(state);
      if (c == 0) {
        even = sums;
        return;
      }
      const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), sums, 0xAA);
      emit(4 * C + cc, _mm256_add_epi16(pair(even, sums), upper));
    });
  }
  static int place(int column) { return column; }
};

// 3INST and LUT: two columns of int16 a lane, as value() gives them in the low half of each lane.
template <int bits, class Value>
struct Wide : Windows<bits>, Value {
  static constexpr int kQuads = 8, kFew = 4;
  explicit Wide(const Weight& w) : Value(w) {}
  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    __m256i even = _mm256_setzero_si256();
    this->template states<half>(tile, [&](int cc, int C, int c, __m256i state) {
      const __m256i value = this->value(state);
      if (c == 0)
        even = value;
      else
        emit(4 * C + cc, pair(even, value));
    });
  }
  static int place(int column) { return column; }
};

// The sum of both halves, which three_inst() of decode_trellis.h rounds to half precision, in units of 2^-8.
struct ThreeInstValue {
  explicit ThreeInstValue(const Weight&) {}
  float unit() const { return kThreeInstUnit; }
  [[gnu::always_inline]] static __m256 widened(__m256i half_on_top) {
    const __m256i kept = _mm256_and_si256(_mm256_srai_epi32(half_on_top, 3), _mm256_set1_epi32(kThreeInstKept));
    return _mm256_castsi256_ps(_mm256_xor_si256(kept, _mm256_set1_epi32(kThreeInstFlipped)));
  }
  [[gnu::always_inline]] __m256i value(__m256i state) const {
    const __m256i y = congruence(state, kThreeInstFactor, kThreeInstTerm);
    return _mm256_cvtps_epi32(_mm256_add_ps(widened(y), widened(_mm256_slli_epi32(y, 16))));
  }
};

struct LutValue {
  const int16_t* table;
  float unit_;
  explicit LutValue(const Weight& w) : table(w.lut16), unit_(w.lut_unit) {}
  float unit() const { return unit_; }
  [[gnu::always_inline]] __m256i value(__m256i state) const {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), state, 2);
  }
};

template <int bits>
using ThreeInst16 = Wide<bits, ThreeInstValue>;
template <int bits>
using Lut16 = Wide<bits, LutValue>;

// HYB, as in int8_trellis.h; int16.
template <int bits, bool symmetric>
struct Hyb8 {
  static constexpr int kColumns = 16, kQuads = 8, kBytes = 32 * bits, kFew = 4, kRows = symmetric ? 128 : 512;
  alignas(32) uint8_t table[2][kRows / 16][32];  // [component]
  float unit_;

  explicit Hyb8(const Weight& w) : unit_(w.lut_unit) {
    for (int c = 0; c < 2; ++c)
      for (int row = 0; row < kRows; ++row)
        for (int copy = 0; copy < 32; copy += 16) table[c][row / 16][row % 16 + copy] = w.lut8[512 * c + row] ^ 128;
  }
  float unit() const { return unit_; }

  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    const Runs<bits> runs(tile);
    // 16-bit lanes: rrr, C.
    const auto hash = [&](int cc) __attribute__((always_inline)) {
      const int offset = 2 * bits * (4 * cc + half);
      const __m256i x = _mm256_blend_epi16(runs.at_bottom(offset), runs.at_top(offset + 4 * bits), 0xAA);
      return _mm256_mullo_epi16(x, _mm256_add_epi16(x, _mm256_set1_epi16(1)));
    };
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {  // a byte = a state, of columns 8C + 2cc and the next, cc = 2 pair + odd byte
      const __m256i even = hash(2 * pair), odd = hash(2 * pair + 1), odd_places = _mm256_set1_epi16(short(0xFF00));
      const __m256i bits13_6 = select(_mm256_srli_epi16(even, 6), _mm256_slli_epi16(odd, 2), odd_places);
      const __m256i bits15_8 = select(_mm256_srli_epi16(even, 8), odd, odd_places);
      const ByteIndex index(bits13_6);
      const __m256i bit14 = _mm256_slli_epi16(bits15_8, 1);
      __m256i value[2];
      if constexpr (symmetric) {
        const __m256i x = look_up<8>(table[0], index), y = look_up<8>(table[1], index);
        value[0] = select(x, y, bits13_6);
        value[1] = _mm256_sign_epi8(select(y, x, bits13_6), _mm256_or_si256(bit14, splat8(1)));
      } else {
        for (int c = 0; c < 2; ++c) value[c] = select(look_up<16>(table[c], index), look_up<16>(table[c] + 16, index), bit14);
      }
      value[0] = _mm256_sign_epi8(value[0], _mm256_or_si256(bits15_8, splat8(1)));
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        emit(4 * pair + 2 * c, even_bytes(value[c]));
        emit(4 * pair + 2 * c + 1, odd_bytes(value[c]));
      }
    }
  }
  static int place(int column) {
    const int cc = column % 8 / 2, byte = column / 16 * 16 + 4 * (cc / 2 * 2 + column % 2) + column % 16 / 8 * 2 + cc % 2;
    return wide_place(byte);
  }
};

}  // namespace
}  // namespace quip
