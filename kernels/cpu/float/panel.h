// SPDX-License-Identifier: Apache-2.0
// The product in floats: 16 rows of the weight, 256 columns at a time, are decoded and multiplied.
#pragma once
#include <algorithm>

#include "decode_lattice.h"
#include "decode_trellis.h"

namespace quip {
namespace {

constexpr int kRowBlock = 4;                                     // rows of W and rows of x multiplied together
constexpr int kTogether = kRegisterBytes == 64 ? kRowBlock : 1;  // rows of x whose sums are in registers
constexpr int kRegisters = sizeof(Floats) / sizeof(RegisterFloats);

// y[r, i] += <W row i, x row r> for i < 4, r < M. Each element is summed in the same order for every M.
template <int M>
inline void multiply(const float* w, const float* x, int64_t stride, int columns, float* y, int64_t y_stride) {
  constexpr int kRows = M < kTogether ? M : kTogether;
  for (int r0 = 0; r0 < M; r0 += kRows) {
    RegisterFloats acc[kRowBlock][kRows][kRegisters] = {};
    for (int c = 0; c < columns; c += kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < kRowBlock; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kRegisters; ++v) {
            const int at = c + v * kLanes / kRegisters;
            acc[i][r][v] +=
                load<RegisterFloats>(w + i * kPanelColumns + at) * load<RegisterFloats>(x + (r0 + r) * stride + at);
          }
    for (int i = 0; i < kRowBlock; ++i)
      for (int r = 0; r < kRows; ++r) y[(r0 + r) * y_stride + i] += sum(load<Floats>(&acc[i][r]));
  }
}

inline void decode_panel(const Weight& w, TileDecoder decode, int64_t row0, int64_t c0, int columns, float* out) {
  if (w.code == Code::kE8p) return decode_lattice(w, row0, c0, columns, out, kPanelColumns);
  for (int c = 0; c < columns; c += kTile) decode(tile_at(w, row0, c0 + c), w.table, out + c, kPanelColumns, w.order);
}

inline void panel(const Weight& w, int64_t row0, const float* x, int64_t stride, int64_t m, float* y,
                  int64_t y_stride) {
  alignas(64) float weights[kTile * kPanelColumns] = {};
  float tail[kRowBlock];
  const int rows = int(std::min<int64_t>(kTile, w.n - row0));
  const TileDecoder decode = tile_decoder(w.code, w.bits);
  for (int64_t r = 0; r < m; ++r) std::fill(y + r * y_stride + row0, y + r * y_stride + row0 + rows, 0.0f);
  for (int64_t c0 = 0; c0 < w.k; c0 += kPanelColumns) {
    const int columns = int(std::min<int64_t>(kPanelColumns, w.k - c0));
    decode_panel(w, decode, row0, c0, columns, weights);
    for (int i = 0; columns % kLanes && i < rows; ++i)
      std::fill(weights + i * kPanelColumns + columns, weights + i * kPanelColumns + columns + 8, 0.0f);
    for (int64_t r = 0; r < m;) {
      const bool four = m - r >= kRowBlock;
      for (int i = 0; i < rows; i += kRowBlock) {
        const float* block = weights + i * kPanelColumns;
        float* out = y + r * y_stride + row0 + i;
        if (rows - i < kRowBlock) {  // fewer than four rows left: one row of x at a time through a small buffer
          for (int64_t j = 0; j < (four ? kRowBlock : 1); ++j) {
            std::fill(tail, tail + kRowBlock, 0.0f);
            multiply<1>(block, x + (r + j) * stride + c0, stride, columns, tail, 0);
            for (int e = 0; e < rows - i; ++e) out[j * y_stride + e] += tail[e];
          }
        } else if (four) {
          multiply<kRowBlock>(block, x + r * stride + c0, stride, columns, out, y_stride);
        } else {
          multiply<1>(block, x + r * stride + c0, stride, columns, out, y_stride);
        }
      }
      r += four ? kRowBlock : 1;
    }
  }
}

}  // namespace
}  // namespace quip
