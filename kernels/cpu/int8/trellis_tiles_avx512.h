// SPDX-License-Identifier: Apache-2.0
// Trellis codes whose numbers are no bytes, for tiles of AMX, which multiply bytes: a number is two of them, and the sum
// of its products is put together from the sums of theirs.
#pragma once
#include "trellis_avx512.h"

namespace quip {
namespace {

// Two columns of numbers + kOffset as 16 bits per lane.
template <class Bytes>
struct SumPairs {
  static constexpr bool kHalfRate = Bytes::kHalfRate;
  static constexpr int kOffset = Bytes::kMean;
  static constexpr float kRest = Bytes::kRest;
  explicit SumPairs(const Weight&) {}
  float unit() const { return Bytes::kUnit; }
  __m512i pair(__m512i first, __m512i second) const {
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), Bytes::word(second), ones);
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 16), Bytes::word(first), ones);
  }
};

template <class Value>
struct ValuePairs : Value {
  static constexpr int kOffset = 1 << 15;
  using Value::Value;
  __m512i pair(__m512i first, __m512i second) const {
    const __m512i upper = _mm512_slli_epi32(this->value(second), 16);
    return _mm512_xor_si512(_mm512_mask_blend_epi16(0xAAAAAAAA, this->value(first), upper),
                            _mm512_set1_epi16(short(1 << 15)));
  }
};

// PAIRS: the state of an even position has both.
struct TablePairs : LutValue {
  static constexpr int kOffset = 1 << 15;
  using LutValue::LutValue;
  __m512i pair(__m512i first, __m512i) const {
    return _mm512_xor_si512(_mm512_i32gather_epi32(first, table, 4), _mm512_set1_epi16(short(1 << 15)));
  }
};

template <int bits, bool by_rows, class Pairs>
struct Split8 : Windows<bits, by_rows, Pairs::kHalfRate>, Pairs {
  static constexpr int kQuads = 4, kFew = 0, kOffset = Pairs::kOffset;
  static constexpr float kRest = Pairs::kRest;
  static constexpr bool kTwoBytes = true;
  explicit Split8(const Weight& w) : Windows<bits, by_rows, Pairs::kHalfRate>(w), Pairs(w) {}
  // emit(0 for the low bytes or 1 for the high ones, quad, bytes)
  template <class Emit>
  void decode(const uint8_t* tile, Emit emit) const {
    __m512i even = _mm512_setzero_si512(), left = even;
    this->states(tile, [&](int cc, int C, int c, __m512i state) {
      if (c == 0) {
        even = state;
        return;
      }
      const __m512i right = this->pair(even, state);
      if (C == 0) {
        left = right;
        return;
      }
      const __m512i low = _mm512_set1_epi16(0xFF);  // of each pair of bytes: low ? left : right
      emit(0, cc, _mm512_ternarylogic_epi32(low, left, _mm512_slli_epi16(right, 8), 0xCA));
      emit(1, cc, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(left, 8), right, 0xCA));
    });
  }
  // Column 8 C + 2 cc + c, or 4 cc + 2 C + c of a tile by rows, is byte 2 c + C of quad cc.
  static int place(int column) {
    if (by_rows) return column / 4 * 4 + column % 2 * 2 + column % 4 / 2;
    return column / 16 * 16 + column % 8 / 2 * 4 + column % 2 * 2 + column % 16 / 8;
  }
};

}  // namespace
}  // namespace quip
