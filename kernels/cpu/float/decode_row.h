// SPDX-License-Identifier: Apache-2.0
// Decodes one row of a quantized weight to floats, still rotated, for an embedding.
#pragma once
#include <algorithm>

#include "decode_lattice.h"
#include "decode_trellis.h"

namespace quip {
namespace {

// A row costs the decoding of sixteen: a trellis tile is one sequence, and AVX2 decodes the lattice in vectors of rows.
inline void decode_row(const Weight& w, int64_t row, float* out) {
  if (w.code == Code::kE8p) {
    alignas(64) float rows[kTile * kPanelColumns];
    for (int64_t c = 0; c < w.k; c += kPanelColumns) {
      const int columns = int(std::min<int64_t>(kPanelColumns, w.k - c));
      decode_lattice(w, row / kTile * kTile, c, columns, rows, kPanelColumns);
      std::copy_n(rows + row % kTile * kPanelColumns, columns, out + c);
    }
    return;
  }
  alignas(64) float tile[kTile * kTile];
  const TileDecoder decode = tile_decoder(w.code, w.bits);
  const float* wanted = tile + row % kTile * kTile;
  for (int64_t c = 0; c < w.k; c += kTile) {
    decode(tile_at(w, row, c), w.table, tile, kTile, w.order);
    std::copy(wanted, wanted + kTile, out + c);
  }
}

}  // namespace
}  // namespace quip
