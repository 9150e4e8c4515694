// SPDX-License-Identifier: Apache-2.0
// The fused kernel. Packed weights are decoded to tensor-core fragments in registers, and multiplied with 1 to 64 rows
// of x. The grid is (blocks of outputs, splits of k, row blocks), and thread_block.h says what a thread block is.
//
//   stage          kWarpsK * depth chunks: each warp's own packed words, and x for all warps
//   pipeline       stages_of buffers, which asynchronous copies fill; one barrier per stage
//
//   shared memory  tables | stage 0 | stage 1 | ..        stage: words [warp][chunk][tile] | x [chunk][row]
//   of one launch  tables | RowMemory | stage 0 | stage 1 | .. | x [chunk][row]
//
// One launch for the whole layer: a thread block rotates the x of its chunks, all of it before the first stage, and the
// last of a few outputs' blocks to come adds the parts of k and rotates the outputs.
//
// The order of summation of an output depends on chunks and splits alone: neither on m nor on other rows, nor on which
// block comes last. The only atomics count blocks (and rows, in routing.cu).
#pragma once
#include <algorithm>
#include <map>
#include <string>

#include "decode_rows.h"
#include "input.h"
#include "wide_gemm.h"

namespace quip {

template <class Code>
constexpr int chunk_bytes() {
  return Code::bits * kLanes * 4;
}

// Stages of the pipeline: one is used, and the others are on their way. The largest table and 64 rows of x leave room
// for two.
template <class Code>
HOST_DEVICE constexpr int stages_of(int column_tiles) {
  return column_tiles > 2 || Code::kTableBytes > 100 * 1024 ? 2 : 3;
}

template <class Code>
HOST_DEVICE int stage_bytes(int rows, int warps_n, int depth) {
  return kWarpsK * depth * (warps_n * kRowTiles * chunk_bytes<Code>() + rows * row_bytes(Code::kOrder));
}

// Sums from a row of the exchange to the next: a block's outputs, and four more so that lanes of different rows meet in
// no bank.
HOST_DEVICE constexpr int exchange_stride(int warps_n) { return warps_n * kRowTiles * kTile + 4; }

// chunks: of x, all of which a block has at once where it is the only launch; 0 where it has those of its stages.
template <class Code>
inline int shared_bytes(int rows, int warps_n, int depth, int chunks) {
  const int x = chunks * rows * row_bytes(Code::kOrder);
  const int pipeline =
      stages_of<Code>(column_tiles_of(rows)) * stage_bytes<Code>(chunks ? 0 : rows, warps_n, depth) + x;
  const int exchange = 8 * column_tiles_of(rows) * exchange_stride(warps_n) * 4;
  return Code::kTableBytes + (chunks ? int(sizeof(RowMemory)) : 0) + (pipeline > exchange ? pipeline : exchange);
}

// Copies to shared memory, a stage at a time, what the block's warps need. A warp copies its own words, and a share of
// x.
template <class Code, int kDepth, int kColumnTiles>
struct Loader {
  static constexpr int kTileUnits = chunk_bytes<Code>() / 16;  // copies of 16 bytes for a tile's chunk
  // Of as many of a stage's chunks as warps copy in one go: two where one has half a copy left.
  static constexpr int kChunks = kRowTiles * kTileUnits % kLanes && kDepth % 2 == 0 ? 2 : 1;
  static constexpr int kUnits = kChunks * kRowTiles * kTileUnits, kCopies = (kUnits + kLanes - 1) / kLanes;
  static constexpr bool kWhole =
      kWarpsK * kDepth * row_bytes(Code::kOrder) % (16 * kLanes) == 0;  // x, in warps' copies
  const uint32_t* from[kCopies];                                        // this lane's parts of this warp's next chunks
  const unsigned char* x;                                               // this lane's part of the next stage
  int to, x_to;                                                         // bytes in a stage
  unsigned x_bytes;                                                     // of x in a stage
  int x_units;                                                          // of 16 bytes in this warp's part

