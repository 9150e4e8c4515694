// SPDX-License-Identifier: Apache-2.0
// The linear layer with int8 activations: integer products, so a result depends neither on threads nor on other rows.
//
// A rotated row becomes int8 q with one scale: x = scale * q. Formats (int8_lattice.h, int8_trellis.h) decode a unit of 16
// rows x kColumns to kQuads vectors: lane = row of the weight, 32 bits of a lane = 4 columns as bytes (value + 128), or
// 2 as int16, or the four bytes of one 1MAD product. The activation has the same 32 bits, repeated over the lanes.
//
// With AMX (amx.h), many rows of bytes are multiplied tile by tile, and x is simply x[row][quad].
//
//   few rows    each vector is multiplied as it is decoded (up to kFew, for which the sums and the decoding have registers)
//   many rows   32 rows of the weight, 128 vectors deep, are decoded to a panel that stays in cache, then multiplied with
//               groups of up to kGroup rows of x, whose 32-bit quads lie side by side: x[group][quad][row]
#pragma once
#if defined(__AVX512VNNI__)
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "int8_lattice.h"
#include "int8_trellis.h"
#if defined(__AMX_INT8__) || defined(QUIP_AMX_EMULATED)
#define QUIP_AMX
#include "amx.h"
#endif

namespace quip {
namespace {

constexpr int kGroup = 12;       // rows of x multiplied together: 2 x 12 sums in registers
constexpr int kRowsBlock = 192;  // rows of x whose sums are kept while a panel is multiplied
constexpr int kVector = 64;      // bytes of a register

// What a format leaves unsaid has the value of most formats.
template <class Format>
constexpr int repeat_of() {
  if constexpr (requires { Format::kRepeat; }) return Format::kRepeat;
  return 1;
}
template <class Format>
constexpr bool is_wide() {
  return Format::kQuads * 2 == Format::kColumns;
}
template <class Format>
constexpr int offset_of() {
  if constexpr (requires { Format::kOffset; }) return Format::kOffset;
  return is_wide<Format>() ? 0 : kOffset8;
}

template <class F>
inline void with_bits(int bits, F f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
  }
}

// Calls f(type of the format that multiplies m rows).
template <class F>
inline void with_format(const Weight& w, int64_t m, F f) {
  with_bits(w.bits, [&](auto b) {
    constexpr int bits = decltype(b)::value;
    if (w.blocks) {
      if constexpr (bits > 1) f(static_cast<Lattice8<bits>*>(nullptr));
    } else if (w.code == Code::kHyb) {
      w.lut_symmetric ? f(static_cast<Hyb8<bits, true>*>(nullptr)) : f(static_cast<Hyb8<bits, false>*>(nullptr));
    } else if (m <= OneMad8<bits>::kFew) {
      f(static_cast<OneMad8<bits>*>(nullptr));
    } else {
      f(static_cast<OneMad16<bits>*>(nullptr));
    }
  });
}

// Up to how many rows are multiplied while decoding.
inline int few_of(const Weight& w) {
  int few = 0;
  with_format(w, 1, [&](auto* format) { few = std::remove_pointer_t<decltype(format)>::kFew; });
  return few;
}

inline bool int8_takes(const Weight& w) {
  return w.blocks || (w.bits <= 4 && (w.code == Code::kHyb || w.code == Code::kOneMad));
}

inline int64_t padded(int64_t k) { return (k + kVector - 1) / kVector * kVector; }

// Whether tiles multiply it.
template <class Format>
constexpr bool is_tiled() {
#if defined(QUIP_AMX)
  return !is_wide<Format>() && repeat_of<Format>() == 1;
#else
  return false;
#endif
}

inline int64_t group_rows(const Weight& w, int64_t m) {
  if (m <= few_of(w)) return m;
  bool tiled = false;
  with_format(w, m, [&](auto* format) { tiled = is_tiled<std::remove_pointer_t<decltype(format)>>(); });
  if (tiled) return 1;
  const int64_t groups = (m + kGroup - 1) / kGroup;
  return (m + groups - 1) / groups;
}

inline int64_t int8_bytes(const Weight& w, int64_t m) {
  int64_t bytes = 0;
  with_format(w, m, [&](auto* format) {
    using Format = std::remove_pointer_t<decltype(format)>;
    const int64_t rows = is_tiled<Format>() ? (m + 15) / 16 * 16 : m;  // the rest of the last tile is read, not used
    bytes = padded(w.k) * 4 * Format::kQuads / Format::kColumns * rows;
  });
  return bytes;
}

// Columns of one row of x as int8 to its quads, which lie `step` apart.
template <class Format>
inline void store_quads(const int8_t* q, int64_t columns, int32_t* out, int64_t step) {
  if constexpr (repeat_of<Format>() == 4) {
    for (int64_t c = 0; c < columns; ++c) out[c * step] = int32_t(0x01010101u * uint8_t(q[c]));
  } else if constexpr (is_wide<Format>()) {
    for (int64_t c = 0; c < columns; c += 2)
      out[c / 2 * step] = int32_t(uint32_t(uint16_t(q[c])) | uint32_t(uint16_t(q[c + 1])) << 16);
  } else {
    static const __m512i order = [] {
      alignas(64) uint8_t from[kVector];
      for (int c = 0; c < kVector; ++c) from[Format::place(c)] = uint8_t(c);
      return _mm512_load_si512(from);
    }();
    alignas(64) int32_t quads[16];
    for (int64_t c = 0; c < columns; c += kVector) {
      _mm512_store_si512(quads, _mm512_permutexvar_epi8(order, _mm512_loadu_si512(q + c)));
      for (int i = 0; i < 16; ++i) out[(c / 4 + i) * step] = quads[i];
    }
  }
}

// Row r of m: x[0..k) to int8. x has padded(k) floats, zero beyond k. totals: the sum of q of each kChunk8 columns.
inline void int8_quantize(const Weight& w, const float* x, int64_t r, int64_t m, int8_t* out, float* scale, int32_t* totals) {
  const int64_t columns = padded(w.k);
  __m512i top = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += kLanes)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + c), _mm512_set1_epi32(0x7FFFFFFF)));
  const uint32_t bits = _mm512_reduce_max_epu32(top);  // of floats, so a NaN is above infinity
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const bool finite = bits < 0x7F800000u, zero = largest < 1e-35f;
  *scale = finite ? (zero ? 0.0f : largest / 127.0f) : NAN;
  const __m512 inverse = _mm512_set1_ps(finite && !zero ? 127.0f / largest : 0.0f);
  int8_t q[kChunk8];
  const int64_t group = r / group_rows(w, m), rows = std::min(group_rows(w, m), m - group * group_rows(w, m));
  for (int64_t chunk = 0; chunk * kChunk8 < columns; ++chunk) {
    const int64_t begin = chunk * kChunk8, count = std::min<int64_t>(kChunk8, columns - begin);
    __m512i total = _mm512_setzero_si512();
    for (int64_t c = 0; c < count; c += kLanes) {
      // A product of zero with a NaN is no number and converts to INT_MIN: keep it in the range of the sums.
      __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + begin + c), inverse));
      v = _mm512_max_epi32(v, _mm512_set1_epi32(-127));
      total = _mm512_add_epi32(total, v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), _mm512_cvtepi32_epi8(v));
    }
    totals[chunk] = _mm512_reduce_add_epi32(total);
    with_format(w, m, [&](auto* format) {
      using Format = std::remove_pointer_t<decltype(format)>;
      constexpr int64_t kColumnsPerQuad = Format::kColumns / Format::kQuads;
      int32_t* quads = reinterpret_cast<int32_t*>(out) + padded(w.k) / kColumnsPerQuad * group * group_rows(w, m);
      store_quads<Format>(q, count, quads + begin / kColumnsPerQuad * rows + r % group_rows(w, m), rows);
    });
  }
}

