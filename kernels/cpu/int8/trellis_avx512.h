// SPDX-License-Identifier: Apache-2.0
// Decodes trellis tiles for int8 activations, in registers, from the checkpoint's own order.
//
// The bits of position t of a tile are rrr cc C R c (formats/tile.py). The 16 lanes of a vector are the rows (rrr, R)
// of the tile. The stream is big-endian in 16-bit words (float/decode_trellis.h), so its byte i is byte i ^ 1 in
// memory.
#pragma once
#include <immintrin.h>

#include "../float/decode_trellis.h"
#include "lanes_avx512.h"

namespace quip {
namespace {

// A tile's 32*bits bytes in registers, from which any bytes are picked by permutations.
template <int bits>
struct TileBytes {
  __m512i part[(bits + 1) / 2];
  explicit TileBytes(const uint8_t* tile) {
    for (int i = 0; i < bits / 2; ++i) part[i] = _mm512_loadu_si512(tile + 64 * i);
    if constexpr (bits % 2)
      part[bits / 2] =
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 64 * (bits / 2))));
  }
  // Of the parts from `first` on, two at most.
  template <int first>
  __m512i pick_of_two(__m512i index) const {
    if constexpr (bits <= 2 * first + 2)
      return _mm512_permutexvar_epi8(index, part[first]);
    else
      return _mm512_permutex2var_epi8(part[first], index, part[first + 1]);
  }
  __m512i pick(__m512i index) const {
    if constexpr (bits <= 4)
      return pick_of_two<0>(index);
    else
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), pick_of_two<0>(index), pick_of_two<2>(index));
  }
};

// Index vectors for TileBytes::pick: byte b of vector v picks the stream byte stream(v, b).
template <int bits, int vectors>
struct StreamBytes {
  alignas(64) uint8_t index[vectors][64] = {};
  template <class F>
  constexpr explicit StreamBytes(F stream) {
    for (int v = 0; v < vectors; ++v)
      for (int b = 0; b < 64; ++b) index[v][b] = uint8_t(stream(v, b) % (32 * bits) ^ 1);
  }
};
// For Windows: qword rrr of vector cc is the 64 bits from position (rrr, cc, 0), most significant byte last; at a half rate
// and odd cc, from half a byte before it. Of a tile by rows, dword (rrr, R) is 32 bits of row 8 R + rrr: those of columns
// 4 cc .. 4 cc + 3, and with odd bits and odd cc half a byte before them.
template <int bits, bool by_rows, bool half_rate>
constexpr StreamBytes<bits, 4> kRuns{[](int cc, int b) {
  if (by_rows) return 2 * bits * (8 * (b / 4 % 2) + b / 8) + bits * cc / 2 + 3 - b % 4;
  return 4 * bits * (b / 8) + bits_of(8 * cc, bits, half_rate) / 8 + 7 - b % 8;
}};
// From position (rrr, cc, 0) to (rrr, cc, C, R, 0).
constexpr int steps_to(bool swapped, int C, int R) { return swapped ? 4 * R + 2 * C : 4 * C + 2 * R; }
// Above 6 bits the eight states of a run are more than 64 bits: dword (rrr, R) of vector 2 cc + C is the 32 bits from the
// byte in which those of (rrr, cc, C, R, 0) begin.
template <int bits, bool swapped>
constexpr StreamBytes<bits, 8> kParts{[](int v, int b) {
  return bits * (4 * (b / 8) + v / 2) + bits * steps_to(swapped, v % 2, b / 4 % 2) / 8 + 3 - b % 4;
}};
// For QuIP's grid: the same a byte later, where the last number ends.
template <int bits>
constexpr StreamBytes<bits, 4> kNumbers{[](int cc, int b) { return bits * (4 * (b / 8) + cc) + 8 - b % 8; }};
// For HYB: word (rrr, cc) of vector d is the 16 bits that lie d words behind position (rrr, cc, 0).
template <int bits>
constexpr StreamBytes<bits, (6 * bits + 15) / 16 + 1> kWindows{
    [](int d, int b) { return bits * (b / 2) + 2 * d + 1 - b % 2; }};

