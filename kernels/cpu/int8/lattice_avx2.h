// SPDX-License-Identifier: Apache-2.0
// The lattice with int8 activations on AVX2, from the parts of its codes (lattice_layout.h), 32 rows x 8 columns at a
// time.
//
// For few rows of x there are no multiplications. If 5/2 is left out, two weights of a code are signs and 3/2s, which
// have 16 values. So what two columns of x can contribute is tabulated once per row of x, and vpshufb looks it up for
// 32 rows of the weight. With v = (+-(1 + 2 * [3/2]) +- [5/2] * 4) / 2 + (1 or -1) / 4, the product of a code is
//
//     sum of 4 v x = 2 * (four look-ups of pairs + one of 5/2 + one of the shift) + sum of x
//
// where that of the shift is 0 or minus the sum of x. Entries have 12 bits: the 5 low ones and the rest are looked up
// and summed as bytes. E81B has two look-ups: the signs of four columns each, or the two components that change.
//
// For more rows, unpacking puts the values in quads, as bytes or, at 4 bits, as int16.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <utility>

#include "../lattice_parts_avx2.h"
#include "lanes_avx2.h"

namespace quip {
namespace {

// ---- Few rows ----

// Sums of numbers cut in 5 low bits and the rest, one byte per row. Each call of add adds 128 to the rest. A code has
// at most five 3/2s, so its sum is below 3303, and eight of them fit 16 bits.
struct CutSums {
  static constexpr int kLow = 5, kCalls = 8;
  __m256i low = _mm256_setzero_si256(), low_odd = low, high = low, high_odd = low;  // int16: all, and odd bytes alone

  [[gnu::always_inline]] void add(__m256i low_bytes, __m256i high_bytes) {
    low = _mm256_add_epi16(low, low_bytes), low_odd = _mm256_add_epi16(low_odd, _mm256_srli_epi16(low_bytes, 8));
    high = _mm256_add_epi16(high, high_bytes), high_odd = _mm256_add_epi16(high_odd, _mm256_srli_epi16(high_bytes, 8));
  }
  // After kCalls of add. sums: even bytes 0..14 and 16..30, then odd ones.
  [[gnu::always_inline]] void add_to(Sums* sums) const {
    const __m256i excess = _mm256_set1_epi16(128 * kCalls);
    const auto joined = [&](__m256i low16, __m256i high16) {
      return _mm256_add_epi16(low16, _mm256_slli_epi16(_mm256_sub_epi16(high16, excess), kLow));
    };
    const auto even = [](__m256i all, __m256i odd) { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); };
    const __m256i halves[2] = {joined(even(low, low_odd), even(high, high_odd)), joined(low_odd, high_odd)};
    for (int i = 0; i < 4; ++i) {
      const __m128i half = i % 2 ? _mm256_extracti128_si256(halves[i / 2], 1) : _mm256_castsi256_si128(halves[i / 2]);
      sums[i] = plus(sums[i], _mm256_cvtepi16_epi32(half));
    }
  }
};

// As CutSums gives them, to rows 8i .. 8i+7 in sums[i].
inline void sort_rows(Sums* sums) {
  const __m256i a = _mm256_unpacklo_epi32(sums[0], sums[2]), b = _mm256_unpackhi_epi32(sums[0], sums[2]);
  const __m256i c = _mm256_unpacklo_epi32(sums[1], sums[3]), d = _mm256_unpackhi_epi32(sums[1], sums[3]);
  sums[0] = _mm256_permute2x128_si256(a, c, 0x20), sums[1] = _mm256_permute2x128_si256(b, d, 0x20);
  sums[2] = _mm256_permute2x128_si256(a, c, 0x31), sums[3] = _mm256_permute2x128_si256(b, d, 0x31);
}

// What 8 columns of 32 rows look up in the tables of a row of x (LatticeFew8), low bytes or high ones.
struct E8pLookUps {
  static constexpr int64_t kStageBytes = kE8pBytes;
  __m256i index[6], large;
  [[gnu::always_inline]] E8pLookUps(const uint8_t* stage, int group) {
    const E8pParts parts(stage, group);
    parts.pairs(index);
    index[4] = parts.parity, index[5] = parts.signed_number(), large = parts.large;
  }
  [[gnu::always_inline]] __m256i sum(const uint8_t* tables) const {
    __m256i total = _mm256_and_si256(large, look_up16(tables + 32 * 5, index[5]));
#pragma GCC unroll 5
    for (int t = 0; t < 5; ++t) total = _mm256_add_epi8(total, look_up16(tables + 32 * t, index[t]));
    return total;
  }
};

struct E81bLookUps {
  static constexpr int64_t kStageBytes = kE81bBytes;
  __m256i low, high, halves;
  [[gnu::always_inline]] E81bLookUps(const uint8_t* stage, int group) {
    const __m256i pairs = bytes_at(stage + 32 * group);
    low = low_nibbles(pairs), high = high_nibbles(pairs), halves = spread(stage + 256 + 4 * group);
  }
  [[gnu::always_inline]] __m256i sum(const uint8_t* tables) const {
    const __m256i signs = _mm256_add_epi8(look_up16(tables + 32 * 6, low), look_up16(tables + 32 * 7, high));
    const __m256i integers = _mm256_add_epi8(look_up16(tables + 32 * 8, low), look_up16(tables + 32 * 8, high));
    return _mm256_blendv_epi8(integers, signs, halves);
  }
};

template <int bits>
struct LatticeFew8 : FormatDefaults {
  static constexpr bool kTabulated = true;
  // Of 8 columns: the tables of four pairs, of the shift and of 5/2; at 3 bits of two times four signs and of +-1.
  static constexpr int kTables = bits == 3 ? 9 : 6, kTableBytes = 2 * 16 * kTables;
  static constexpr int kUnitRows = kBlockRows, kColumns = kBlockColumns, kBytes = int(block_bytes(bits));
  static constexpr int kFew = bits == 2 ? 4 : bits == 3 ? 2 : 3;  // for more, multiplying is faster
  static constexpr int kQuads = kColumns / 8 * kTableBytes / 4, kOffset = bits == 4 ? -9 : -1;
  static constexpr int kAhead = 6;  // units: memory is asked for them
  explicit LatticeFew8(const Weight&) {}
  float unit() const { return bits == 4 ? 1 / 28.0f : 1 / 4.0f; }

