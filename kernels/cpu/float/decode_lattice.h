// SPDX-License-Identifier: Apache-2.0
// Decodes sixteen rows of a lattice weight to floats, eight columns (one code per row) at a time.
#pragma once
#include <algorithm>

#include "../lattice_layout.h"
#if defined(QUIP_LATTICE_PARTS)
#include "../lattice_parts_avx2.h"
#endif

namespace quip {
namespace {

constexpr float kResidual3 = 1.0f / 2.04f, kResidual4 = 1.0f / 3.45f;

// decode_group decodes rows 16 * upper .. 16 * upper + 15 and columns 8 * group .. 8 * group + 7 of a block.
#if defined(QUIP_LATTICE_PARTS)

template <int bits, bool upper>
void decode_group(const uint8_t* block, int group, float* out, int64_t stride) {
  alignas(32) int8_t first[128], second[128];
  __m256i components[8];
  e8p_components<1, 0>(block, group, components);
  in_rows<upper>(components, first);
  if constexpr (bits == 3) {
    std::fill(components, components + 8, _mm256_setzero_si256());
    add_e81b_components(block + kE8pBytes, group, components);
  }
  if constexpr (bits == 4) e8p_components<1, 0>(block + kE8pBytes, group, components);
  if constexpr (bits > 2) in_rows<upper>(components, second);
  for (int row = 0; row < kTile; ++row) {
    const auto floats = [&](const int8_t* bytes, float unit) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * row));
      return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), _mm256_set1_ps(unit));
    };
    __m256 v = floats(first, 0.25f);
    if constexpr (bits > 2) {
      const __m256 w = floats(second, bits == 3 ? 0.5f : 0.25f);
      v = _mm256_fmadd_ps(w, _mm256_set1_ps(bits == 3 ? kResidual3 : kResidual4), v);
    }
    store(out + row * stride, v);
  }
}

#else

template <int bits, bool upper>
void decode_group(const uint8_t* block, int group, float* out, int64_t stride) {
  static_assert(kBlockRows == kTile);
  for (int row = 0; row < kTile; ++row) {
    const auto byte = [&](int plane) { return block[64 * plane + 4 * row + group]; };
    Octet v = decode_e8p(byte(0), byte(1));
    if constexpr (bits == 3) v += load<Octet>(kLattice.e81b[byte(2)]) * kResidual3;
    if constexpr (bits == 4) v += decode_e8p(byte(2), byte(3)) * kResidual4;
    store(out + row * stride, v);
  }
}

#endif

// Decodes rows row0 .. row0 + 15 and columns c0 .. c0 + columns - 1. row0 is a multiple of 16, and c0 of 8. The blocks
// have rows beyond n, too.
inline void decode_lattice(const Weight& w, int64_t row0, int64_t c0, int columns, float* out, int64_t stride) {
  const uint8_t* blocks = w.packed + row0 / kBlockRows * block_row_bytes(w.k, w.bits);
  const bool upper = row0 % kBlockRows != 0;
  const auto decode = w.bits == 2   ? (upper ? decode_group<2, true> : decode_group<2, false>)
                      : w.bits == 3 ? (upper ? decode_group<3, true> : decode_group<3, false>)
                                    : (upper ? decode_group<4, true> : decode_group<4, false>);
  for (int c = 0; c < columns; c += 8) {
    const int64_t at = c0 + c;
    decode(blocks + at / kBlockColumns * block_bytes(w.bits), int(at % kBlockColumns / 8), out + c, stride);
  }
}

}  // namespace
}  // namespace quip