// Codes whose states are looked at one by one. In a tile by rows the places of a column are taken by others.
template <int bits, bool by_rows, bool half_rate = false>
struct Windows : FormatDefaults {
  static constexpr int kColumns = 16, kBytes = 32 * bits, kWindows = half_rate || (by_rows && bits % 2) ? 8 : 4;
  static constexpr bool kInParts = bits > 6;
  static constexpr int kRunVectors = kInParts ? 8 : 4;
  __m512i run[kRunVectors];  // kRuns or kParts
  __m512i window[kWindows];  // (C, c): the states of R = 0 and 1 in the low halves of the two dwords of each qword
  explicit Windows(const Weight& w) {
    const bool swapped = w.order == TileOrder::kSwapped;
    for (int i = 0; i < kRunVectors; ++i) {
      if constexpr (kInParts)
        run[i] = _mm512_load_si512((swapped ? kParts<bits, true> : kParts<bits, false>).index[i]);
      else
        run[i] = _mm512_load_si512(kRuns<bits, by_rows, half_rate>.index[i]);
    }
    for (int i = 0; i < kWindows; ++i) {
      const auto bytes = [&](int R) {
        const int to = bits_of(steps_to(swapped, i >> 1 & 1, R), bits, half_rate), c = bits * (i & 1);
        const int in_dword = by_rows ? bits * (i % 4) + i / 4 * 4 : to % 8 + c;
        const int offset = by_rows || kInParts ? in_dword + 32 * (1 - R) : i / 4 * 4 + to + c;
        return (unsigned long long)(48 - offset) | (unsigned long long)(56 - offset) << 8;
      };
      window[i] = _mm512_set1_epi64((long long)(bytes(0) | bytes(1) << 32));
    }
  }
  static constexpr int column(int cc, int C) { return by_rows ? 4 * cc + 2 * C : 8 * C + 2 * cc; }
  // emit(cc, C, c, states): of column(cc, C) + c.
  template <class Emit>
  [[gnu::always_inline]] void states(const uint8_t* tile, Emit emit) const {
    const TileBytes<bits> bytes(tile);
    __m512i stream = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int cc = 0; cc < 4; ++cc) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i == 0 || (kInParts && i == 2)) stream = bytes.pick(run[kInParts ? 2 * cc + i / 2 : cc]);
        emit(cc, i >> 1, i & 1,
             _mm512_maskz_multishift_epi64_epi8(0x3333333333333333ull, window[(cc % 2 * 4 + i) % kWindows], stream));
      }
    }
  }
  // Lane 2 rrr + R to row 8 R + rrr.
  static __m512i in_row_order(__m512i lanes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), lanes);
  }
};

inline __m512i congruence(__m512i state, uint32_t factor, uint32_t term) {
  return _mm512_add_epi32(_mm512_mullo_epi32(state, _mm512_set1_epi32(int(factor))), _mm512_set1_epi32(int(term)));
}

// 1MAD and MUL1: a word whose bytes are summed, and what the sum stands for.
struct OneMadBytes {
  static constexpr bool kHalfRate = false;
  static constexpr int kMean = kOneMadMean;
  static constexpr float kUnit = kOneMadUnit, kRest = 0;
  static __m512i word(__m512i state) { return congruence(state, kOneMadFactor, kOneMadTerm); }
};
struct Mul1Bytes {
  static constexpr bool kHalfRate = false;
  static constexpr int kMean = kMul1Mean;
  static constexpr float kUnit = kMul1Unit, kRest = kMul1Rest;
  static __m512i word(__m512i state) { return congruence(state, kMul1Factor, 0); }
};

struct Mul1HalfBytes : Mul1Bytes {
  static constexpr bool kHalfRate = true;
};

