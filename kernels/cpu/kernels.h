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
constexpr int kCosts = kStates + 16 * 32;  // room of a cost array (viterbi.h)

enum class Code { kOneMad, kThreeInst, kHyb, kLut };

// A quantized weight (n, k) as the checkpoint stores it.
struct Weight {
  const int16_t* packed;        // trellis: [n/16, k*bits]; null for the lattice
  const int16_t* codes;         // lattice: [n, k/8]
  const uint8_t* residual8;     // lattice, 3 bits: [n, k/8], else null
  const int16_t* residual16;    // lattice, 4 bits: [n, k/8], else null
  const float* lut;             // HYB: [512, 2] of these rows; LUT: [65536]; else null
  Code code;
  int bits;
  int64_t n, k;
};

struct Kernels {
  const char* name;
  // In-place orthonormal transform of each run of q*p elements of row[0..n): Hadamard of size p (a power of two) along
  // the fast axis, then base (q x q, row-major) along the slow axis. scratch holds q*p floats.
  void (*hadamard)(float* row, int64_t n, const float* base, int64_t q, int64_t p, float* scratch);
  // y[r, row0 + i] = sum_c W[row0 + i, c] x[r, c] for one panel of up to 16 rows of W. x has `stride` floats a row, zero
  // beyond k up to the next multiple of 16. The sum of an element does not depend on m.
  void (*panel)(const Weight& w, int64_t row0, const float* x, int64_t stride, int64_t m, float* y, int64_t y_stride);
  // Tail-biting Viterbi search of one sequence: target[256], values[V][65536], states out [256/V]. work: see
  // viterbi_bytes().
  void (*viterbi)(const float* target, const float* values, int step_bits, int vector_dim, int32_t* states, void* work);
  // Exact nearest E8P code of x[8].
  int16_t (*nearest)(const float* x);
  // out[k] = row `row` of the weight: decoded, transformed as by hadamard, times su[k] and scale. scratch holds q*p floats.
  void (*embedding_row)(const Weight& w, int64_t row, const float* su, float scale, const float* base, int64_t q, int64_t p,
                        float* scratch, float* out);
};

int64_t viterbi_bytes(int step_bits, int vector_dim);

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where not built
const Kernels* avx512_kernels();  // null where not built

}  // namespace quip
