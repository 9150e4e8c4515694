// SPDX-License-Identifier: Apache-2.0
// Decodes trellis tiles for int8 activations on AVX2, a half of a tile (8 rows, the lanes) at a time.
//
// The numbers are those of trellis_avx512.h, but what does not fit a small byte is int16, or a magnitude and a sign.
#pragma once
#include <immintrin.h>

#include "../bytes_avx2.h"
#include "../float/decode_trellis.h"
#include "lanes_avx2.h"

namespace quip {
namespace {

[[gnu::always_inline]] inline __m256i select(__m256i low, __m256i high, __m256i top_bit) {
  return _mm256_blendv_epi8(low, high, top_bit);
}

[[gnu::always_inline]] inline __m256i upper_bytes() { return _mm256_set1_epi16(short(0xFF00)); }

// Bytes of a quad as int16: of columns 0 and 2, and of 1 and 3.
[[gnu::always_inline]] inline __m256i even_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
[[gnu::always_inline]] inline __m256i odd_bytes(__m256i v) { return _mm256_srai_epi16(v, 8); }
// Where a column goes then that lies in byte `place` of the quads.
inline int wide_place(int place) { return place / 4 * 4 + place % 2 * 2 + place % 4 / 2; }

// Dword i of each of four vectors to vector i, in each half.
[[gnu::always_inline]] inline void transpose(const __m256i* from, __m256i* to) {
  const __m256i lower[2] = {_mm256_unpacklo_epi32(from[0], from[1]), _mm256_unpacklo_epi32(from[2], from[3])};
  const __m256i upper[2] = {_mm256_unpackhi_epi32(from[0], from[1]), _mm256_unpackhi_epi32(from[2], from[3])};
  to[0] = _mm256_unpacklo_epi64(lower[0], lower[1]);
  to[1] = _mm256_unpackhi_epi64(lower[0], lower[1]);
  to[2] = _mm256_unpacklo_epi64(upper[0], upper[1]);
  to[3] = _mm256_unpackhi_epi64(upper[0], upper[1]);
}

// Lane rrr is the run of 32 positions of rows rrr and rrr + 8. half(j) is its bits 16 j .. 16 j + 31, which go on in
// the next run.
template <int bits>
struct Runs {
  __m256i word[bits + 1];  // bits 32 j .. 32 j + 31
  [[gnu::always_inline]] explicit Runs(const uint8_t* tile) {
    const __m256i swap =
        _mm256_add_epi8(_mm256_set1_epi32(0x01000302),  // stream order puts the second 16 bits lowest
                        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)));
    if constexpr (bits >= 4) {
      four_words(tile, bits - 4, swap);
      if constexpr (bits > 4) four_words(tile, 0, swap);
    } else {
      from_parts(tile, swap);
    }
    word[bits] = _mm256_permutevar8x32_epi32(word[0], _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
  }
  // Words j .. j + 3.
  [[gnu::always_inline]] void four_words(const uint8_t* tile, int j, __m256i swap) {
    __m256i lane[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = tile + 4 * (bits * i + j);
      lane[i] =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(from)), load<__m128i>(from + 16 * bits), 1);
      lane[i] = _mm256_shuffle_epi8(lane[i], swap);
    }
    transpose(lane, word + j);
  }
  [[gnu::always_inline]] void from_parts(const uint8_t* tile, __m256i swap) {
    __m256i part[bits];
    for (int s = 0; s < bits; ++s) part[s] = _mm256_shuffle_epi8(bytes_at(tile + 32 * s), swap);
    for (int j = 0; j < bits; ++j) {  // word bits * rrr + j, from whichever part holds it
      const Ints at = lanes<Ints>([&](int lane) { return bits * (lane % 8) + j; });
      const __m256i index = load<__m256i>(&at);
      word[j] = _mm256_permutevar8x32_epi32(part[0], index);
      for (int s = 1; s < bits; ++s) {
        const Ints inside = lanes<Ints>([&](int lane) { return (bits * (lane % 8) + j) / 8 == s ? -1 : 0; });
        word[j] = _mm256_blendv_epi8(word[j], _mm256_permutevar8x32_epi32(part[s], index), load<__m256i>(&inside));
      }
    }
  }
  [[gnu::always_inline]] __m256i half(int j) const {
    if (j % 2 == 0) return word[j / 2];
    return _mm256_or_si256(_mm256_slli_epi32(word[j / 2], 16), _mm256_srli_epi32(word[j / 2 + 1], 16));
  }
  // The 16 bits from `offset` at the top or the bottom of each lane, beside others.
  [[gnu::always_inline]] __m256i at_top(int offset) const { return _mm256_slli_epi32(half(offset / 16), offset % 16); }
  [[gnu::always_inline]] __m256i at_bottom(int offset) const {
    return _mm256_srli_epi32(half(offset / 16), 16 - offset % 16);
  }
};

