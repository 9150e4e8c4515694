// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of one instruction-set tier, as a table of functions. Each object of tier.cpp has one table, and
// tiers.cpp chooses among them at run time. All pointers are to contiguous memory, aligned to the size of its items.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "codes.h"

namespace quip {

constexpr int kTile = 16;                  // rows and columns of a trellis tile, and rows of a panel of floats
constexpr int kPanelColumns = 256;         // columns decoded at once: 16 x 256 floats stay in the first-level cache
constexpr int kSequence = 256;             // weights of a trellis sequence
constexpr int kStates = 65536;             // states of the trellis (16 bits)
constexpr int64_t kChunk8 = 16384;         // columns whose products with int8 activations are sure to sum to 32 bits
constexpr int kCosts = kStates + 16 * 32;  // room of an array of costs (place() in search/viterbi.h)

// The order of the weights of a tile (formats/tile.py). In a swapped one (3INST, MCG and MUL1) the two quarters off the
// diagonal have changed places.
enum class TileOrder { kOurs, kSwapped, kByRows };

// A quantized weight of n rows and k columns.
struct Weight {
  const uint8_t*
      packed;  // trellis codes: int16 [n/16, k*bits] as in the checkpoint; a half rate: float/decode_trellis.h; the
               // lattice: blocks (lattice_layout.h)
  const float* table;  // HYB: [512, 2]; LUT and TABLE: [65536]; PAIRS: [65536, 2]; others: null
  Code code;
  int bits;
  int64_t n, k;
  // The table as integers, value / unit, for int8 activations.
  const uint8_t* table8 = nullptr;   // HYB: [2, 512], component by component, + 128
  const int16_t* table16 = nullptr;  // LUT and TABLE: [65537], of which the last is not used; PAIRS: [65536, 2]
  float unit = 1;
  bool grid = false;  // HYB: whether the table is a grid (formats/trellis_codes.py) whose integers are even
  TileOrder order = TileOrder::kOurs;
};

// An orthonormal transform of each run of q*p elements: Hadamard of size p (a power of two) along the fast axis, then
// base (q x q, row-major) along the slow one.
struct Rotation {
  const float* base;
  int64_t q, p;
};

// Floats of scratch that a rotation wants, for the matrix and a few columns; what lies behind them stays aligned.
inline int64_t rotation_scratch(int64_t q) { return q > 1 ? (q * (q + 16) + 15) / 16 * 16 : 0; }

struct Kernels {
  const char* name;
  // out[0..k) = rotation of x * su. x has k elements of `type`; scratch holds rotation_scratch(q) floats.
  void (*rotate_in)(const void* x, Type type, const float* su, int64_t k, Rotation rotation, float* out,
                    float* scratch);
  // out = sv * rotation of row[0..n), as `type`. The row is overwritten.
  void (*rotate_out)(float* row, int64_t n, Rotation rotation, const float* sv, Type type, void* out, float* scratch);
  // y[r, row0 + i] = sum_c W[row0 + i, c] x[r, c] in floats, for a panel of up to 16 rows of W. A row of x has `stride`
  // floats, which are zero from k up to the next multiple of 16. The sum of an element does not depend on m.
  void (*panel)(const Weight& w, int64_t row0, const float* x, int64_t stride, int64_t m, float* y, int64_t y_stride);
  // The product with int8 activations (int8/): whether the tier has it for a format, and the bytes of m rows of x.
  bool (*int8_takes)(Code code, TileOrder order, int bits) = nullptr;
  int64_t (*int8_bytes)(const Weight& w, int64_t m) = nullptr;
  // Row r of m rows of x to int8, at the format's place in `out`. x is zero from k up to the next multiple of 64.
  // totals has one sum per kChunk8 columns.
  void (*int8_quantize)(const Weight& w, const float* x, int64_t r, int64_t m, int8_t* out, float* scale,
                        int32_t* totals) = nullptr;
  // As panel, for 32 rows of W; scales [m], totals [m][chunks].
  void (*int8_panel)(const Weight& w, int64_t row0, const int8_t* x, const float* scales, const int32_t* totals,
                     int64_t m, float* y, int64_t y_stride) = nullptr;
  // Tail-biting search: targets [count][256], values [vector_dim][65536], states out [count][256 / vector_dim].
  void (*encode_trellis)(const float* targets, int64_t count, const float* values, int step_bits, int vector_dim,
                         int32_t* states);
  // The exact nearest E8P code of x[8].
  int16_t (*encode_lattice)(const float* x);
  // out[0..k) = a row of the weight, decoded and still rotated.
  void (*decode_row)(const Weight& w, int64_t row, float* out);
  // The bytes of a lattice weight's blocks; rows row0 .. row0 + rows - 1 of its codes to them (lattice_layout.h).
  int64_t (*lattice_bytes)(int64_t n, int64_t k, int bits);
  void (*put_rows)(const int16_t* codes, const void* second, int64_t row0, int64_t rows, int64_t k, int bits,
                   uint8_t* blocks);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // this one and the following exist on x86-64
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* amx_kernels();
const Kernels* amx_emulated_kernels();

}  // namespace quip