// For few rows. The activation is repeated in the four bytes of a lane, so vpdpbusd multiplies and sums the bytes.
template <int bits, bool by_rows, class Bytes>
struct BytesFew : Windows<bits, by_rows, Bytes::kHalfRate> {
  static constexpr int kQuads = 16, kFew = few_at(bits, 4), kRepeat = 4, kOffset = Bytes::kMean;
  static constexpr float kRest = Bytes::kRest;
  static constexpr bool kOnlyFew = true;
  using Windows<bits, by_rows, Bytes::kHalfRate>::Windows;
  float unit() const { return Bytes::kUnit; }
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->states(tile, [&](int cc, int C, int c, __m512i state)
                           __attribute__((always_inline)) { emit(this->column(cc, C) + c, Bytes::word(state)); });
  }
};

// Two columns of int16 per lane, multiplied by vpdpwssd. Value gives them in the low half of each lane.
template <int bits, bool by_rows, class Value, int few>
struct Wide : Windows<bits, by_rows, Value::kHalfRate>, Value {
  static constexpr int kQuads = 8, kFew = few_at(bits, few);
  static constexpr float kRest = Value::kRest;
  explicit Wide(const Weight& w) : Windows<bits, by_rows, Value::kHalfRate>(w), Value(w) {}
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    __m512i even = _mm512_setzero_si512();
    this->states(tile, [&](int cc, int C, int c, __m512i state) __attribute__((always_inline)) {
      const __m512i value = this->value(state);
      if (c == 0)
        even = value;
      else
        emit(this->column(cc, C) / 2, _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(value, 16)));
    });
  }
  static int place(int column) { return column; }
};

template <class Bytes>
struct SumValue {
  static constexpr bool kHalfRate = Bytes::kHalfRate;
  static constexpr float kRest = Bytes::kRest;
  explicit SumValue(const Weight&) {}
  float unit() const { return Bytes::kUnit; }
  __m512i value(__m512i state) const {
    return _mm512_dpbusd_epi32(_mm512_set1_epi32(-Bytes::kMean), Bytes::word(state), _mm512_set1_epi8(1));
  }
};

// The sum of both halves, which two_halves() of decode_trellis.h rounds to half precision, in units of 2^-8.
template <uint32_t factor, uint32_t term>
struct HalvesValue {
  static constexpr bool kHalfRate = false;
  static constexpr float kRest = 0;
  explicit HalvesValue(const Weight&) {}
  float unit() const { return kThreeInstUnit; }
  static __m512 widened(__m512i half_on_top) {  // (shifted & kept) ^ flipped
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_srai_epi32(half_on_top, 3),
                                                         _mm512_set1_epi32(kThreeInstKept),
                                                         _mm512_set1_epi32(kThreeInstFlipped), 0x6A));
  }
  __m512i value(__m512i state) const {
    const __m512i y = congruence(state, factor, term);
    return _mm512_cvtps_epi32(_mm512_add_ps(widened(y), widened(_mm512_slli_epi32(y, 16))));
  }
};

struct LutValue {
  static constexpr bool kHalfRate = false;
  static constexpr float kRest = 0;
  const int16_t* table;
  float unit_;
  explicit LutValue(const Weight& w) : table(w.table16), unit_(w.unit) {}
  float unit() const { return unit_; }
  __m512i value(__m512i state) const { return _mm512_i32gather_epi32(state, table, 2); }
};

// PAIRS: the table has both columns of a lane, for the states of even positions.
template <int bits, bool by_rows>
struct PairsWide : Windows<bits, by_rows>, LutValue {
  static constexpr int kQuads = 8, kFew = 4;
  static constexpr float kRest = 0;
  explicit PairsWide(const Weight& w) : Windows<bits, by_rows>(w), LutValue(w) {}
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    this->states(tile, [&](int cc, int C, int c, __m512i state) __attribute__((always_inline)) {
      if (c == 0) emit(this->column(cc, C) / 2, _mm512_i32gather_epi32(state, table, 4));
    });
  }
  static int place(int column) { return column; }
};