// Codes whose states are looked at one by one. In a swapped tile C and R change places. In a tile by rows a run is rows
// 2 rrr and 2 rrr + 1, and the places of a column are taken by others.
template <int bits, TileOrder order, bool half_rate = false>
struct Windows : FormatDefaults {
  static constexpr bool kByRows = order == TileOrder::kByRows;
  static constexpr int kColumns = 16, kBytes = 32 * bits, kRowStep = kByRows ? 2 : 1;
  static int64_t first_row(int64_t row) { return kByRows ? row / kTile * kTile + row % kTile / 8 : row; }
  static constexpr int column(int cc, int C) { return kByRows ? 4 * cc + 2 * C : 8 * C + 2 * cc; }
  // emit(cc, C, c, states): of column(cc, C) + c.
  template <int half, class Emit>
  [[gnu::always_inline]] void states(const uint8_t* tile, Emit emit) const {
    const Runs<bits> runs(tile);
#pragma GCC unroll 4
    for (int cc = 0; cc < 4; ++cc)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const bool swapped = order == TileOrder::kSwapped;
        const int C = swapped ? half : i >> 1, R = swapped ? i >> 1 : half;
        const int position = kByRows ? 16 * half + 4 * cc + i : 8 * cc + 4 * C + 2 * R + (i & 1);
        const int offset = bits_of(position, bits, half_rate);
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

// 1MAD and MUL1: a word whose bytes are summed, and what the sum stands for.
struct OneMadBytes {
  static constexpr bool kHalfRate = false;
  static constexpr int kMean = kOneMadMean;
  static constexpr float kUnit = kOneMadUnit, kRest = 0;
  [[gnu::always_inline]] static __m256i word(__m256i state) { return congruence(state, kOneMadFactor, kOneMadTerm); }
};
struct Mul1Bytes {
  static constexpr bool kHalfRate = false;
  static constexpr int kMean = kMul1Mean;
  static constexpr float kUnit = kMul1Unit, kRest = kMul1Rest;
  [[gnu::always_inline]] static __m256i word(__m256i state) { return congruence(state, kMul1Factor, 0); }
};

struct Mul1HalfBytes : Mul1Bytes {
  static constexpr bool kHalfRate = true;
};

template <int bits, TileOrder order, class Bytes>
struct ByteSums : Windows<bits, order, Bytes::kHalfRate> {
  static constexpr int kOffset = Bytes::kMean;
  static constexpr float kRest = Bytes::kRest;
  float unit() const { return Bytes::kUnit; }
  // Two int16 whose sum is that of the word's bytes.
  [[gnu::always_inline]] static __m256i sums(__m256i state) {
    return _mm256_maddubs_epi16(Bytes::word(state), splat8(1));
  }
};

// For few rows. The activation is there twice, so vpmaddwd multiplies and sums.
template <int bits, TileOrder order, class Bytes>
struct Bytes8 : ByteSums<bits, order, Bytes> {
  static constexpr int kQuads = 16, kRepeat = 2, kFew = few_at(bits, 2);
  static constexpr bool kOnlyFew = true;
  explicit Bytes8(const Weight&) {}
  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->template states<half>(
        tile, [&](int cc, int C, int c, __m256i state) { emit(this->column(cc, C) + c, this->sums(state)); });
  }
};

// For many rows: two columns of int16 per lane.
template <int bits, TileOrder order, class Bytes>
struct Bytes16 : ByteSums<bits, order, Bytes> {
  static constexpr int kQuads = 8, kFew = 0;
  explicit Bytes16(const Weight&) {}
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
      emit(this->column(cc, C) / 2, _mm256_add_epi16(pair(even, sums), upper));
    });
  }
  static int place(int column) { return column; }
};

