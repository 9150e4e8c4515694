// SPDX-License-Identifier: Apache-2.0
// The product for many rows of x where the GPU multiplies matrices asynchronously (wgmma, compute capability 9.0 alone). A
// thread block has two warpgroups of four warps, and a warp a tile. It decodes half a chunk of its tile to registers, which
// are operand A; operand B are all rows of x, in shared memory. While these are multiplied it decodes the next half.
//
//   shared memory  tables | x of kStages chunks, each [column of 8][row][16 bytes]
//
// Column 4 half + 2 mul + register of a chunk is what operand B of a multiplication takes (layout.h), so operand A is what
// the codes decode to for mma.
//
// An output's products are added in the order of wide_gemm.
#pragma once
#include "wide_gemm.h"

namespace quip {

template <class Code, int kRows>
struct Wgmma {
  static constexpr int kStages = 4;  // multiplied twice, on its way twice
  static constexpr int kRow = row_bytes(Code::kOrder);
  // Behind the last stage what its last multiplications read of rows that are not there.
  static int shared_bytes(int rows) { return Code::kTableBytes + kStages * rows * kRow + (kRows - rows) * 16; }
};

template <class Code, int kRows>
KERNEL((kWideWarps * kLanes), (kRows > 64 ? 1 : 2)) wgmma_gemm_kernel(const Gemm g) {
  SHARED(memory);
  using W = Wgmma<Code, kRows>;
  const int s = part_of_block(g), column = g.row_block * 16;
  const void* table = static_cast<const char*>(g.table) + s * g.table_stride;
  const Code code(memory, table);
  const WideBlock<Code> block(g, s, kWideWarps, true);
  unsigned char* const ring = memory + Code::kTableBytes;
  const auto x_of = [&](int chunk) { return ring + chunk % W::kStages * g.row_block * W::kRow; };
  float sums[Code::kSums][kRows / 8][4] = {};
  uint32_t a[2][Code::kSums][2][4];  // of both halves
  typename Code::Words words, next;
  device::start_next();
  block.fetch(0, next);
  Code::fill(memory, table);
  device::wait_for_writes();
  block.copy(0, x_of(0));
  block.copy(1, x_of(1));
  for (int chunk = 0; chunk < block.chunks; ++chunk) {
    device::copy_wait<1>();
    device::show_copies();
    device::sync_block();  // the chunk's x is there, and that of two chunks before is multiplied
    block.copy(chunk + 2, x_of(chunk + 2));
#pragma unroll
    for (int i = 0; i < Code::bits; ++i) words[i] = next[i];
    block.fetch(chunk + 1, next);
    const unsigned char* const x = x_of(chunk);
    const auto multiply = [&](auto half) {
      constexpr int h = decltype(half)::value;
      code.template decode<h>(words, a[h]);
      device::products_begin();
#pragma unroll
      for (int i = 0; i < 2 * Code::kSums; ++i) {
        const auto b = device::describe(x + (4 * h + i % 2 * 2) * column, column, 128);
        device::multiply_add_async<kRows>(sums[i / 2], a[h][i / 2][i % 2], b);
      }
      device::products_commit();
      device::products_wait<1>();  // the other half's registers may change
    };
    Code::follow(words);
    multiply(std::integral_constant<int, 0>());
    multiply(std::integral_constant<int, 1>());
  }
  device::products_wait<0>();
  block.write(g, block.tile0 + device::warp_index(), 0, 8, sums);
}

// Kernels for up to 64, 128 and 256 rows; two stages of a code have sums for 128 at most.
template <class Code>
constexpr int most_wgmma_rows() {
  return kWideRows / Code::kSums;
}

// f.template operator()<rows>() of the kernel for so many rows, or nothing.
template <class Code, class F>
auto with_wgmma_rows(int rows, F f) -> decltype(f.template operator()<64>()) {
  if (rows <= 64) return f.template operator()<64>();
  if (rows <= 128) return f.template operator()<128>();
  if constexpr (most_wgmma_rows<Code>() > 128) return f.template operator()<256>();
  return {};
}

template <class Code>
std::string run_wgmma(Gemm g, device::Stream stream) {
  const dim3 grid(place_parts(g, kWideWarps), g.splits, (g.m + g.row_block - 1) / g.row_block);
  return with_wgmma_rows<Code>(g.row_block, [&]<int rows>() {
    return LAUNCH((wgmma_gemm_kernel<Code, rows>), grid, kWideWarps * kLanes,
                  (Wgmma<Code, rows>::shared_bytes(g.row_block)), stream, g);
  });
}

template <class Code>
int wgmma_shared_bytes(int rows) {
  if (rows > most_wgmma_rows<Code>()) return 0;
  return with_wgmma_rows<Code>(rows, [rows]<int most>() { return Wgmma<Code, most>::shared_bytes(rows); });
}

}  // namespace quip