template <class Format>
inline __m512i multiply_add(__m512i sum, __m512i weights, int32_t quad) {
  if constexpr (is_wide<Format>()) return _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi32(quad));
  return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(quad));
}

struct Output {
  const float* scales;
  const int32_t* totals;  // [m][chunks]
  int64_t chunks;
  float* y;
  int64_t stride;
};

// Adds the sums of one chunk to 16 outputs of row r; the last chunk applies the scale.
template <class Format>
inline void finish(const Format& format, __m512i sum, const Output& out, int64_t r, int64_t chunk, int64_t row0, int rows) {
  const __m512i offset = _mm512_set1_epi32(offset_of<Format>() * out.totals[r * out.chunks + chunk]);
  const __mmask16 valid = __mmask16((1u << rows) - 1);
  float* y = out.y + r * out.stride + row0;
  __m512 value = chunk ? _mm512_maskz_loadu_ps(valid, y) : _mm512_setzero_ps();
  value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(Format::in_row_order(_mm512_sub_epi32(sum, offset))), _mm512_set1_ps(format.unit()),
                          value);
  if (chunk + 1 == out.chunks) value = _mm512_mul_ps(value, _mm512_set1_ps(out.scales[r]));
  _mm512_mask_storeu_ps(y, valid, value);
}

