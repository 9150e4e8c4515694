// SPDX-License-Identifier: Apache-2.0
// What the bindings call: the launches of a linear layer and of the quantizer's searches, in raw pointers. Each returns
// an empty string, or an error.
// The launch between the rotations, one per code and bit width, is in decode_gemm.h.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "../dtype.h"
#include "device.h"
#include "thread_block.h"

namespace quip {

// A transform of each run of q * p elements of a row, H_q kron S_p. base is the transpose of H_q, float [q][q], where q
// is 1 or a multiple of 4, as for every Hadamard matrix.
struct Rotation {
  const float* base;
  int q, p;
};

// A row that an expert multiplies. Rows lie in the order of the experts, those of one in blocks of at most so many.
struct RoutedRow {
  int result;       // its number in ids, and in y
  int expert;       // -1: there is none of that number, and the result is NaN
  int first, rows;  // of its block; no rows: it names no expert, and the result is 0
};

// ids [count] -> the rows in this order, and where blocks of them begin.
struct Route {
  const int64_t* ids;
  int count, experts, row_block;
  RoutedRow* rows;  // [count]
  int* blocks;      // [block_count]: the first row of each, and -1 behind the last
  int block_count;  // the most that there can be
};

// x [m][k], or [m / results][k] -> activations of decode_gemm, and one scale and one sum per row.
struct RotateIn {
  const void* x;
  Type type;
  const float* su;  // [k], or [experts][k]
  Rotation rotation;
  int m, k, chunks;
  XOrder order;
  int row_block;            // rows that lie together in out
  bool columns;             // whether in columns of 8 numbers, for wgmma_gemm
  int slices;               // 1 or kSlices (rotation.cu), which divides p; with int8 1
  bool early;               // whether decode_gemm may start as early as it can, see there
  int growth;               // log2 of q p, rounded up
  unsigned char* out;       // layout.h
  float* scales;            // [m]: rotated x = scale * out
  int64_t* totals;          // [m][slices]: sums of out, exact: of int8, or in units of 2^-24
  float* scratch;           // [m][slices][work] where shared memory is too small, else null
  int work;                 // floats of a slice: k / slices, twice that if q > 1
  const RoutedRow* routed;  // [m], or null where there are no experts, as below
  int results;              // of a row of x
  void* y;                  // [m][n] of x's type: where it writes the rows that name no expert
  int n;
};

// Where sums become outputs (output.h).
struct Output {
  float offset;           // what the code's numbers are too large by
  const float* scales;    // [m], of rotate_in
  const int64_t* totals;  // [m][slices], of rotate_in
  int slices;
  const float* sv;   // [n], or [experts][n]
  const void* bias;  // [n], or null
  void* y;           // [m][n]
  Type bias_type, type;
  int n;
  const RoutedRow* routed;  // as in RotateIn
};

// The tiles of a part of the layer. Those of a thread block belong to one part.
struct Part {
  int first_block, first_tile, end_tile;
};

// partial[split][m][16 * tiles] = packed times x over the split's chunks. If there is one split, and the output
// rotation is within what a thread block has, it writes the outputs instead.
struct Gemm {
  const uint32_t* packed;  // layout.h
  const unsigned char* x;
  const void* table;        // of the code: [parts] for HYB, one for LUT and lattice, else null
  int64_t table_stride;     // bytes from a part's table to the next
  const RoutedRow* routed;  // as in RotateIn
  const int* blocks;        // of rows, as in Route
  int block_count;
  int64_t expert_words, expert_table;  // words of packed and bytes of table from an expert's to the next
  RotateIn in;         // with an x where this is the only launch: thread blocks rotate what they multiply, and
                       // totals is [blocks of outputs][m][splits]
  uint32_t* arrivals;  // [blocks of outputs], 0 before: the last block of a few outputs to come adds the parts of
                       // k, in order, if there are several
  float* partial;      // the bits of int32 for int8 activations
  int m, tiles, chunks;
  int splits, split_chunks;  // of k, and the chunks of each but the last: a multiple of what a stage takes
  int warps_n, depth;        // thread_block.h
  int row_block;             // rows of x that a thread block has at most; of wide_gemm a multiple of 8
  int parts;
  Part part[kMaxParts];
  int width;  // p of every part's output rotation, which the epilogue applies, or 0: it writes partial
  float unit;
  Output out;
};

// y [m][n] = sv * H(unit * (sum of the splits - offset * total)) * scale + bias, for each part.
struct RotateOut {
  const float* partial;
  int splits, m, stride;  // floats from a row of partial to the next
  int64_t split_stride;
  bool integers;
  Output out;
  int slices;  // 1 or kSlices (rotation.cu), which divides every p and start
  int parts;
  struct RotatedPart {
    Rotation rotation;
    int start, size;  // in y, and in partial
    float unit;       // with the rotation's norm
  } part[kMaxParts];
  float* scratch;  // [m][parts][slices][work] where shared memory is too small, else null
  int work;        // floats of a slice of the largest part
};

// Rows ids[0..m) of the weight, decoded, float [m][k], less the code's offset. An id that is not there makes the row's
// scale a NaN.
struct DecodeRows {
  const int64_t* ids;
  const uint32_t* packed;  // layout.h
  const void* table;
  const float* sv;  // [rows]
  int64_t rows;
  int m, k, chunks;
  float offset;
  float* out;
  float* scales;  // [m]: sv of the row
};

// The whole weight, decoded, less the code's offset: fp16 [16 * tiles][64 * chunks].
struct DecodeDense {
  const uint32_t* packed;  // layout.h
  const void* table;
  int64_t table_stride;
  int tiles, chunks;
  float offset;
  uint16_t* out;
  int parts;
  Part part[kMaxParts];
};

constexpr int kSequence = 256;  // weights of a trellis sequence
constexpr int kStates = 65536;  // of the trellis

// Tail-biting searches of trellis sequences.
struct EncodeTrellis {
  const float* targets;  // [count][256]
  const float* values;   // [dim][65536]: of each state
  int count, step_bits, dim;
  int blocks;         // thread blocks, which take the sequences in turn
  uint32_t* choices;  // each has its own: search_memory
  float* costs;
  int32_t* states;  // [count][256 / dim]
};
struct SearchMemory {
  int blocks;
  int64_t choices, costs;
};
SearchMemory search_memory(int step_bits, int dim, int64_t count);

// Codes [count] of x [count][8]; encode_lattice fills in the rows of the codebook.
struct EncodeLattice {
  const float* x;
  int64_t count;
  int16_t* codes;
  uint32_t rows[256];  // twice the absolute values, 3 bits each, and from bit 24 on whether component 7 is negative
};

std::string encode_trellis(const EncodeTrellis& e, device::Stream stream);
std::string encode_lattice(EncodeLattice e, device::Stream stream);

// A kernel for many rows; null where there is none. shared: bytes of a thread block, 0 where it cannot have so many rows.
struct WideEntry {
  std::string (*run)(Gemm, device::Stream);
  int (*shared)(int rows);
};

// Those that multiply asynchronously, by code and bits (wgmma.cu).
using WgmmaKernels = std::map<std::pair<std::string, int>, WideEntry>;
inline WgmmaKernels& wgmma_kernels() {
  static WgmmaKernels all;
  return all;
}

std::string route(const Route& r, device::Stream stream);
std::string rotate_in(const RotateIn& r, device::Stream stream);
std::string rotate_out(const RotateOut& r, device::Stream stream);

// Thread blocks that a row's rotation is cut in, where it can be.
constexpr int kSlices = 8;

// Shared memory above which rotations work in global memory: what every supported GPU lends a block.
constexpr int kSharedLimit = 99 * 1024;

}  // namespace quip
