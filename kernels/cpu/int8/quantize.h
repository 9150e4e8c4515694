// SPDX-License-Identifier: Apache-2.0
// A rotated row of x to int8 with one scale, x = scale * q, in the order of the format that multiplies it.
#pragma once
#include "formats.h"
#if defined(QUIP_INT8)
#include <algorithm>
#include <cmath>

#include "../vector.h"

namespace quip {
namespace {

// Columns of one row of x as int8 to its quads, which lie `step` apart.
template <class Format>
inline void store_quads(const int8_t* q, int64_t columns, int32_t* out, int64_t step) {
  if constexpr (Format::kTabulated) {
    Format::arrange(q, columns, out);
  } else if constexpr (Format::kRepeat == 4) {
    for (int64_t c = 0; c < columns; ++c) out[c * step] = int32_t(0x01010101u * uint8_t(q[c]));
  } else if constexpr (Format::kRepeat == 2) {
    for (int64_t c = 0; c < columns; ++c) out[c * step] = int32_t(0x00010001u * uint16_t(q[c]));
  } else if constexpr (is_wide<Format>()) {
    int16_t wide[kPad];
    for (int64_t c = 0; c < columns; c += kPad) {
      for (int i = 0; i < kPad; ++i) wide[Format::place(i)] = q[c + i];
      for (int i = 0; i < kPad / 2; ++i) std::memcpy(out + (c / 2 + i) * step, wide + 2 * i, 4);
    }
  } else {
    alignas(64) int32_t quads[kPad / 4];
    for (int64_t c = 0; c < columns; c += kPad) {
      permute<Format>(q + c, quads);
      for (int i = 0; i < kPad / 4; ++i) out[(c / 4 + i) * step] = quads[i];
    }
  }
}

// The same to its row of tiles of 16 rows x 16 quads.
template <class Format>
inline void store_tiled(const int8_t* q, int64_t columns, int32_t* out) {
  for (int64_t c = 0; c < columns; c += kPad) permute<Format>(q + c, out + c * (kTile / 4));
}

// The largest magnitude of x[0..count), as the bits of a float, so that a NaN is above infinity.
inline uint32_t largest_bits(const float* x, int64_t count) {
  Words top = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Words bits = load<Words>(x + c) & 0x7FFFFFFFu;
    top = bits > top ? bits : top;
  }
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, top[i]);
  return largest;
}

// Row r of m: x[0..k) to int8. x has padded(k) floats, zero beyond k. totals: the sum of q of each kChunk8 columns.
inline void int8_quantize(const Weight& w, const float* x, int64_t r, int64_t m, int8_t* out, float* scale,
                          int32_t* totals) {
  const int64_t columns = padded(w.k);
  const uint32_t bits = largest_bits(x, columns);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const bool finite = bits < 0x7F800000u, zero = largest < 1e-35f;
  *scale = finite ? (zero ? 0.0f : largest / 127.0f) : NAN;
  const float inverse = finite && !zero ? 127.0f / largest : 0.0f;
  int8_t q[kChunk8];
  const int64_t side_by_side = group_rows(w, m), group = r / side_by_side;
  const int64_t rows = std::min(side_by_side, m - group * side_by_side);
  for (int64_t chunk = 0; chunk * kChunk8 < columns; ++chunk) {
    const int64_t begin = chunk * kChunk8, count = std::min<int64_t>(kChunk8, columns - begin);
    totals[chunk] = round_row(x + begin, count, inverse, q);
    with_format(w, m, [&](auto* format) {
      using Format = std::remove_pointer_t<decltype(format)>;
      if constexpr (is_tiled<Format>())
        if (m > few<Format>()) {
          int32_t* tiles = reinterpret_cast<int32_t*>(out) + (r / kTile * columns + begin) * (kTile / 4);
          return store_tiled<Format>(q, count, tiles + r % kTile * kTile);
        }
      int32_t* quads = reinterpret_cast<int32_t*>(out) + quads_of<Format>(columns) * group * side_by_side;
      store_quads<Format>(q, count, quads + quads_of<Format>(begin) * rows + r % side_by_side, rows);
    });
  }
}

}  // namespace
}  // namespace quip
#endif