// 3INST, MCG and LUT: two columns of int16 per lane. Value gives them in the low half of each lane.
template <int bits, TileOrder order, class Value>
struct Wide : Windows<bits, order>, Value {
  static constexpr int kQuads = 8, kFew = few_at(bits, 4);
  explicit Wide(const Weight& w) : Value(w) {}
  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    __m256i even = _mm256_setzero_si256();
    this->template states<half>(tile, [&](int cc, int C, int c, __m256i state) {
      const __m256i value = this->value(state);
      if (c == 0)
        even = value;
      else
        emit(this->column(cc, C) / 2, pair(even, value));
    });
  }
  static int place(int column) { return column; }
};

// The sum of both halves, which two_halves() of decode_trellis.h rounds to half precision, in units of 2^-8.
template <uint32_t factor, uint32_t term>
struct HalvesValue {
  explicit HalvesValue(const Weight&) {}
  float unit() const { return kThreeInstUnit; }
  [[gnu::always_inline]] static __m256 widened(__m256i half_on_top) {
    const __m256i kept = _mm256_and_si256(_mm256_srai_epi32(half_on_top, 3), _mm256_set1_epi32(kThreeInstKept));
    return _mm256_castsi256_ps(_mm256_xor_si256(kept, _mm256_set1_epi32(kThreeInstFlipped)));
  }
  [[gnu::always_inline]] __m256i value(__m256i state) const {
    const __m256i y = congruence(state, factor, term);
    return _mm256_cvtps_epi32(_mm256_add_ps(widened(y), widened(_mm256_slli_epi32(y, 16))));
  }
};

struct LutValue {
  const int16_t* table;
  float unit_;
  explicit LutValue(const Weight& w) : table(w.table16), unit_(w.unit) {}
  float unit() const { return unit_; }
  [[gnu::always_inline]] __m256i value(__m256i state) const {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), state, 2);
  }
};

template <int bits, TileOrder order, uint32_t factor, uint32_t term>
using Halves16 = Wide<bits, order, HalvesValue<factor, term>>;
template <int bits, TileOrder order>
using Lut16 = Wide<bits, order, LutValue>;

// PAIRS: the table has both columns of a lane, for the states of even positions.
template <int bits, TileOrder order>
struct Pairs16 : Windows<bits, order>, LutValue {
  static constexpr int kQuads = 8, kFew = 4;
  explicit Pairs16(const Weight& w) : LutValue(w) {}
  template <int half, class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->template states<half>(tile, [&](int cc, int C, int c, __m256i state) {
      if (c == 0) emit(this->column(cc, C) / 2, _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), state, 4));
    });
  }
  static int place(int column) { return column; }
};

// QuIP's grid: the two numbers of C = 0 and of C = 1 are the ends of windows, side by side in a lane.
template <int bits>
struct GridBytes : GridFormat<bits> {
  static constexpr int kFew = 4;
  static constexpr bool kWhole = true;
  explicit GridBytes(const Weight&) {}
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {  // emit(R, cc, numbers)
    const Runs<bits> runs(tile);
    const __m256i last = _mm256_set1_epi16((1 << bits) - 1), upper = _mm256_slli_epi16(last, 8);
#pragma GCC unroll 4
    for (int cc = 0; cc < 4; ++cc)
#pragma GCC unroll 2
      for (int R = 0; R < 2; ++R) {
        const int offset = bits * (8 * cc + 2 * R + 1);  // of c = 1
        const __m256i ends = _mm256_blend_epi16(runs.at_bottom(offset), runs.at_top(offset + 4 * bits), 0xAA);
        emit(R, cc,
             _mm256_or_si256(_mm256_and_si256(ends, last), _mm256_and_si256(_mm256_slli_epi16(ends, 8 - bits), upper)));
      }
  }
};

// More than 5 bits make no small bytes: numbers are int16.
template <int bits>
struct GridWide : GridBytes<bits> {
  static constexpr int kQuads = 8;
  using GridBytes<bits>::GridBytes;
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    GridBytes<bits>::decode(tile, [&](int R, int cc, __m256i numbers) __attribute__((always_inline)) {
      emit(R, 2 * cc, _mm256_andnot_si256(upper_bytes(), numbers));
      emit(R, 2 * cc + 1, _mm256_srli_epi16(numbers, 8));
    });
  }
  static int place(int column) { return wide_place(GridFormat<bits>::place(column)); }
};
template <int bits>
using Grid8 = std::conditional_t<(bits <= 5), GridBytes<bits>, GridWide<bits>>;

}  // namespace
}  // namespace quip
