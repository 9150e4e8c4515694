// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of one instruction-set tier, as a table of functions. tier.cpp fills one table a translation unit;
// bindings.cpp picks a table at run time. Raw pointers only; all pointers are to contiguous memory, 4-byte aligned.
#pragma once
#include <cstdint>

namespace quip {

constexpr int kTile = 16;         // rows and columns of a trellis tile, and the rows of one decoded panel
constexpr int kPanelColumns = 256;  // columns decoded at once: 16 x 256 floats stay in the first-level cache
constexpr int kSequence = 256;    // weights in a trellis sequence
constexpr int kStates = 65536;    // trellis states (16 bits)
constexpr int64_t kChunk8 = 16384;  // columns whose products with int8 activations surely sum to 32 bits
constexpr int kCosts = kStates + 16 * 32;  // room of a cost array (viterbi.h)

enum class Code { kOneMad, kThreeInst, kHyb, kLut };

enum class Type { kFloat, kHalf, kBfloat };

// A quantized weight (n, k).
struct Weight {
  const int16_t* packed;  // trellis, as in the checkpoint: [n/16, k*bits]; null for the lattice
  const uint8_t* blocks;  // lattice: as the tier lays it out (lattice_layout.h); null for the trellis
  const float* lut;       // HYB: [512, 2] of these rows; LUT: [65536]; else null
  Code code;
  int bits;
  int64_t n, k;
  // With int8 activations the table holds integers, value / lut_unit.
  const uint8_t* lut8 = nullptr;   // HYB: [2, 512], component by component, + 128
  const int16_t* lut16 = nullptr;  // LUT: [65537], the last one not used
  float lut_unit = 1;
  bool lut_grid = false;  // HYB: the table is a grid (formats/trellis_codes.py), its integers even
};

// An orthonormal transform of each run of q*p elements: Hadamard of size p (a power of two) along the fast axis, then
// base (q x q, row-major) along the slow one.
struct Rotation {
  const float* base;
  int64_t q, p;
};

struct Kernels {
  const char* name;
  // out[0..k) = rotation of x * su; x has k elements of `type`; scratch holds q*p floats.
  void (*rotate_in)(const void* x, Type type, const float* su, int64_t k, Rotation rotation, float* out, float* scratch);
  // out = sv * rotation of row[0..n), as `type`; row is overwritten.
  void (*rotate_out)(float* row, int64_t n, Rotation rotation, const float* sv, Type type, void* out, float* scratch);
  // Floats: y[r, row0 + i] = sum_c W[row0 + i, c] x[r, c] for one panel of up to 16 rows of W. x has `stride` floats a
  // row, zero beyond k up to the next multiple of 16. The sum of an element does not depend on m.
  void (*panel)(const Weight& w, int64_t row0, const float* x, int64_t stride, int64_t m, float* y, int64_t y_stride);
  // Int8 activations (int8.h); these are null where the tier has none.
  bool (*int8_takes)(const Weight& w);
  int64_t (*int8_bytes)(const Weight& w, int64_t m);  // of m rows of x
  // Row r of m rows: x, zero beyond k up to the next multiple of 64, to int8 somewhere in out; totals: one a kChunk8 columns.
  void (*int8_quantize)(const Weight& w, const float* x, int64_t r, int64_t m, int8_t* out, float* scale, int32_t* totals);
  // As panel, for 32 rows of W; scales [m], totals [m][chunks].
  void (*int8_panel)(const Weight& w, int64_t row0, const int8_t* x, const float* scales, const int32_t* totals, int64_t m,
                     float* y, int64_t y_stride);
  // Tail-biting Viterbi search of sequences: targets[count][256], values[V][65536], states out [count][256/V].
  void (*viterbi)(const float* targets, int64_t count, const float* values, int step_bits, int vector_dim, int32_t* states);
  // Exact nearest E8P code of x[8].
  int16_t (*nearest)(const float* x);
  // out[k] = row `row` of the weight, decoded.
  void (*decode_row)(const Weight& w, int64_t row, float* out);
  // The bytes of a lattice weight's blocks, and its rows row0 .. row0 + rows - 1 to them (lattice_layout.h).
  int64_t (*lattice_bytes)(int64_t n, int64_t k, int bits);
  void (*put_rows)(const int16_t* codes, const void* second, int64_t row0, int64_t rows, int64_t k, int bits, uint8_t* blocks);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // the rest exist where kernels/build.py builds them: on x86-64
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* amx_kernels();
const Kernels* amx_emulated_kernels();

}  // namespace quip