// Whether a tile is swapped, the constants of Windows say.
constexpr bool by_rows(TileOrder order) { return order == TileOrder::kByRows; }
template <int bits, TileOrder order, class Bytes>
using Bytes8 = BytesFew<bits, by_rows(order), Bytes>;
template <int bits, TileOrder order, class Bytes>
using Bytes16 = Wide<bits, by_rows(order), SumValue<Bytes>, 0>;  // for many rows
template <int bits, TileOrder order, uint32_t factor, uint32_t term>
using Halves16 = Wide<bits, by_rows(order), HalvesValue<factor, term>, 4>;
template <int bits, TileOrder order>
using Lut16 = Wide<bits, by_rows(order), LutValue, 4>;
template <int bits, TileOrder order>
using Pairs16 = PairsWide<bits, by_rows(order)>;

// QuIP's grid: a run's 64 bits have the numbers of all eight columns and rows, which one instruction picks.
template <int bits>
struct Grid8 : GridFormat<bits> {
  static constexpr int kFew = 16;
  __m512i run[4];  // kNumbers
  __m512i number;  // byte 4 R + 2 C + 1 - c of a qword: 8 bits that end with the number of (C, R, c)
  explicit Grid8(const Weight&) {
    for (int cc = 0; cc < 4; ++cc) run[cc] = _mm512_load_si512(kNumbers<bits>.index[cc]);
    unsigned long long from = 0;
    for (int i = 0; i < 8; ++i) from |= (56ull - bits * ((i & 2) * 2 + (i >> 2) * 2 + 1 - (i & 1))) << 8 * i;
    number = _mm512_set1_epi64((long long)from);
  }
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    const TileBytes<bits> bytes(tile);
#pragma GCC unroll 4
    for (int cc = 0; cc < 4; ++cc)
      emit(cc, _mm512_and_si512(_mm512_multishift_epi64_epi8(number, bytes.pick(run[cc])),
                                _mm512_set1_epi8(char((1 << bits) - 1))));
  }
  static __m512i in_row_order(__m512i lanes) { return Windows<bits, false>::in_row_order(lanes); }
};

// HYB: bits 14..6 of h = x^2 + x are the row of the table, and bit 15 negates component 0. Everything fits 16 bits, and
// two registers hold the 64 states of C. The table is in bytes, value / unit + 128, component by component.
inline __m512i negate8(__mmask64 where, __m512i v) { return _mm512_mask_sub_epi8(v, where, _mm512_setzero_si512(), v); }

// A table that is a grid (formats/trellis_codes.py). Bits 9..6 of the hash choose a point, bits 12..10 and 13 choose a
// line, and bit 13 chooses the points. Numbers stand here with both signs, so a look-up is all there is to do: bits
// 15..13 and 9..6 find component 0 (14 is not needed), and bits 14..9 component 1 (9 is not needed).
struct HybGrid {
  static constexpr int kFew = 16, kUpper = 9;
  __m512i points[2], lines;
  explicit HybGrid(const uint8_t* table8) {
    alignas(64) uint8_t number[3][64];
    for (int i = 0; i < 64; ++i) {
      const uint8_t point = table8[i / 16 % 2 * 128 + i % 16], line = table8[512 + i / 2 % 16 * 16];
      number[0][i] = point, number[1][i] = uint8_t(-point);
      number[2][i] = i < 32 ? line : uint8_t(-line);
    }
    for (int i = 0; i < 2; ++i) points[i] = _mm512_load_si512(number[i]);
    lines = _mm512_load_si512(number[2]);
  }
  [[gnu::always_inline]] void look_up(__m512i bits13_6, __m512i bits16_9, __m512i* value) const {
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), bits13_6, bits16_9, 0xCA);
    value[0] = _mm512_permutex2var_epi8(points[0], index, points[1]);
    value[1] = _mm512_permutexvar_epi8(bits16_9, lines);
  }
};

