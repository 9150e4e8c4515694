// SPDX-License-Identifier: Apache-2.0
// What a thread block of decode_gemm is made of. quip_vllm/ops/cuda_layout.py and cuda_shapes.py repeat the numbers
// that the choice of thread blocks needs, and a test compares them.
//
// A thread block has warps_n * kWarpsK warps. Warp (i, j) has tiles 2 i and 2 i + 1 of the block, and the chunks whose
// number is j modulo kWarpsK. In a stage of the pipeline a warp takes `depth` chunks.
#pragma once
#include "layout.h"

namespace quip {

constexpr int kWarpsK = 2;     // warps that share an output and take every other chunk
constexpr int kRowTiles = 2;   // tiles that a warp decodes side by side
constexpr int kRowBlock = 64;  // rows of x that a thread block multiplies

// The depths where there is a choice: deep spares barriers, shallow spares shared memory.
constexpr int kDeep = 4, kShallow = 2;
constexpr int kNever = 1 << 10;  // a depth that no kernel has

constexpr int kSpare = kWarpsK * kDeep;  // chunks behind a layer's last that the last stage copies and does not use

// Where decode_gemm rotates x itself: a warp rotates so many numbers, of at most so many rows.
constexpr int kRun = 128, kFewRows = 16, kMostWarps = 16;

// Experts that rows are routed to: three numbers of each lie in shared memory.
constexpr int kMostExperts = 4000;

// Rows of an expert that a thread block multiplies, where `rows` are shared by so many: most experts then have one
// block.
constexpr int64_t rows_of_expert(int64_t rows, int64_t experts) {
  return rows <= 4 * experts ? 8 : rows <= 8 * experts ? 16 : kRowBlock;
}

// wide_gemm: warps of a thread block, and the most rows of x that it multiplies.
constexpr int kWideWarps = 8, kWideRows = 256;

// Column tiles of 8 rows of x that a kernel is compiled for.
constexpr int column_tiles_of(int rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : 8; }

// 256 threads leave a thread the registers for more sums, or for more loads.
template <class Code>
constexpr int max_threads(int column_tiles) {
  return column_tiles > 2 || Code::kGathers ? 256 : 512;
}

// Thread blocks for which a multiprocessor must have registers.
template <class Code>
constexpr int least_blocks(int column_tiles, int depth) {
  return column_tiles == 1 && depth >= Code::kLightDepth ? 2 : 1;
}

// Whether depth is kShallow or kDeep; else it is 1.
template <class Code>
constexpr bool has_depths(int column_tiles) {
  return column_tiles <= 2 && Code::bits <= 4 && !Code::kGathers;
}

// Whether a code has kernels that are a layer's only launch: shallow ones, where weights are few enough for launches to
// count. int8 activations take the largest of the whole rotated row, which no thread block has. Models with tiles by rows
// are not rotated in blocks.
template <class Code>
constexpr bool kCanBeAlone =
    has_depths<Code>(1) && Code::kOrder != XOrder::kBytes && Code::kOrder != XOrder::kTilesByRows;

// Whether a code has kernels for many rows: at the rates that are used most.
template <class Code>
constexpr bool kCanBeWide = Code::bits >= 2 && Code::bits <= 4 && !Code::kGathers &&
                            (Code::kOrder == XOrder::kTrellis || Code::kOrder == XOrder::kLattice);

// Whether there is a kernel for such thread blocks.
template <class Code>
constexpr bool is_compiled(int rows, int warps_n, int depth) {
  const int column_tiles = column_tiles_of(rows);
  const bool power = warps_n > 0 && (warps_n & (warps_n - 1)) == 0;
  return power && warps_n * kWarpsK * kLanes <= max_threads<Code>(column_tiles) &&
         (has_depths<Code>(column_tiles) ? depth == kShallow || depth == kDeep : depth == 1);
}

}  // namespace quip
