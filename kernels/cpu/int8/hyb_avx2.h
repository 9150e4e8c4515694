// SPDX-License-Identifier: Apache-2.0
// Decodes tiles of HYB for int8 activations on AVX2: two weights per state, looked up in a table of bytes.
#pragma once
#include "trellis_avx2.h"

namespace quip {
namespace {

// The order of bytes that brings the two lanes of one rrr, of `bits` words each, to pairs of equal words. The last rrr
// of a tile is read from earlier on, so that nothing beyond the tile is read.
template <int bits>
struct EqualWords {
  uint8_t bytes[2][32] = {};
  static constexpr int early(int part) { return part == 3 ? 16 - 4 * bits : 0; }
  constexpr EqualWords() {
    for (int i = 0; i < 2 * 32; ++i) {
      const int b = i % 16, word = b / 4, lane = b / 2 % 2;
      if (word < bits) bytes[i / 32][i % 32] = uint8_t(2 * word + 2 * bits * lane + b % 2 + (i >= 48 ? early(3) : 0));
    }
  }
};

// HYB's words of a tile. The 16-bit lane 2 rrr + e has the `bits` words of eight states, those of cc = 2 e and 2 e + 1.
template <int bits>
struct HybWords {
  __m256i word[bits + 1];  // the last is the first of the next lane
  [[gnu::always_inline]] explicit HybWords(const uint8_t* tile) {
    if constexpr (bits == 1) {
      word[0] = bytes_at(tile);
    } else if constexpr (bits == 2) {
      const __m256i apart =
          _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
      const __m256i first = _mm256_shuffle_epi8(bytes_at(tile), apart),
                    second = _mm256_shuffle_epi8(bytes_at(tile + 32), apart);
      word[0] = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(first, second), 0xD8);
      word[1] = _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(first, second), 0xD8);
    } else {  // rrr and rrr + 4 to dwords of equal words, which are then transposed
      static constexpr EqualWords<bits> index;
      __m256i part[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* from = tile + 4 * bits * i;
        part[i] = _mm256_castsi128_si256(load<__m128i>(from));
        part[i] = _mm256_inserti128_si256(part[i], load<__m128i>(from + 16 * bits - index.early(i)), 1);
        part[i] = _mm256_shuffle_epi8(part[i], bytes_at(index.bytes[index.early(i) != 0]));
      }
      transpose(part, word);
    }
    word[bits] = _mm256_alignr_epi8(_mm256_permute2x128_si256(word[0], word[0], 1), word[0], 2);
  }
  [[gnu::always_inline]] __m256i window(int offset) const {
    const int j = offset / 16, shift = offset % 16;
    if (shift == 0) return word[j];
    if (shift == 8) {
      const __m128i swap = _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
      return _mm256_shuffle_epi8(select(word[j], word[j + 1], upper_bytes()), _mm256_broadcastsi128_si256(swap));
    }
    return _mm256_or_si256(_mm256_slli_epi16(word[j], shift), _mm256_srli_epi16(word[j + 1], 16 - shift));
  }
};

// Bytes as magnitudes and signs. A sign is negative where the byte is, and zero only where the byte is.
struct Signed8 {
  __m256i magnitude, sign;
  [[gnu::always_inline]] __m256i value() const { return _mm256_sign_epi8(magnitude, sign); }
  [[gnu::always_inline]] __m256i times(int32_t quad) const {
    return _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(_mm256_set1_epi32(quad), sign));
  }
};
// Two quads. Four products of small bytes fit 16 bits.
template <bool small>
struct TwoQuads {
  Signed8 quad[2];
};
template <bool small>
[[gnu::always_inline]] inline __m256i multiply_add(__m256i sum, const TwoQuads<small>& weights, const int32_t* x,
                                                   int64_t step) {
  const __m256i first = weights.quad[0].times(x[0]), second = weights.quad[1].times(x[step]),
                ones = _mm256_set1_epi16(1);
  if constexpr (small) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(first, second), ones));
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones)));
}

// A table that is a grid (trellis_avx512.h).
struct HybGrid {
  static constexpr int kFew = 4, kUnits = 2;  // magnitudes of up to 126 are even: 63 are left
  static constexpr bool kSmall = true;
  __m256i points[2], lines;
  explicit HybGrid(const uint8_t* table8) {
    uint8_t numbers[3][16];
    for (int i = 0; i < 16; ++i) {
      const uint8_t of[3] = {table8[i], table8[128 + i], table8[512 + 16 * i]};
      for (int j = 0; j < 3; ++j) numbers[j][i] = uint8_t((of[j] - 128) / 2);
    }
    points[0] = both(numbers[0]), points[1] = both(numbers[1]), lines = both(numbers[2]);
  }
  static __m256i both(const uint8_t* p) { return _mm256_broadcastsi128_si256(load<__m128i>(p)); }
  [[gnu::always_inline]] void look_up(__m256i bits13_6, __m256i bits15_8, Signed8* value) const {
    const __m256i other = _mm256_xor_si256(bits13_6, splat8(-128));  // with bit 13 set a look-up gives 0
    value[0].magnitude =
        _mm256_or_si256(_mm256_shuffle_epi8(points[0], bits13_6), _mm256_shuffle_epi8(points[1], other));
    value[1].magnitude = _mm256_shuffle_epi8(lines, high_nibbles(bits13_6));
    value[0].sign = _mm256_or_si256(bits15_8, splat8(1));
    value[1].sign = _mm256_add_epi8(value[0].sign, value[0].sign);  // bit 14, and not 0
  }
};

