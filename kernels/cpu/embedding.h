// SPDX-License-Identifier: Apache-2.0
// One row of a quantized weight as floats: decode, undo the input rotation, apply signs and scale.
#pragma once
#include <algorithm>

#include "decode_trellis.h"
#include "hadamard.h"
#include "lattice.h"

namespace quip {
namespace {

// A trellis tile is one sequence, so a row costs the decoding of its sixteen neighbours.
inline void decode_row(const Weight& w, int64_t row, float* out) {
  if (!w.packed) {
    decode_lattice_row(w, row * (w.k / 8), w.k / 8, out);
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

inline void embedding_row(const Weight& w, int64_t row, const float* su, float scale, const float* base, int64_t q,
                          int64_t p, float* scratch, float* out) {
  decode_row(w, row, out);
  hadamard(out, w.k, base, q, p, scratch);
  for (int64_t c = 0; c < w.k; ++c) out[c] *= su[c] * scale;
}

}  // namespace
}  // namespace quip
