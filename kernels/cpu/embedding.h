// SPDX-License-Identifier: Apache-2.0
// One row of a quantized weight as floats, still rotated: what an embedding looks up.
#pragma once
#include <algorithm>

#include "decode_trellis.h"
#include "lattice_layout.h"

namespace quip {
namespace {

// A trellis tile is one sequence, so a row costs the decoding of its sixteen neighbours.
inline void decode_row(const Weight& w, int64_t row, float* out) {
  if (w.blocks) {
    decode_lattice(w, row, 1, 0, int(w.k), out, w.k);
    return;
  }
  alignas(64) float tile[kTile * kTile];
  const TileDecoder decode = tile_decoder(w.code, w.bits);
  const int16_t* packed = w.packed + row / kTile * w.k * w.bits;
  const float* wanted = tile + row % kTile * kTile;
  for (int64_t c = 0; c < w.k; c += kTile) {
    decode(packed + c * w.bits, w.lut, tile, kTile);
    std::copy(wanted, wanted + kTile, out + c);
  }
}

}  // namespace
}  // namespace quip