  DEVICE Loader(const Gemm& g, const uint32_t* packed, int tile0, int end_tile, const unsigned char* x_, int rows,
                int begin, int warp) {
    const int lane = device::lane_index(), warps = blockDim.x / kLanes;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int unit = i * kLanes + lane,
                block = unit / kTileUnits;  // [chunk][tile]; beyond the last tile the last again
      const int64_t first = int64_t(min(tile0 + block % kRowTiles, end_tile - 1)) * g.chunks + begin + warp / g.warps_n;
      from[i] = packed + (first + block / kRowTiles * kWarpsK) * (chunk_bytes<Code>() / 4) + unit % kTileUnits * 4;
    }
    to = warp * kDepth * kRowTiles * chunk_bytes<Code>() + 16 * lane;
    x_bytes = kWarpsK * kDepth * rows * row_bytes(Code::kOrder);
    const int units = int(x_bytes) / 16, each = (units + kLanes * warps - 1) / (kLanes * warps) * kLanes,
              first = warp * each;
    x_units = min(each, units - first);
    x = x_ + int64_t(begin) * rows * row_bytes(Code::kOrder) + (first + lane) * 16;
    x_to = warps * kDepth * kRowTiles * chunk_bytes<Code>() + (first + lane) * 16;
  }

  // Copies the next stage, whole, with x or without. What lies behind a split's last chunk is not used, and packed and
  // x are longer for it.
  template <bool kX>
  DEVICE void load(unsigned char* stage) {
    load_words(stage);
    if constexpr (kX) load_x(stage);
  }

  DEVICE void load_words(unsigned char* stage) {
    unsigned char* words = stage + to;
#pragma unroll
    for (int j = 0; j < kDepth; j += kChunks) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if ((i + 1) * kLanes > kUnits && i * kLanes + device::lane_index() >= kUnits) break;
        device::copy_async(words + (j * kRowTiles * kTileUnits + i * kLanes) * 16,
                           from[i] + j * kWarpsK * (chunk_bytes<Code>() / 4));
      }
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) from[i] += kDepth * kWarpsK * (chunk_bytes<Code>() / 4);
  }

  DEVICE void load_x(unsigned char* stage) {
    unsigned char* rows = stage + x_to;
    const unsigned char* from_x = x;
    int left = x_units;
    const auto copy = [&](int i) {
      if (kWhole || left > i * kLanes + device::lane_index())
        device::copy_async(rows + i * kLanes * 16, from_x + i * kLanes * 16);
    };
    const auto advance = [&](int i) { rows += i * kLanes * 16, from_x += i * kLanes * 16, left -= i * kLanes; };
    if constexpr (kColumnTiles == 1 || (kColumnTiles == 2 && kDepth == 1)) {  // seldom more than one
      if (left > 0) copy(0);
#pragma unroll 1
      for (advance(1); left > 0; advance(1)) copy(0);
    } else {
#pragma unroll 1
      for (; left > 3 * kLanes; advance(4)) copy(0), copy(1), copy(2), copy(3);
      if (left > kLanes) copy(0), copy(1), advance(2);
      if (left > 0) copy(0);
    }
    x += x_bytes;
  }
};

template <class Code, int kColumnTiles>
struct Sums {
  typename Code::Sum of[Code::kSums][kRowTiles][kColumnTiles][4];
};

// Adds the products of half a chunk of both row tiles.
template <class Code, int half, int kColumnTiles>
DEVICE void multiply_half(const Code& code, const typename Code::Words (&words)[kRowTiles], const unsigned char* x,
                          const int (&x_row)[kColumnTiles], int column_tiles, Sums<Code, kColumnTiles>& sums) {
  uint32_t a[kRowTiles][Code::kSums][2 * Code::kVectors][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) code.template decode<half>(words[r], a[r]);
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) {
    if (kColumnTiles > 2 && c > 0 && c >= column_tiles)
      continue;  // the second of two may have no rows of an expert: its sums are not stored
#pragma unroll
    for (int v = 0; v < Code::kVectors; ++v) {
      constexpr int kFirst = half * Code::kVectors;
      const int block = kFirst + v;
      const auto b = device::load16(x + (x_row[c] ^ (block % 2 * kBlock)) + block / 2 * 2 * kBlock);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int s = 0; s < Code::kSums; ++s) {
          device::multiply_add(sums.of[s][r][c], a[r][s][2 * v], b.x, b.y);
          device::multiply_add(sums.of[s][r][c], a[r][s][2 * v + 1], b.z, b.w);
        }
      }
    }
  }
}