  // Numbers to low bytes, then high bytes plus `excess`.
  [[gnu::always_inline]] static void put_table(__m256i numbers, int excess, uint8_t* out) {
    const __m256i low = _mm256_and_si256(numbers, _mm256_set1_epi16((1 << CutSums::kLow) - 1));
    const __m256i high = _mm256_add_epi16(_mm256_srai_epi16(numbers, CutSums::kLow), _mm256_set1_epi16(short(excess)));
    const __m256i bytes = _mm256_packus_epi16(low, _mm256_and_si256(high, _mm256_set1_epi16(255)));
    store(out, _mm256_permute4x64_epi64(bytes, 0xD8));
  }
  [[gnu::always_inline]] static __m256i times(int x, __m256i numbers) {
    return _mm256_mullo_epi16(_mm256_set1_epi16(short(x)), numbers);
  }

  static void put_tables(const int8_t* x, uint8_t* out) {
    typedef int16_t Numbers __attribute__((vector_size(32)));
    const auto numbers = [](auto f) { return (__m256i)lanes<Numbers>([=](int n) { return int16_t(f(n)); }); };
    const __m256i first = numbers([](int n) { return (n & 4 ? -1 : 1) * (n & 1 ? 3 : 1); });
    const __m256i second = numbers([](int n) { return (n & 8 ? -1 : 1) * (n & 2 ? 3 : 1); });
    int total = 0;
    for (int i = 0; i < 8; ++i) total += x[i];
    for (int k = 0; k < 4; ++k)
      put_table(_mm256_add_epi16(times(x[2 * k], first), times(x[2 * k + 1], second)), 0, out + 32 * k);
    put_table(times(-total, numbers([](int n) { return __builtin_popcount(n) % 2; })), 128, out + 32 * 4);
    const __m256i twice = _mm256_cvtepi8_epi16(_mm_set1_epi64x(load<int64_t>(x)));
    const __m256i sign = numbers([](int n) { return n & 8 ? 1 : -1; });
    put_table(_mm256_mullo_epi16(twice, _mm256_slli_epi16(sign, 2)), 0, out + 32 * 5);
    if constexpr (bits == 3) {
      for (int half = 0; half < 2; ++half) {
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sum = _mm256_add_epi16(sum, times(x[4 * half + i], numbers([=](int n) { return n >> i & 1 ? -1 : 1; })));
        put_table(sum, 64, out + 32 * (6 + half));
      }
      put_table(_mm256_mullo_epi16(twice, _mm256_slli_epi16(sign, 1)), 64, out + 32 * 8);
    }
  }
  // Columns of one row of x as int8 to their tables.
  static void arrange(const int8_t* q, int64_t columns, int32_t* out) {
    for (int64_t c = 0; c < columns; c += 8) put_tables(q + c, reinterpret_cast<uint8_t*>(out) + c / 8 * kTableBytes);
  }