// Any table.
struct HybTable {
  static constexpr int kFew = 4, kUpper = 8;
  __m512i part[2][8];  // [component][64 rows]
  explicit HybTable(const uint8_t* table8) {
    for (int i = 0; i < 16; ++i) part[i / 8][i % 8] = _mm512_loadu_si512(table8 + 64 * i);
  }
  [[gnu::always_inline]] void look_up(__m512i bits13_6, __m512i bits15_8, __m512i* value) const {
    const __mmask64 bit13 = _mm512_movepi8_mask(bits13_6),
                    bit14 = _mm512_test_epi8_mask(bits15_8, _mm512_set1_epi8(64));
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const auto rows = [&](int i) { return _mm512_permutex2var_epi8(part[c][i], bits13_6, part[c][i + 1]); };
      value[c] = _mm512_mask_blend_epi8(bit14, _mm512_mask_blend_epi8(bit13, rows(0), rows(2)),
                                        _mm512_mask_blend_epi8(bit13, rows(4), rows(6)));
    }
    value[0] = negate8(_mm512_movepi8_mask(bits15_8), value[0]);
  }
};

template <int bits, class Table>
struct Hyb8 : FormatDefaults, Table {
  static constexpr int kColumns = 16, kQuads = 4, kBytes = 32 * bits, kFew = Table::kFew, kOffset = kOffset8;
  static constexpr int kWords = (6 * bits + 15) / 16 + 1;
  __m512i word[kWords];  // kWindows
  __m512i split;         // a qword of four hashes to four bytes of bits 13..6 and four that begin at bit kUpper
  float unit_;

  explicit Hyb8(const Weight& w) : Table(w.table8), unit_(w.unit) {
    for (int d = 0; d < kWords; ++d) word[d] = _mm512_load_si512(kWindows<bits>.index[d]);
    split = _mm512_set1_epi64(0x3020100036261606ll + Table::kUpper * 0x0101010100000000ll);
  }
  float unit() const { return unit_; }

  template <int shift>
  static __m512i window(const __m512i* words) {
    constexpr int d = shift / 16, rest = shift % 16;
    if constexpr (rest == 0) return words[d];
    return _mm512_shldi_epi16(words[d], words[d + 1], rest);
  }
  static __m512i hash(__m512i x) { return _mm512_mullo_epi16(x, _mm512_add_epi16(x, _mm512_set1_epi16(1))); }
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* tile, Emit emit) const {
    const TileBytes<bits> bytes(tile);
    __m512i words[kWords];
    for (int d = 0; d < kWords; ++d) words[d] = bytes.pick(word[d]);
    const auto column = [&](int C, __m512i upper, __m512i lower) __attribute__((always_inline)) {
      const __m512 first = _mm512_castsi512_ps(_mm512_multishift_epi64_epi8(split, hash(upper)));
      const __m512 second = _mm512_castsi512_ps(_mm512_multishift_epi64_epi8(split, hash(lower)));
      const __m512i index = _mm512_castps_si512(_mm512_shuffle_ps(first, second, 0x88));
      const __m512i upper_bits = _mm512_castps_si512(_mm512_shuffle_ps(first, second, 0xDD));
      __m512i value[2];
      this->look_up(index, upper_bits, value);
      emit(2 * C, value[0]);
      emit(2 * C + 1, value[1]);
    };
    column(0, window<0>(words), window<2 * bits>(words));
    column(1, window<4 * bits>(words), window<6 * bits>(words));
  }
  static int place(int column) { return column / 16 * 16 + 4 * (column % 16 / 8 * 2 + column % 2) + column % 8 / 2; }
  // Lane 4 p + 2 R + e (rrr = 2 p + e) to row 8 R + rrr.
  static __m512i in_row_order(__m512i lanes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15), lanes);
  }
};

template <int bits, class Table>
using HybMany = Hyb8<bits, Table>;

}  // namespace
}  // namespace quip