// Adds the sums of the warps that share outputs, in order, and writes them to partial, or what they become to y. The
// only launch writes both, y in the last block; own is its.
template <class Code, int kColumnTiles, bool kAlone>
DEVICE void store_sums(const Gemm& g, unsigned char* memory, const Sums<Code, kColumnTiles>& sums, int tile0,
                       int end_tile, int row0, int rows, const RowMemory* own) {
  using Sum = typename Code::Sum;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warp_k = warp / g.warps_n;
  const int stride = exchange_stride(g.warps_n), first = (warp - warp_k * g.warps_n) * kRowTiles * kTile;
  Sum* const exchange = reinterpret_cast<Sum*>(memory) + first;  // [row][output of this warp]
  for (int turn = kWarpsK - 1; turn >= 0; --turn) {
    if (warp_k == turn) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Sum value = sums.of[0][r][c][i];
            if constexpr (Code::kSums > 1) value = fmaf(Code::kSecond, sums.of[Code::kSums - 1][r][c][i], value);
            Sum& slot = exchange[(8 * c + lane % 4 * 2 + i % 2) * stride + r * kTile + lane / 4 + i / 2 * 8];
            slot = turn + 1 < kWarpsK ? value + slot : value;
          }
        }
      }
    }
    device::sync_block();
  }
  // From here a thread has an output, in every other row.
  const int output = tile0 * kTile + lane, end = output < end_tile * kTile ? rows : 0, width = kTile * g.tiles;
  Sum* const partial = reinterpret_cast<Sum*>(g.partial) + int64_t(row0) * width + output;
  const int64_t split_stride = int64_t(g.m) * width;
  const auto write_partial = [&] {
#pragma unroll 1
    for (int row = warp_k; row < end; row += kWarpsK)
      partial[blockIdx.y * split_stride + int64_t(row) * width] = exchange[row * stride + lane];
  };
  Output out = g.out;
  if constexpr (kAlone) {
    int64_t* const totals = g.in.totals + int64_t(blockIdx.x) * g.m * g.splits;
    out.scales = own->scales, out.totals = totals, out.slices = g.splits;
    if (out.offset != 0 && int(threadIdx.x) < rows) {
      int64_t total = 0;
      for (int i = 0; i < int(blockDim.x) / kLanes; ++i) total += own->totals[threadIdx.x][i];
      totals[int(threadIdx.x) * g.splits + int(blockIdx.y)] = total;
    }
    if (g.splits == 1) {
      device::sync_block();
    } else {
      write_partial();
      if (!device::comes_last(g.arrivals + blockIdx.x, g.splits)) return;
#pragma unroll 1
      for (int row = warp_k; row < end; row += kWarpsK) {
        Sum sum = partial[int64_t(row) * width];
#pragma unroll 4
        for (int i = 1; i < g.splits; ++i) sum = sum + partial[i * split_stride + int64_t(row) * width];
        exchange[row * stride + lane] = sum;
      }
    }
  } else if (!g.width) {
    return write_partial();
  }
  float* const v = reinterpret_cast<float*>(memory);
#pragma unroll 1
  for (int row = warp_k; row < rows; row += kWarpsK)
    v[row * stride + first + lane] = centred(out, exchange[row * stride + lane], total_of(out, row0 + row));
  device::sync_block();
  walsh<8 * kColumnTiles>(v, g.warps_n * kRowTiles * kTile, stride, g.width);
  if (output >= min(end_tile * kTile, g.out.n)) return;
#pragma unroll 1
  for (int row = warp_k; row < rows; row += kWarpsK)
    write(out, g.unit, row0 + row, output, v[row * stride + first + lane]);
}

