// SPDX-License-Identifier: Apache-2.0
// How weights and activations lie in memory, for kernels, host code and tests. quip_vllm/ops/cuda_layout.py writes
// both.
//
// The weight is cut in tiles of 16 rows and in chunks of 64 columns, padded with zero bits to whole ones.
//
//   packed[tile][chunk][part][lane 0..31][word of the part]      uint32: 16 rows x 64 columns are 32 * bits words
//
// The `bits` words of a lane are as many fours as there are, then a two, then a one. Each is one load.
//
// In mma.m16n8k16 the weight is operand A, and lane 4 g + t holds rows g and g + 8. A chunk is two halves of 32
// columns. In a half, a lane decodes columns 8 t .. 8 t + 7 of a lattice. Of a trellis it decodes columns 16 (t / 2) +
// 4 (t % 2) + 0..3 and the 4 that lie 8 further, which are 16 positions in a row. Of a trellis with tiles by rows it
// decodes columns 16 t + 8 h .. + 7 of the chunk in half h: a row of tile t is 16 positions. trellis_stream.h and
// code_e8p.h draw the bits.
//
// Rotated activations are what operand B reads. A row of a chunk has blocks of 64 bytes: a half is one block in fp16,
// and two in int8. A block has 16 bytes for each t = 0..3, the B registers of two multiplications. Rows come in blocks
// of 64.
//
//   x[row block][chunk][row][block ^ (row & 1)][t][16 bytes]     the exclusive or keeps shared memory free of conflicts
//   of wgmma_gemm, whose row blocks are padded to one size
//   x[row block][chunk][column of 8: half, multiplication, register][row][t][4 bytes]
//
//   columns of a half  trellis, fp16   16 bytes = multiplication 0, 1; register 0, 1; column c + 2 mul + 8 reg + 0, 1
//                      lattice, fp16   16 bytes = columns 8 t .. 8 t + 7
//                      tiles by rows   16 bytes = columns 16 t + 8 h .. + 7 of the chunk
//                      trellis, int8   16 bytes = i 0, 1; register 0, 1; column c + 2 (block % 2) + 8 reg + i, 4 times
//                      of which c = 16 (t / 2) + 4 (t % 2)
#pragma once
#include <cstdint>

namespace quip {

constexpr int kTile = 16;   // rows of a tile
constexpr int kChunk = 64;  // columns of a chunk
constexpr int kLanes = 32;
constexpr int kBlock = 64;     // bytes of a block of x
constexpr int kMaxParts = 16;  // of a layer

// kRows: x as a matrix, for a product that is not ours: [row][64 * chunks] in fp16.
enum class XOrder : int { kTrellis, kTilesByRows, kLattice, kBytes, kRows };

// The order of the weights of a tile (formats/tile.py).
enum class TileOrder { kOurs, kSwapped, kByRows };

// Bytes of a row of x in a chunk.
constexpr int row_bytes(XOrder order) { return order == XOrder::kBytes ? 4 * kBlock : 2 * kBlock; }

// Operand B of an asynchronous product as the instruction has it: cores of 8 rows of 16 bytes, 128 bytes in all, from an
// address in shared memory; `leading` bytes from a core's eight columns of k to the next eight, `stride` to the next rows.
constexpr uint64_t matrix_of(uint32_t address, int leading, int stride) {
  return uint64_t(address >> 4 & 0x3FFF) | uint64_t(leading >> 4 & 0x3FFF) << 16 | uint64_t(stride >> 4 & 0x3FFF) << 32;
}

}  // namespace quip
