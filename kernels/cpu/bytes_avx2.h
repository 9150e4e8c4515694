// SPDX-License-Identifier: Apache-2.0
// The bytes of AVX2's vectors: nibbles, bits, look-ups of 16 entries.
#pragma once
#include <immintrin.h>

#include "vector.h"

namespace quip {
namespace {

[[gnu::always_inline]] inline __m256i bytes_at(const uint8_t* p) { return load<__m256i>(p); }
[[gnu::always_inline]] inline __m256i splat8(int v) { return _mm256_set1_epi8(char(v)); }
[[gnu::always_inline]] inline __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, splat8(15)); }
[[gnu::always_inline]] inline __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
// table[index] of a table of 16 bytes, 0 where bit 7 of the index is set.
[[gnu::always_inline]] inline __m256i look_up16(const uint8_t* table, __m256i index) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(table)), index);
}
// Sets all bits of byte i where bit i of the 32 is set.
[[gnu::always_inline]] inline __m256i spread(const uint8_t* bits) {
  const __m256i each = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(bits)), byte_of);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
}

}  // namespace
}  // namespace quip