// kAlone: the only launch of a layer, for at most kFewRows rows.
template <class Code, int kColumnTiles, int kDepth, bool kAlone>
KERNEL((max_threads<Code>(kColumnTiles)), (least_blocks<Code>(kColumnTiles, kDepth))) decode_gemm_kernel(const Gemm g) {
  SHARED(memory);
  constexpr int kStages = stages_of<Code>(kColumnTiles);
  const int lane = device::lane_index(), warp = device::warp_index(), warp_k = warp / g.warps_n;
  const int s = part_of_block(g);
  int row0 = blockIdx.z * kRowBlock, rows = min(kRowBlock, g.m - row0), expert = 0;
  if (!kAlone && g.routed) {
    device::wait_for_writes();  // only behind its own wait a kernel sees what route wrote
    row0 = g.blocks[blockIdx.z];
    if (row0 < 0) return;
    rows = g.routed[row0].rows, expert = max(g.routed[row0].expert, 0);
  }
  const void* table = static_cast<const char*>(g.table) + s * g.table_stride + expert * g.expert_table;
  const Code code(memory, table);

  const int end_tile = g.part[s].end_tile;
  const int tile0 = g.part[s].first_tile +
                    ((int(blockIdx.x) - g.part[s].first_block) * g.warps_n + warp - warp_k * g.warps_n) * kRowTiles;
  const int split = g.split_chunks, begin = min(int(blockIdx.y) * split, g.chunks);
  const int chunks = min(split, g.chunks - begin);
  constexpr int kStageChunks = kWarpsK * kDepth, kAhead = (kStages - 1) * kStageChunks;
  Loader<Code, kDepth, kColumnTiles> loader(g, g.packed + expert * g.expert_words, tile0, end_tile,
                                            g.x + int64_t(row0) * g.chunks * row_bytes(Code::kOrder), rows, begin,
                                            warp);
  const int size = stage_bytes<Code>(kAlone ? 0 : rows, g.warps_n, kDepth);
  RowMemory* const own = reinterpret_cast<RowMemory*>(memory + Code::kTableBytes);
  unsigned char* const ring = memory + Code::kTableBytes + (kAlone ? sizeof(RowMemory) : 0);

  // What is read of a stage: the warp's words, and this lane's 16 bytes of block 0 of x. Rows beyond the last are the
  // last.
  const int packed_at = warp * kDepth * kRowTiles * chunk_bytes<Code>();
  const int x_at = kAlone ? kStages * size : blockDim.x / kLanes * kDepth * kRowTiles * chunk_bytes<Code>();
  const int x_from = x_at + warp_k * rows * row_bytes(Code::kOrder);
  const int x_step = kWarpsK * rows * row_bytes(Code::kOrder), column_tiles = (rows + 7) / 8;
  int x_row[kColumnTiles];
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) {
    const int row = min(8 * c + lane / 4, rows - 1);
    x_row[c] = row * row_bytes(Code::kOrder) + row % 2 * kBlock + lane % 4 * 16;
  }
  Sums<Code, kColumnTiles> sums = {};

  // What does not need x is done before rotate_in has written it. Where a multiprocessor has many of these blocks, they
  // start late: among blocks of rotate_in they would not spread evenly.
  device::start_next();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (chunks > i * kStageChunks) loader.load_words(ring + i * size);
  }
  Code::fill(memory, table);
  device::wait_for_writes();
  if constexpr (kAlone) rotate_runs<Code::kOrder>(g.in, g.out.offset != 0, begin, chunks, ring + x_at, *own);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (!kAlone && chunks > i * kStageChunks) loader.load_x(ring + i * size);
    device::copy_commit();
  }
  const auto multiply = [&](const unsigned char* packed, const unsigned char* rows_of_x) {
    typename Code::Words words[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      device::load_words<Code::bits>(packed + r * chunk_bytes<Code>(), lane, words[r]);
      Code::follow(words[r]);
    }
    multiply_half<Code, 0>(code, words, rows_of_x, x_row, column_tiles, sums);
    multiply_half<Code, 1>(code, words, rows_of_x, x_row, column_tiles, sums);
  };
  int use = 0, fill = (kStages - 1) * size;  // places in the ring: the stage that was used last is filled next
  int use_x = 0;                             // where in x, from the first stage's
  for (int left = chunks; left > 0; left -= kStageChunks) {
    device::copy_wait<kStages - 2>();
    device::sync_block();
    if (left > kAhead) loader.template load<!kAlone>(ring + fill);
    device::copy_commit();
    const unsigned char* packed = ring + use + packed_at;
    const unsigned char* x = ring + use_x + x_from;
    if (left > warp_k + kWarpsK * (kDepth - 1)) {
#pragma unroll
      for (int j = 0; j < kDepth; ++j) multiply(packed + j * kRowTiles * chunk_bytes<Code>(), x + j * x_step);
    } else {  // the last stage, if it is not whole
#pragma unroll 1
      for (int todo = left - warp_k; todo > 0; todo -= kWarpsK) {
        multiply(packed, x);
        packed += kRowTiles * chunk_bytes<Code>(), x += x_step;
      }
    }
    fill = use;
    use = use + size < kStages * size ? use + size : 0;
    use_x = kAlone ? use_x + kDepth * x_step : use;
  }
  device::copy_wait<0>();
  device::sync_block();
  store_sums<Code, kColumnTiles, kAlone>(g, ring, sums, tile0, end_tile, row0, rows, own);
}

