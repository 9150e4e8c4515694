// SPDX-License-Identifier: Apache-2.0
// The product for many rows of x: a thread block decodes its tiles once for up to 256 rows. Its eight warps decode a share
// each, and put the fragments into shared memory; each multiplies half of the tiles with a quarter of the rows.
//
//   shared memory  tables | x of a chunk [row] | x of the next | fragments [tile][half][stage of the code][multiplication]
//
// While a chunk is multiplied, a warp decodes its share of the next into registers, and the x of that is copied. The packed
// words come from memory straight into registers, two chunks ahead, for a warp alone reads them.
//
// The grid is (blocks of outputs, splits of k, row blocks). An output's products are added in the order of k, from a split's
// first to its last, which is not the order of decode_gemm: there two warps take every other chunk.
#pragma once
#include "kernels.h"

namespace quip {

// A block's part is looked up by its number along the outputs.
inline int place_parts(Gemm& g, int tiles_of_block) {
  int blocks = 0;
  for (int s = 0; s < g.parts; ++s) {
    g.part[s].first_block = blocks;
    blocks += (g.part[s].end_tile - g.part[s].first_tile + tiles_of_block - 1) / tiles_of_block;
  }
  return blocks;
}
DEVICE int part_of_block(const Gemm& g) {
  int s = 0;
  while (s + 1 < g.parts && int(blockIdx.x) >= g.part[s + 1].first_block) ++s;
  return s;
}

// What a thread block multiplies, and where a thread finds its share. Rows lie `pitch` apart from a chunk to the next.
template <class Code>
struct WideBlock {
  static constexpr int kRow = row_bytes(Code::kOrder), kWords = Code::bits * kLanes, kThreads = kWideWarps * kLanes;
  int tile0, end_tile, row0, rows, pitch, chunks;
  const uint32_t* packed;     // of the tile that this warp decodes
  const unsigned char* from;  // this thread's part of the first chunk's x

  DEVICE WideBlock(const Gemm& g, int s, int tiles, bool padded) {
    end_tile = g.part[s].end_tile;
    tile0 = g.part[s].first_tile + (int(blockIdx.x) - g.part[s].first_block) * tiles;
    row0 = blockIdx.z * g.row_block, rows = min(g.row_block, g.m - row0), pitch = padded ? g.row_block : rows;
    const int begin = blockIdx.y * g.split_chunks, tile = min(tile0 + device::warp_index() % tiles, end_tile - 1);
    chunks = min(g.split_chunks, g.chunks - begin);
    packed = g.packed + (int64_t(tile) * g.chunks + begin) * kWords;
    from = g.x + (int64_t(row0) * g.chunks + int64_t(begin) * pitch) * kRow + threadIdx.x * 16;
  }

  // A chunk's words; behind the last those of the last.
  DEVICE void fetch(int chunk, typename Code::Words& words) const {
    device::load_words<Code::bits>(packed + int64_t(min(chunk, chunks - 1)) * kWords, device::lane_index(), words);
  }

  // Starts to copy the x of a chunk, if there is one.
  DEVICE void copy(int chunk, unsigned char* to) const {
    if (chunk < chunks) {
      const unsigned char* const x = from + int64_t(chunk) * pitch * kRow;
#pragma unroll 4
      for (int i = 0; i < pitch * kRow - int(threadIdx.x) * 16; i += kThreads * 16)
        device::copy_async(to + threadIdx.x * 16 + i, x + i);
    }
    device::copy_commit();
  }

  // Writes the sums of a tile with rows first_row, first_row + step and so on, eight each.
  template <int kColumnTiles>
  DEVICE void write(const Gemm& g, int tile, int first_row, int step,
                    const float (&sums)[Code::kSums][kColumnTiles][4]) const {
    if (tile >= end_tile) return;
    const int width = kTile * g.tiles, lane = device::lane_index();
    float* const to = g.partial + (int64_t(blockIdx.y) * g.m + row0) * width + tile * kTile + lane / 4;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = step * c + first_row + lane % 4 * 2 + i % 2;
        float value = sums[0][c][i];
        if constexpr (Code::kSums > 1) value = fmaf(Code::kSecond, sums[Code::kSums - 1][c][i], value);
        if (row < rows) to[int64_t(row) * width + i / 2 * 8] = value;
      }
    }
  }
};

template <class Code>
struct Wide {
  static constexpr int kTiles = kWideWarps / Code::kSums;  // of a thread block
  static constexpr int kOwn = kTiles / 2;                  // that a warp multiplies
  static constexpr int kHalves = 2 / Code::kSums;          // of a tile's chunk that a warp decodes
  static constexpr int kFragment = 16 * kLanes, kFragments = kWideWarps * 4 * kFragment;  // bytes
  static constexpr int kColumnTiles = kWideRows / 32;                                     // 32 rows apart
  using Decoded = uint32_t[kHalves][Code::kSums][2][4];
  using Sums = float[kOwn][Code::kSums][kColumnTiles][4];

