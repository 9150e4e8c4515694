// SPDX-License-Identifier: Apache-2.0
// Trellis codes to small integers on AVX2, a half (8 rows) of a tile of 16 rows at a time; lane = row.
//
// AVX2 looks bytes up in 16 entries at a time (vpshufb); a table of 128 is 8 of these and a tree of selections by the upper bits
// of the index. Values are those of int8_trellis.h, save that what does not fit a small byte is int16.
#pragma once
#include <immintrin.h>

#include "bytes_avx2.h"
#include "decode_trellis.h"
#include "kernels.h"
#include "lanes_avx2.h"
#include "vector.h"

namespace quip {
namespace {

[[gnu::always_inline]] inline __m256i select(__m256i low, __m256i high, __m256i top_bit) {
  return _mm256_blendv_epi8(low, high, top_bit);
}

// Bits 0..3 of an index, and bits 4..7 each in the uppermost place of a byte.
struct ByteIndex {
  __m256i low, bit[4];
  [[gnu::always_inline]] explicit ByteIndex(__m256i index) : low(low_nibbles(index)) {
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
  static constexpr int kQuads = 16, kRepeat = 2, kFew = 2;
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