template <class Code, int kColumnTiles, int kDepth, bool kAlone = false>
std::string launch_gemm(const Gemm& g, int blocks, device::Stream stream) {
  const dim3 grid(blocks, g.splits, g.routed ? g.block_count : (g.m + kRowBlock - 1) / kRowBlock);
  return LAUNCH((decode_gemm_kernel<Code, kColumnTiles, kDepth, kAlone>), grid, g.warps_n * kWarpsK * kLanes,
                shared_bytes<Code>(std::min(g.m, g.row_block), g.warps_n, kDepth, kAlone ? g.split_chunks : 0), stream,
                g);
}

// Few is the code's kernels for up to 16 rows of x, and Many is those for more.
template <class Few, class Many>
std::string run_gemm(Gemm g, device::Stream stream) {
  const int blocks = place_parts(g, kRowTiles * g.warps_n), column_tiles = column_tiles_of(std::min(g.m, g.row_block));
  if (column_tiles == 8) return launch_gemm<Many, 8, 1>(g, blocks, stream);
  constexpr bool kChoice = has_depths<Few>(1);
  if constexpr (kCanBeAlone<Few>) {
    if (g.in.x) {
      const auto launch = column_tiles == 1 ? launch_gemm<Few, 1, kShallow, true> : launch_gemm<Few, 2, kShallow, true>;
      return launch(g, blocks, stream);
    }
  }
  if constexpr (kChoice) {
    if (g.depth == kDeep)
      return (column_tiles == 1 ? launch_gemm<Few, 1, kDeep> : launch_gemm<Few, 2, kDeep>)(g, blocks, stream);
  }
  constexpr int kLeast = kChoice ? kShallow : 1;
  return (column_tiles == 1 ? launch_gemm<Few, 1, kLeast> : launch_gemm<Few, 2, kLeast>)(g, blocks, stream);
}

// 0 where there is no kernel for such thread blocks. chunks: of a split, for the only launch, else 0.
template <class Few, class Many>
int gemm_shared_bytes(int rows, int warps_n, int depth, int chunks) {
  if (!is_compiled<Few>(rows, warps_n, depth)) return 0;
  if (chunks && !(kCanBeAlone<Few> && rows <= kFewRows && depth == kShallow)) return 0;
  return column_tiles_of(rows) <= 2 ? shared_bytes<Few>(rows, warps_n, depth, chunks)
                                    : shared_bytes<Many>(rows, warps_n, depth, 0);
}

// The rates that are compiled, a bit each: programs under a sanitizer have some of them (kernels/tests.cmake).
#ifndef QUIP_RATES
#define QUIP_RATES ~0u
#endif

// The kernels of a code at one rate, which its .cu defines.
struct GemmEntry {
  std::string (*run)(Gemm, device::Stream);
  int (*shared)(int rows, int warps_n, int depth, int chunks);
  std::string (*rows)(const DecodeRows&, device::Stream);  // null with integers, as the next
  std::string (*dense)(const DecodeDense&, device::Stream);
  WideEntry wide;
};
template <class Few, class Many>
GemmEntry entry_for() {
  GemmEntry entry{};
  if constexpr (QUIP_RATES >> Many::bits & 1) {
    entry.run = run_gemm<Few, Many>, entry.shared = gemm_shared_bytes<Few, Many>;
    if constexpr (Many::kOrder != XOrder::kBytes) entry.rows = run_rows<Many>, entry.dense = run_dense<Many>;
    if constexpr (kCanBeWide<Many>) entry.wide = {run_wide<Many>, Wide<Many>::shared_bytes};
  }
  return entry;
}
template <template <int> class Few, template <int> class Many, int first, int last>
GemmEntry gemm_entry(int bits) {
  GemmEntry found{};
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((bits == first + i ? void(found = entry_for<Few<first + i>, Many<first + i>>()) : void()), ...);
  }(std::make_integer_sequence<int, last - first + 1>{});
  return found;
}

// A code's kernels, and what the host has to know of it.
struct CodeKernels {
  GemmEntry (*entry)(int bits);
  XOrder order;
  float unit;  // weight = unit * (what the decoder gives - offset)
  float (*offset)(int bits);
  int table_words;      // 32-bit words of a table, 0 where the code has none
  bool table_per_part;  // whether each part has a table of its own
  int first_bits, last_bits;
};

// Every code by its name. Each gemm_<name>.cu adds its own when the library is loaded.
inline std::map<std::string, CodeKernels>& codes() {
  static std::map<std::string, CodeKernels> all;
  return all;
}

struct Register {
  Register(const char* name, const CodeKernels& kernels) { codes().emplace(name, kernels); }
};

}  // namespace quip