  static int shared_bytes(int rows) { return Code::kTableBytes + 2 * rows * row_bytes(Code::kOrder) + kFragments; }

  // This warp's share of a chunk: of a code of one stage a tile, of one with two half of it.
  DEVICE static void decode(const Code& code, typename Code::Words& words, int warp, Decoded& a) {
    Code::follow(words);
    if constexpr (kHalves == 2) {
      code.template decode<0>(words, a[0]);
      code.template decode<1>(words, a[1]);
    } else if (warp < kTiles) {
      code.template decode<0>(words, a[0]);
    } else {
      code.template decode<1>(words, a[0]);
    }
  }

  DEVICE static unsigned char* fragment(unsigned char* first, int tile, int half, int stage, int mul) {
    return first + (((tile * 2 + half) * Code::kSums + stage) * 2 + mul) * kFragment + device::lane_index() * 16;
  }

  DEVICE static void store(const Decoded& a, unsigned char* fragments, int warp) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int i = 0; i < 2 * Code::kSums; ++i) {
        const uint32_t (&four)[4] = a[h][i / 2][i % 2];
        device::store16(fragment(fragments, warp % kTiles, h + warp / kTiles, i / 2, i % 2),
                        {four[0], four[1], four[2], four[3]});
      }
    }
  }

  // Adds the products of a chunk. x: of this warp's first rows.
  DEVICE static void multiply(unsigned char* fragments, const unsigned char* x, int column_tiles, int warp,
                              Sums& sums) {
    constexpr int kStep = 32 * row_bytes(Code::kOrder);
    const int lane = device::lane_index();
    const int at = lane / 4 * row_bytes(Code::kOrder) + lane / 4 % 2 * kBlock + lane % 4 * 16;
#pragma unroll 1  // twice as many loads ahead of their use would not fit in registers
    for (int half = 0; half < 2; ++half) {
      device::Uint4 b[kColumnTiles] = {};
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        if (c < column_tiles) b[c] = device::load16(x + (at ^ half * kBlock) + c * kStep);
      }
#pragma unroll
      for (int i = 0; i < kOwn * Code::kSums * 2; ++i) {
        const int r = i / (2 * Code::kSums), stage = i / 2 % Code::kSums, mul = i % 2;
        const auto four = device::load16(fragment(fragments, warp / 4 * kOwn + r, half, stage, mul));
        const uint32_t a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          if (c >= column_tiles) continue;
          device::multiply_add(sums[r][stage][c], a, mul ? b[c].z : b[c].x, mul ? b[c].w : b[c].y);
        }
      }
    }
  }
};

template <class Code>
KERNEL(kWideWarps * kLanes) wide_gemm_kernel(const Gemm g) {
  SHARED(memory);
  using W = Wide<Code>;
  const int warp = device::warp_index(), s = part_of_block(g), row = row_bytes(Code::kOrder);
  const void* table = static_cast<const char*>(g.table) + s * g.table_stride;
  const Code code(memory, table);
  const WideBlock<Code> block(g, s, W::kTiles, false);
  unsigned char* const x = memory + Code::kTableBytes;
  unsigned char* const fragments = x + 2 * g.row_block * row;
  const auto x_of = [&](int chunk) { return x + chunk % 2 * g.row_block * row; };
  const int first_row = warp % 4 * 8, column_tiles = (block.rows - first_row + 31) / 32;
  typename W::Sums sums = {};
  typename W::Decoded a;
  typename Code::Words words;
  device::start_next();
  block.fetch(0, words);
  Code::fill(memory, table);
  device::wait_for_writes();
  block.copy(0, x);
  device::sync_block();
  W::decode(code, words, warp, a);
  block.fetch(1, words);
  for (int chunk = 0; chunk < block.chunks; ++chunk) {
    device::copy_wait<0>();
    device::sync_block();  // the chunk's x is there, and nobody reads that of the chunk before, or its fragments
    block.copy(chunk + 1, x_of(chunk + 1));
    W::store(a, fragments, warp);
    device::sync_block();
    if (chunk + 1 < block.chunks) {
      W::decode(code, words, warp, a);
      block.fetch(chunk + 2, words);
    }
    W::multiply(fragments, x_of(chunk) + first_row * row, column_tiles, warp, sums);
  }
#pragma unroll
  for (int r = 0; r < W::kOwn; ++r) block.write(g, block.tile0 + warp / 4 * W::kOwn + r, first_row, 32, sums[r]);
}

template <class Code>
std::string run_wide(Gemm g, device::Stream stream) {
  const int blocks = place_parts(g, Wide<Code>::kTiles);
  const dim3 grid(blocks, g.splits, (g.m + g.row_block - 1) / g.row_block);
  return LAUNCH(wide_gemm_kernel<Code>, grid, kWideWarps * kLanes, Wide<Code>::shared_bytes(g.row_block), stream, g);
}

}  // namespace quip
