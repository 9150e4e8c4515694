// SPDX-License-Identifier: Apache-2.0
// The vectors of panel.h on AVX2: 8 rows of the weight in a register. vpmaddubsw adds two products of bytes in 16 bits.
// So decoded bytes are at most 32, for eight products to fit, and larger numbers are multiplied as int16.
#pragma once
#include <immintrin.h>

#include "../vector.h"
#include "format.h"

namespace quip {
namespace {

using Sums = __m256i;  // lane = row of the weight

constexpr int kRowsOfSums = 8;
constexpr int kGroup = 4;     // rows of x multiplied together: 2 x 4 sums in registers
constexpr int kOffset8 = 16;  // decoded bytes are value + 16, unsigned, as vpmaddubsw wants its first operand

inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Sums plus(Sums a, Sums b) { return _mm256_add_epi32(a, b); }

template <bool wide>
constexpr int step_of() {  // quads that are multiplied together
  return wide ? 1 : 4;
}

template <bool wide>
inline Sums multiply_add(Sums sum, __m256i weights, int32_t quad) {
  const __m256i x = _mm256_set1_epi32(quad);
  if constexpr (wide) return plus(sum, _mm256_madd_epi16(weights, x));
  return plus(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), _mm256_set1_epi16(1)));
}

// Multiplies four quads of small bytes, of which eight products fit 16 bits. Quads of x lie `step` apart.
inline Sums multiply_add_four(Sums sum, const __m256i* weights, const int32_t* quads, int64_t step) {
  const auto products = [&](int q) { return _mm256_maddubs_epi16(weights[q], _mm256_set1_epi32(quads[q * step])); };
  const __m256i all =
      _mm256_add_epi16(_mm256_add_epi16(products(0), products(1)), _mm256_add_epi16(products(2), products(3)));
  return plus(sum, _mm256_madd_epi16(all, _mm256_set1_epi16(1)));
}

// y[0..rows), kRowStep apart, = ((first ? 0 : y) + (sum - (kOffset + kRest) * total) * unit) * (last ? scale : 1).
template <class Format>
inline void add_sums(Sums sum, int32_t total, float unit, bool first, bool last, float scale, int rows, float* y) {
  int32_t sums[kRowsOfSums];
  store(sums, sum);
  for (int i = 0; i < rows; ++i) {
    float difference = float(sums[i] - Format::kOffset * total);
    if constexpr (Format::kRest != 0) difference -= Format::kRest * float(total);
    float& to = y[i * Format::kRowStep];
    const float value = (first ? 0.0f : to) + difference * unit;
    to = last ? value * scale : value;
  }
}

// q = x * inverse to the nearest integer, at least -127; returns the sum of q.
inline int32_t round_row(const float* x, int64_t count, float inverse, int8_t* q) {
  __m256i total = _mm256_setzero_si256();
  for (int64_t c = 0; c < count; c += 8) {
    // A product of zero with a NaN is no number and converts to INT_MIN: keep it in the range of the sums.
    __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + c), _mm256_set1_ps(inverse)));
    v = _mm256_max_epi32(v, _mm256_set1_epi32(-127));
    total = _mm256_add_epi32(total, v);
    typedef int8_t Octet8 __attribute__((vector_size(8)));
    store(q + c, __builtin_convertvector((__v8si)v, Octet8));
  }
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += ((__v8si)total)[i];
  return sum;
}

// out[place(c)] = in[c] of 64 bytes.
template <class Format>
inline void permute(const int8_t* in, void* out) {
  for (int c = 0; c < 64; ++c) static_cast<int8_t*>(out)[Format::place(c)] = in[c];
}

}  // namespace
}  // namespace quip