// Any table. A look-up in 128 bytes is 8 look-ups in 16, of which those that index - 16 p has passed give 0. So each
// eighth holds its difference, by exclusive or, from the one before.
struct HybTable {
  static constexpr int kFew = 1, kUnits = 1;
  static constexpr bool kSmall = false;
  alignas(32) uint8_t eighth[8][8][32];  // [p][component and 128 rows]
  explicit HybTable(const uint8_t* table8) {
    for (int p = 0; p < 8; ++p)
      for (int i = 0; i < 8; ++i)
        for (int b = 0; b < 32; ++b) {
          const uint8_t* row = table8 + 128 * i + 16 * p + b % 16;
          eighth[p][i][b] = p ? row[0] ^ row[-16] : row[0] ^ 128;
        }
  }
  [[gnu::always_inline]] void look_up(__m256i bits13_6, __m256i bits15_8, Signed8* value) const {
    __m256i index = _mm256_and_si256(bits13_6, splat8(127)), found[8] = {};
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        found[i] = _mm256_xor_si256(found[i], _mm256_shuffle_epi8(bytes_at(eighth[p][i]), index));
      index = _mm256_sub_epi8(index, splat8(16));
    }
    const __m256i bit14 = _mm256_add_epi8(bits15_8, bits15_8);
    for (int c = 0; c < 2; ++c) {
      const __m256i* quarter = found + 4 * c;
      const __m256i v =
          select(select(quarter[0], quarter[1], bits13_6), select(quarter[2], quarter[3], bits13_6), bit14);
      value[c].sign = c ? v : _mm256_sign_epi8(v, _mm256_or_si256(bits15_8, splat8(1)));
      value[c].magnitude = _mm256_abs_epi8(v);
    }
  }
};

// HYB, as in trellis_avx512.h, both halves at once.
template <int bits, class Table>
struct HybBytes : FormatDefaults, Table {
  static constexpr int kColumns = 16, kBytes = 32 * bits;
  static constexpr bool kWhole = true;
  float unit_;
  explicit HybBytes(const Weight& w) : Table(w.table8), unit_(w.unit * Table::kUnits) {}
  float unit() const { return unit_; }
  // emit(R, 2 cc, values) for the lower bit of cc: two quads, c = 0 and 1, of bytes (rrr, upper bit of cc, C).
  template <class Emit>
  [[gnu::always_inline]] void values(const uint8_t* tile, Emit emit) const {
    const HybWords<bits> words(tile);
    const auto hash = [&](int state) __attribute__((always_inline)) {
      const __m256i x = words.window(2 * bits * state);
      return _mm256_mullo_epi16(x, _mm256_add_epi16(x, _mm256_set1_epi16(1)));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int cc = i / 2, R = i % 2;
      const __m256i even = hash(4 * cc + R), odd = hash(4 * cc + 2 + R);  // C = 0 and 1
      TwoQuads<Table::kSmall> values;
      this->look_up(select(_mm256_srli_epi16(even, 6), _mm256_slli_epi16(odd, 2), upper_bytes()),
                    select(_mm256_srli_epi16(even, 8), odd, upper_bytes()), values.quad);
      emit(R, 2 * cc, values);
    }
  }
  static int place8(int column) { return column / 16 * 16 + column % 4 * 4 + column % 8 / 4 * 2 + column % 16 / 8; }
};

// For few rows: the activation takes the sign of the weight.
template <int bits, class Table>
struct Hyb8 : HybBytes<bits, Table> {
  static constexpr int kQuads = 4, kFew = Table::kFew;
  static constexpr bool kOnlyFew = true;
  using HybBytes<bits, Table>::HybBytes;
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->values(tile, emit);
  }
  static int place(int column) { return HybBytes<bits, Table>::place8(column); }
};

// For many rows: int16.
template <int bits, class Table>
struct HybMany : HybBytes<bits, Table> {
  static constexpr int kQuads = 8, kFew = 0;
  using HybBytes<bits, Table>::HybBytes;
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->values(tile, [&](int R, int quad, const auto& values) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m256i value = values.quad[c].value();
        emit(R, 2 * (quad + c), even_bytes(value));
        emit(R, 2 * (quad + c) + 1, odd_bytes(value));
      }
    });
  }
  static int place(int column) { return wide_place(HybBytes<bits, Table>::place8(column)); }
};

}  // namespace
}  // namespace quip
