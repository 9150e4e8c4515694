// SPDX-License-Identifier: Apache-2.0
// The weight, decoded to memory. A thread block has a tile, its warps take chunks in turn.
//
//   decode_rows    one row, for a quantized embedding. A lane decodes two rows, as for a multiplication, and keeps
//                  its own.
//   decode_dense   the whole weight as a matrix of fp16 for cuBLAS, where there are many rows of x.
#pragma once
#include "device.h"
#include "kernels.h"

namespace quip {

constexpr int kRowWarps = 8;

// The column of a chunk that half `i` of the A registers of multiplication `mul` of a half chunk holds (layout.h).
DEVICE int register_column(XOrder order, int half, int mul, int high, int i) {
  const int t = threadIdx.x % 4;
  switch (order) {
    case XOrder::kLattice: return 32 * half + 8 * t + 4 * mul + 2 * high + i;
    case XOrder::kTilesByRows: return 8 * half + 16 * t + 4 * mul + 2 * high + i;
    default: return 32 * half + 16 * (t / 2) + 8 * high + 4 * (t % 2) + 2 * mul + i;
  }
}

// Half `i` of the A registers of a multiplication, less the offset.
template <class Code>
DEVICE float weight_of(const uint32_t (&a)[Code::kSums][2][4], bool second_row, int mul, int high, int i,
                       float offset) {
  float value = -offset;
#pragma unroll
  for (int s = 0; s < Code::kSums; ++s) {
    const uint32_t both = second_row ? a[s][mul][2 * high + 1] : a[s][mul][2 * high];
    value += (s ? Code::kSecond : 1.0f) * device::from_half(uint16_t(both >> (16 * i)));
  }
  return value;
}

template <class Code, int half>
DEVICE void store_half(const Code& code, const typename Code::Words& words, const DecodeRows& d, int row, int chunk) {
  uint32_t a[Code::kSums][2][4];
  code.template decode<half>(words, a);  // every lane, for they exchange bits
  if (int(threadIdx.x) % kLanes / 4 != row % 8) return;
#pragma unroll
  for (int place = 0; place < 8; ++place) {
    const int mul = place / 4, high = place / 2 % 2, i = place % 2;
    const int column = chunk * kChunk + register_column(Code::kOrder, half, mul, high, i);
    if (column >= d.k) continue;
    d.out[int64_t(blockIdx.x) * d.k + column] = weight_of<Code>(a, row % kTile >= 8, mul, high, i, d.offset);
  }
}

template <class Code>
KERNEL(kRowWarps * kLanes) decode_rows_kernel(const DecodeRows d) {
  SHARED(memory);
  device::wait_for_writes();
  const int64_t row = d.ids[blockIdx.x];
  const bool known = row >= 0 && row < d.rows;
  if (threadIdx.x == 0) d.scales[blockIdx.x] = known ? d.sv[row] : device::float_of(0x7FC00000u);
  Code::fill(memory, d.table);
  device::sync_block();
  const Code code(memory, d.table);
  const uint32_t* tile = d.packed + (known ? row / kTile : 0) * d.chunks * (Code::bits * kLanes);
  for (int chunk = device::warp_index(); chunk < d.chunks; chunk += kRowWarps) {
    typename Code::Words words;
    device::load_words<Code::bits>(tile + int64_t(chunk) * (Code::bits * kLanes), threadIdx.x % kLanes, words);
    Code::follow(words);
    store_half<Code, 0>(code, words, d, int(row % kTile), chunk);
    store_half<Code, 1>(code, words, d, int(row % kTile), chunk);
  }
}

// A register of two weights, less the offset. With one stage that is an addition in fp16, which is exact for every
// code's numbers. The halves stay in their registers: ptxas 13.0 stores wrong ones where they are converted one by one
// (sm_90, 1mad at 3 and 6 bits).
template <class Code>
DEVICE uint32_t pair_of(const uint32_t (&a)[Code::kSums][2][4], bool second_row, int mul, int high, float offset) {
  if constexpr (Code::kSums == 1)
    return device::add_halves(a[0][mul][2 * high + second_row], device::to_halves(-offset, -offset));
  else
    return device::to_halves(weight_of<Code>(a, second_row, mul, high, 0, offset),
                             weight_of<Code>(a, second_row, mul, high, 1, offset));
}

// Both rows of a lane, of half a chunk that begins at `to` in its first row.
template <class Code, int half>
DEVICE void store_dense(const Code& code, const typename Code::Words& words, uint16_t* to, int64_t stride,
                        float offset) {
  uint32_t a[Code::kSums][2][4];
  code.template decode<half>(words, a);
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    uint32_t pairs[2][2];  // multiplication, register
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      pairs[place / 2][place % 2] = pair_of<Code>(a, second, place / 2, place % 2, offset);
    }
    uint16_t* row = to + (threadIdx.x % kLanes / 4 + 8 * second) * stride;
    if constexpr (Code::kOrder != XOrder::kTrellis) {
      device::store16(row + register_column(Code::kOrder, half, 0, 0, 0),
                      {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]});
    } else {
#pragma unroll
      for (int high = 0; high < 2; ++high)
        *reinterpret_cast<uint64_t*>(row + register_column(Code::kOrder, half, 0, high, 0)) =
            uint64_t(pairs[1][high]) << 32 | pairs[0][high];
    }
  }
}

template <class Code>
KERNEL(kRowWarps * kLanes) decode_dense_kernel(const DecodeDense d) {
  SHARED(memory);
  const int tile = blockIdx.x;
  int s = 0;
  while (s + 1 < d.parts && tile >= d.part[s + 1].first_tile) ++s;
  const void* table = static_cast<const char*>(d.table) + s * d.table_stride;
  Code::fill(memory, table);
  device::sync_block();
  const Code code(memory, table);
  const int64_t stride = int64_t(d.chunks) * kChunk;
  device::wait_for_writes();
  for (int chunk = device::warp_index(); chunk < d.chunks; chunk += kRowWarps) {
    typename Code::Words words;
    const uint32_t* from = d.packed + (int64_t(tile) * d.chunks + chunk) * (Code::bits * kLanes);
    device::load_words<Code::bits>(from, threadIdx.x % kLanes, words);
    Code::follow(words);
    uint16_t* to = d.out + int64_t(tile) * kTile * stride + chunk * kChunk;
    store_dense<Code, 0>(code, words, to, stride, d.offset);
    store_dense<Code, 1>(code, words, to, stride, d.offset);
  }
}

template <class Code>
std::string run_dense(const DecodeDense& d, device::Stream stream) {
  return LAUNCH(decode_dense_kernel<Code>, dim3(d.tiles), kRowWarps * kLanes, Code::kTableBytes + 16, stream, d);
}

template <class Code>
std::string run_rows(const DecodeRows& d, device::Stream stream) {
  return LAUNCH(decode_rows_kernel<Code>, dim3(d.m), kRowWarps * kLanes, Code::kTableBytes + 16, stream, d);
}

}  // namespace quip
