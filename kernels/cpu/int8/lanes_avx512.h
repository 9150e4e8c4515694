// SPDX-License-Identifier: Apache-2.0
// The vectors of panel.h on AVX-512 with VNNI: 16 rows of the weight in a register.
#pragma once
#include <immintrin.h>

#include "../vector.h"
#include "format.h"

namespace quip {
namespace {

using Sums = __m512i;  // lane = row of the weight

constexpr int kRowsOfSums = 16;
constexpr int kGroup = 12;     // rows of x multiplied together: 2 x 12 sums in registers
constexpr int kOffset8 = 128;  // decoded bytes are value + 128, unsigned, as vpdpbusd wants its first operand

inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }

template <bool wide>
constexpr int step_of() {  // quads that are multiplied together
  return 1;
}

template <bool wide>
inline Sums multiply_add(Sums sum, __m512i weights, int32_t quad) {
  if constexpr (wide) return _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi32(quad));
  return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(quad));
}

// y[0..rows) = ((first ? 0 : y) + (sum - (kOffset + kRest) * total) * unit) * (last ? scale : 1).
template <class Format>
inline void add_sums(Sums sum, int32_t total, float unit, bool first, bool last, float scale, int rows, float* y) {
  const __mmask16 valid = __mmask16((1u << rows) - 1);
  __m512 value = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid, y);
  const __m512i offset = _mm512_set1_epi32(int32_t(uint32_t(Format::kOffset) * uint32_t(total)));  // modulo 2^32
  __m512 difference = _mm512_cvtepi32_ps(Format::in_row_order(_mm512_sub_epi32(sum, offset)));
  if constexpr (Format::kRest != 0)
    difference = _mm512_sub_ps(difference, _mm512_set1_ps(Format::kRest * float(total)));
  value = _mm512_fmadd_ps(difference, _mm512_set1_ps(unit), value);
  if (last) value = _mm512_mul_ps(value, _mm512_set1_ps(scale));
  _mm512_mask_storeu_ps(y, valid, value);
}

// q = x * inverse to the nearest integer, at least -127; returns the sum of q.
inline int32_t round_row(const float* x, int64_t count, float inverse, int8_t* q) {
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < count; c += kLanes) {
    // A product of zero with a NaN is no number and converts to INT_MIN: keep it in the range of the sums.
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c), _mm512_set1_ps(inverse)));
    v = _mm512_max_epi32(v, _mm512_set1_epi32(-127));
    total = _mm512_add_epi32(total, v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), _mm512_cvtepi32_epi8(v));
  }
  return _mm512_reduce_add_epi32(total);
}

// out[place(c)] = in[c] of 64 bytes.
template <class Format>
inline void permute(const int8_t* in, void* out) {
  static const __m512i order = [] {
    alignas(64) uint8_t from[64];
    for (int c = 0; c < 64; ++c) from[Format::place(c)] = uint8_t(c);
    return _mm512_load_si512(from);
  }();
  _mm512_storeu_si512(out, _mm512_permutexvar_epi8(order, _mm512_loadu_si512(in)));
}

}  // namespace
}  // namespace quip
