// SPDX-License-Identifier: Apache-2.0
// Rows of the weight, decoded one by one, for a quantized embedding: a thread block a row, its warps take chunks in turn.
//
// A lane decodes two rows of its tile as for a multiplication and keeps the one that is asked for, if it is its own.
#pragma once
#include "device.h"
#include "kernels.h"

namespace quip {

constexpr int kRowWarps = 8;

// The column that half `i` of the A registers of multiplication `mul` holds in a half chunk (layout.h).
DEVICE int register_column(XOrder order, int mul, int high, int i) {
  const int t = threadIdx.x % 4;
  return order == XOrder::kLattice ? 8 * t + 4 * mul + 2 * high + i : 16 * (t / 2) + 8 * high + 4 * (t % 2) + 2 * mul + i;
}

template <class Code, int half>
DEVICE void store_half(const Code& code, const typename Code::Words& words, const DecodeRows& d, int row, int chunk) {
  uint32_t a[Code::kSums][2][4];
  code.template decode<half>(words, a);  // every lane, for they exchange bits
  if (int(threadIdx.x) % kLanes / 4 != row % 8) return;
#pragma unroll
  for (int place = 0; place < 8; ++place) {
    const int mul = place / 4, high = place / 2 % 2, i = place % 2;
    const int column = chunk * kChunk + 32 * half + register_column(Code::kOrder, mul, high, i);
    if (column >= d.k) continue;
    float value = -d.offset;
#pragma unroll
    for (int s = 0; s < Code::kSums; ++s) {
      const uint32_t both = row % kTile < 8 ? a[s][mul][2 * high] : a[s][mul][2 * high + 1];
      value += (s ? Code::kSecond : 1.0f) * device::from_half(uint16_t(both >> (16 * i)));
    }
    d.out[int64_t(blockIdx.x) * d.k + column] = value;
  }
}

template <class Code>
KERNEL(kRowWarps * kLanes) decode_rows_kernel(const DecodeRows d) {
  SHARED(memory);
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

template <class Code>
std::string run_rows(const DecodeRows& d, device::Stream stream) {
  return LAUNCH(decode_rows_kernel<Code>, dim3(d.m), kRowWarps * kLanes, Code::kTableBytes + 16, stream, d);
}

}  // namespace quip