  // Of M rows of x, whose tables lie table_step bytes apart; stage: of the first of `units` blocks.
  template <class LookUps, int M>
  static void add_stage(const uint8_t* stage, int64_t units, const uint8_t* tables, int64_t table_step,
                        Sums (*sums)[4]) {
    for (int64_t u = 0; u < units; ++u, stage += kBytes) {
      fetch(stage + kAhead * kBytes, LookUps::kStageBytes);
      CutSums cut[M];
      for (int g = 0; g < CutSums::kCalls; ++g, tables += kTableBytes) {
        const LookUps look_ups(stage, g);
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
          const uint8_t* of_row = tables + r * table_step;
          cut[r].add(look_ups.sum(of_row), look_ups.sum(of_row + 16));
        }
      }
      for (int r = 0; r < M; ++r) cut[r].add_to(sums[r]);
    }
  }

  // sums[r][i] = (weights of rows 8i .. 8i+7, in units, plus kOffset) * row r of x. The tables of M rows lie x_step
  // apart.
  template <int M>
  static void sum(const uint8_t* block, int64_t units, const int32_t* x, int64_t x_step, Sums (*sums)[4]) {
    const uint8_t* tables = reinterpret_cast<const uint8_t*>(x);
    const int64_t step = x_step * int64_t(sizeof(int32_t));
    Sums second[M][4];
    for (int r = 0; r < M; ++r)
      std::fill(sums[r], sums[r] + 4, no_sums()), std::fill(second[r], second[r] + 4, no_sums());
    add_stage<E8pLookUps, M>(block, units, tables, step, sums);
    if constexpr (bits == 3) add_stage<E81bLookUps, M>(block + kE8pBytes, units, tables, step, second);
    if constexpr (bits == 4) add_stage<E8pLookUps, M>(block + kE8pBytes, units, tables, step, second);
    const auto times32 = [](Sums v, int by) { return _mm256_mullo_epi32(v, _mm256_set1_epi32(by)); };
    for (int r = 0; r < M; ++r) {
      for (int i = 0; i < 4; ++i)
        sums[r][i] = plus(times32(sums[r][i], bits == 4 ? 14 : 2), times32(second[r][i], bits == 4 ? 4 : 1));
      sort_rows(sums[r]);
    }
  }
};

// ---- Many rows ----

// As in lattice_avx512.h: 4 v at 2 bits, 4 v + 2 w at 3, and 7 * 4 v + 2 * 4 w, which is int16, at 4.
template <int bits>
struct Lattice8 : FormatDefaults {
  static constexpr bool kWide = bits == 4, kWhole = true;
  static constexpr int kUnitRows = kBlockRows, kColumns = kBlockColumns, kBytes = int(block_bytes(bits)), kFew = 0;
  static constexpr int kOffset = kWide ? 0 : kOffset8;
  static constexpr int kQuads = kColumns / (kWide ? 2 : 4);
  explicit Lattice8(const Weight&) {}
  float unit() const { return bits == 4 ? 1 / 28.0f : 1 / 4.0f; }

  // emit(part, quad, vector) for rows 8 * part .. 8 * part + 7.
  template <class Emit>
  [[gnu::always_inline]] void decode(const uint8_t* block, Emit emit) const {
    for (int g = 0; g < kColumns / 8; ++g) {
      __m256i c[8];
      if constexpr (kWide) {
        __m256i rest[8];
        e8p_components<7, 0>(block, g, c);
        e8p_components<2, 0>(block + kE8pBytes, g, rest);
        for (int i = 0; i < 8; ++i) c[i] = _mm256_add_epi8(c[i], rest[i]);
      } else {
        e8p_components<1, kOffset8>(block, g, c);
        if constexpr (bits == 3) add_e81b_components(block + kE8pBytes, g, c);
      }
      const auto both = [&](int i) {  // two columns of bytes: of the places 0..7 and 16..23, and of the others
        return std::pair(_mm256_unpacklo_epi8(c[i], c[i + 1]), _mm256_unpackhi_epi8(c[i], c[i + 1]));
      };
      if constexpr (kWide) {
        for (int k = 0; k < 4; ++k) {
          const auto [low, high] = both(2 * k);
          for (int half = 0; half < 2; ++half) {
            const __m256i v = half ? high : low;
            emit(2 * half, 4 * g + k, _mm256_srai_epi16(_mm256_unpacklo_epi8(v, v), 8));
            emit(2 * half + 1, 4 * g + k, _mm256_srai_epi16(_mm256_unpackhi_epi8(v, v), 8));
          }
        }
      } else {
        for (int k = 0; k < 2; ++k) {
          const auto [low01, high01] = both(4 * k);
          const auto [low23, high23] = both(4 * k + 2);
          emit(0, 2 * g + k, _mm256_unpacklo_epi16(low01, low23));
          emit(1, 2 * g + k, _mm256_unpackhi_epi16(low01, low23));
          emit(2, 2 * g + k, _mm256_unpacklo_epi16(high01, high23));
          emit(3, 2 * g + k, _mm256_unpackhi_epi16(high01, high23));
        }
      }
    }
  }
  static int place(int column) { return column; }
};

}  // namespace
}  // namespace quip
