// SPDX-License-Identifier: Apache-2.0
// The parts of lattice codes on AVX2 (lattice_layout.h), and their components as bytes, 32 rows x 8 columns at a time.
#pragma once
#include "bytes_avx2.h"
#include "lattice_layout.h"

namespace quip {
namespace {

struct NibbleTables {
  uint8_t bit[16] = {};  // 1 << n, 0 from 8 on
  uint8_t odd[16] = {};  // bit 7: parity of the nibble
  constexpr NibbleTables() {
    for (int n = 0; n < 16; ++n) {
      bit[n] = uint8_t(n < 8 ? 1 << n : 0);
      odd[n] = uint8_t(__builtin_popcount(n) % 2 << 7);
    }
  }
};
constexpr NibbleTables kNibbles;

// 32 E8P codes of one column group.
struct E8pParts {
  __m256i threes, signs;  // bit i: component i
  __m256i parity;         // a nibble, odd where the code moves by -1/4
  __m256i large, number,
      positive;  // where one component is 5/2, which one (else without meaning), whether it is positive

  [[gnu::always_inline]] E8pParts(const uint8_t* stage, int group) {
    const __m256i index = bytes_at(stage + 64 * group), stored = bytes_at(stage + 64 * group + 32);
    large = spread(stage + 512 + 4 * group);
    number = high_nibbles(index);
    threes = _mm256_blendv_epi8(index, look_up16(kNibbles.bit, index), large);
    const __m256i both = _mm256_xor_si256(stored, threes);
    parity = low_nibbles(_mm256_xor_si256(both, _mm256_srli_epi16(both, 4)));
    signs = _mm256_xor_si256(stored, look_up16(kNibbles.odd, parity));
    positive = _mm256_cmpeq_epi8(_mm256_and_si256(signs, look_up16(kNibbles.bit, number)), _mm256_setzero_si256());
  }

  // pair[k], a nibble: components 2k and 2k+1, is 3/2 in bits 0 and 1, is negative in bits 2 and 3.
  [[gnu::always_inline]] void pairs(__m256i* pair) const {
    const __m256i even = splat8(0x33), odd = splat8(0xCC);
    const __m256i a =
        _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(signs, even), 2), _mm256_and_si256(threes, even));
    const __m256i b =
        _mm256_or_si256(_mm256_and_si256(signs, odd), _mm256_srli_epi16(_mm256_and_si256(threes, odd), 2));
    pair[0] = low_nibbles(a), pair[1] = low_nibbles(b), pair[2] = high_nibbles(a), pair[3] = high_nibbles(b);
  }
  // A nibble: the number of the large component, plus 8 where it is positive.
  [[gnu::always_inline]] __m256i signed_number() const {
    return _mm256_or_si256(number, _mm256_and_si256(positive, splat8(8)));
  }
};

// of: 4 v times `factor`, v without its shift and 5/2, for the first and the second component of a pair.
// shift: the shift times 4 * factor, plus `offset`.
template <int factor, int offset>
struct ComponentTables {
  uint8_t of[2][16] = {}, shift[16] = {};
  constexpr ComponentTables() {
    for (int n = 0; n < 16; ++n) {
      for (int i = 0; i < 2; ++i) of[i][n] = uint8_t(factor * (n >> (2 + i) & 1 ? -1 : 1) * (n >> i & 1 ? 6 : 2));
      shift[n] = uint8_t(factor * (__builtin_popcount(n) % 2 ? -1 : 1) + offset);
    }
  }
};
template <int factor, int offset>
constexpr ComponentTables<factor, offset> kComponents;

// out[i]: component i of 32 codes, 4 v * factor + offset.
template <int factor, int offset>
[[gnu::always_inline]] inline void e8p_components(const uint8_t* stage, int group, __m256i* out) {
  const ComponentTables<factor, offset>& tables = kComponents<factor, offset>;
  const E8pParts parts(stage, group);
  __m256i pair[4];
  parts.pairs(pair);
  const __m256i shift = look_up16(tables.shift, parts.parity);
  const __m256i eight = _mm256_sub_epi8(_mm256_and_si256(parts.positive, splat8(16 * factor)), splat8(8 * factor));
  const __m256i rest = _mm256_and_si256(parts.large, eight);  // 4 * (5/2 - 1/2), with its sign
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i here = _mm256_and_si256(_mm256_cmpeq_epi8(parts.number, splat8(i)), rest);
    out[i] = _mm256_add_epi8(_mm256_add_epi8(look_up16(tables.of[i % 2], pair[i / 2]), shift), here);
  }
}

struct E81bTables {
  uint8_t sign[4][16] = {}, step[8][16] = {};  // 2 w, by a nibble of `pairs`
  constexpr E81bTables() {
    for (int n = 0; n < 16; ++n) {
      for (int i = 0; i < 4; ++i) sign[i][n] = uint8_t(n >> i & 1 ? -1 : 1);
      step[n % 8][n] = uint8_t(n < 8 ? -2 : 2);
    }
  }
};
constexpr E81bTables kE81b;

// out[i] += component i of 32 codes, 2 w.
[[gnu::always_inline]] inline void add_e81b_components(const uint8_t* stage, int group, __m256i* out) {
  const __m256i pairs = bytes_at(stage + 32 * group), halves = spread(stage + 256 + 4 * group);
  const __m256i low = low_nibbles(pairs), high = high_nibbles(pairs);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i steps = _mm256_add_epi8(look_up16(kE81b.step[i], low), look_up16(kE81b.step[i], high));
    const __m256i sign = look_up16(kE81b.sign[i % 4], i < 4 ? low : high);
    out[i] = _mm256_add_epi8(out[i], _mm256_blendv_epi8(steps, sign, halves));
  }
}

// out[8 * row + i]: component i of rows 16 * upper .. 16 * upper + 15, from one vector per component.
template <bool upper>
[[gnu::always_inline]] inline void in_rows(const __m256i* components, int8_t* out) {
  const auto pair = [&](int i) {
    return upper ? _mm256_unpackhi_epi8(components[i], components[i + 1])
                 : _mm256_unpacklo_epi8(components[i], components[i + 1]);
  };
  const __m256i first[2] = {pair(0), pair(2)}, second[2] = {pair(4), pair(6)};
  for (int part = 0; part < 2; ++part) {
    const auto four = [&](const __m256i* pairs) {
      return part ? _mm256_unpackhi_epi16(pairs[0], pairs[1]) : _mm256_unpacklo_epi16(pairs[0], pairs[1]);
    };
    const __m256i a = four(first), b = four(second);
    const __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);  // rows 0 1 4 5, 2 3 6 7
    store(out + 64 * part, _mm256_permute2x128_si256(low, high, 0x20));
    store(out + 64 * part + 32, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

}  // namespace
}  // namespace quip