template <class Format, int M>
void few_rows(const Format& format, const uint8_t* block, int64_t k, const int32_t* x, const Output& out, int64_t row0, int rows) {
  constexpr int kSplit = M == 1 ? 4 : M == 2 ? 2 : 1;  // chains of sums, to hide the latency of a multiplication
  for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
    constexpr int kSums = M * kSplit;
    __m512i sum[kSums];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
    const int64_t begin = chunk * kChunk8 / Format::kColumns;
    const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
    for (int64_t u = begin; u < end; ++u) {
      const int32_t* quads = x + u * Format::kQuads * M;
      format.decode(block + u * Format::kBytes, [&](int quad, __m512i weights) {
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
          __m512i& part = sum[r * kSplit + quad % kSplit];
          part = multiply_add<Format>(part, weights, quads[quad * M + r]);
        }
      });
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      __m512i total = sum[r * kSplit];
#pragma GCC unroll 16
      for (int i = 1; i < kSplit; ++i) total = _mm512_add_epi32(total, sum[r * kSplit + i]);
      finish(format, total, out, r, chunk, row0, rows);
    }
  }
}

template <class Format>
void few_rows_of(const Format& format, int64_t m, const uint8_t* block, int64_t k, const int32_t* x, const Output& out, int64_t row0,
                 int rows) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((m == i + 1 ? few_rows<Format, i + 1>(format, block, k, x, out, row0, rows) : void()), ...);
  }(std::make_integer_sequence<int, Format::kFew>{});
}

// sums[r][0..1] += quads of the panel (two blocks of 16 rows, kDepth quads apart) times M rows of x.
template <class Format, int M>
void multiply_panel(const __m512i* panel, int64_t depth, int64_t quads, const int32_t* x, __m512i (*sums)[2]) {
  __m512i sum[M][2];  // in registers: every loop over it is unrolled
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) sum[r][0] = sums[r][0], sum[r][1] = sums[r][1];
  for (int64_t q = 0; q < quads; ++q) {
    const __m512i first = panel[q], second = panel[depth + q];
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      sum[r][0] = multiply_add<Format>(sum[r][0], first, x[q * M + r]);
      sum[r][1] = multiply_add<Format>(sum[r][1], second, x[q * M + r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}

template <class Format>
void multiply_group(int rows, const __m512i* panel, int64_t depth, int64_t quads, const int32_t* x, __m512i (*sums)[2]) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((rows == i + 1 ? multiply_panel<Format, i + 1>(panel, depth, quads, x, sums) : void()), ...);
  }(std::make_integer_sequence<int, kGroup>{});
}

// Two blocks of 16 rows (the second may be missing) times all m rows of x.
template <class Format>
void many_rows(const Format& format, const uint8_t* const* blocks, int count, int64_t k, const int32_t* x, int64_t m,
               int64_t group, const Output& out, int64_t row0, int rows) {
  constexpr int64_t kDepth = 128, kUnits = kDepth / Format::kQuads;
  alignas(64) __m512i panel[2][kDepth];
  alignas(64) __m512i sums[kRowsBlock][2];
  const int64_t row_quads = padded(k) / Format::kColumns * Format::kQuads;
  const int64_t block_rows = kRowsBlock / group * group;
#if defined(QUIP_AMX)
  [[maybe_unused]] const TileUnit tile_unit;
#endif
  for (int64_t m0 = 0; m0 < m; m0 += block_rows) {
    const int64_t m1 = std::min(m, m0 + block_rows);
    for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
      for (int64_t r = 0; r < m1 - m0; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
      const int64_t begin = chunk * kChunk8 / Format::kColumns;
      const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
      for (int64_t u0 = begin; u0 < end; u0 += kUnits) {
        const int64_t units = std::min(kUnits, end - u0);
        for (int b = 0; b < count; ++b)
          for (int64_t u = 0; u < units; ++u)
            format.decode(blocks[b] + (u0 + u) * Format::kBytes,
                          [&](int quad, __m512i v) { panel[b][u * Format::kQuads + quad] = v; });
#if defined(QUIP_AMX)
        if constexpr (is_tiled<Format>()) {
          const int64_t quads = units * Format::kQuads, whole = (quads + 15) / 16 * 16;
          for (int b = 0; b < 2; ++b) std::fill(panel[b] + quads, panel[b] + whole, _mm512_setzero_si512());
          multiply_tiles(panel[0], kDepth, whole, x + m0 * row_quads + u0 * Format::kQuads, row_quads, m1 - m0, sums);
          continue;
        }
#endif
        for (int64_t r = m0; r < m1; r += group) {
          const int64_t in_group = std::min(group, m - r);
          const int32_t* quads = x + r * row_quads + u0 * Format::kQuads * in_group;
          multiply_group<Format>(int(in_group), panel[0], kDepth, units * Format::kQuads, quads, sums + (r - m0));
        }
      }
      for (int64_t r = m0; r < m1; ++r)
        for (int b = 0; b < count; ++b) {
          finish(format, sums[r - m0][b], out, r, chunk, row0 + b * kTile, std::min(kTile, rows - b * kTile));
        }
    }
  }
}

// Rows row0 .. row0 + 31 of the weight times m rows of x.
inline void int8_panel(const Weight& w, int64_t row0, const int8_t* x8, const float* scales, const int32_t* totals, int64_t m,
                       float* y, int64_t y_stride) {
  const int32_t* x = reinterpret_cast<const int32_t*>(x8);
  const Output out{scales, totals, (padded(w.k) + kChunk8 - 1) / kChunk8, y, y_stride};
  const int rows = int(std::min<int64_t>(2 * kTile, w.n - row0)), count = (rows + kTile - 1) / kTile;
  with_format(w, m, [&](auto* pointer) {
    using Format = std::remove_pointer_t<decltype(pointer)>;
    const Format format(w);
    const int64_t block_bytes = (w.k + Format::kColumns - 1) / Format::kColumns * Format::kBytes;
    const uint8_t* first = (w.blocks ? w.blocks : reinterpret_cast<const uint8_t*>(w.packed)) + row0 / kTile * block_bytes;
    const uint8_t* blocks[2] = {first, first + (count > 1 ? block_bytes : 0)};
    if (m <= Format::kFew) {
      for (int b = 0; b < count; ++b)
        few_rows_of(format, m, blocks[b], w.k, x, out, row0 + b * kTile, std::min(kTile, rows - b * kTile));
      return;
    }
    if constexpr (repeat_of<Format>() == 1) many_rows(format, blocks, count, w.k, x, m, group_rows(w, m), out, row0, rows);
  });
}

}  // namespace
}  // namespace quip
#endif
