// SPDX-License-Identifier: Apache-2.0
// The product with int8 activations. All products and sums are integers, so a result depends neither on threads nor on
// other rows.
//
//   few rows    Each vector is multiplied as it is decoded, or while that of the next unit is. Or nothing is multiplied,
//               and products are looked up in tables of each row of x (lattice_avx2.h).
//   many rows   32 rows of the weight, 128 vectors deep, are decoded to a panel that stays in cache. It is multiplied
//               with groups of up to kGroup rows of x, or with AMX (amx.h) tile by tile: 16 rows of x and 64 columns.
//
// A vector holds 16 rows of the weight on AVX-512, and 8 on AVX2: there a block of 16 rows is two halves.
#pragma once
#include "formats.h"
#if defined(QUIP_INT8)
#include <algorithm>
#include <utility>
#if defined(QUIP_AMX)
#include "amx.h"
#endif

namespace quip {
namespace {

struct Output {
  const float* scales;
  const int32_t* totals;  // [m][chunks]
  int64_t chunks;
  float* y;
  int64_t stride;
};

// Adds the sums of one chunk to `rows` outputs of row r; the last chunk applies the scale.
template <class Format>
inline void finish(const Format& format, Sums sum, const Output& out, int64_t r, int64_t chunk, int64_t row0,
                   int rows) {
  add_sums<Format>(sum, out.totals[r * out.chunks + chunk], format.unit(), chunk == 0, chunk + 1 == out.chunks,
                   out.scales[r], rows, out.y + r * out.stride + Format::first_row(row0));
}

constexpr int kRowsBlock = 192;               // rows of x whose sums are kept while a panel is multiplied
constexpr int kHalves = kTile / kRowsOfSums;  // vectors that hold the rows of a block
constexpr int kVectors = 2 * kHalves;         // and those of a panel

// Vectors of rows that one call of decode gives.
template <class Format>
constexpr int vectors_of() {
  return Format::kWhole ? Format::kUnitRows / kRowsOfSums : 1;
}

// emit(vector, quad, values): those vectors of a unit, from `first` on.
template <class Format, class Emit>
[[gnu::always_inline]] inline void decode(const Format& format, const uint8_t* unit, int first, Emit emit) {
  if constexpr (vectors_of<Format>() > 1) {
    format.decode(unit, emit);
  } else if constexpr (kHalves == 1) {
    format.decode(unit, [&](int quad, auto v) __attribute__((always_inline)) { emit(0, quad, v); });
  } else if (first == 0) {
    format.template decode<0>(unit, [&](int quad, auto v) __attribute__((always_inline)) { emit(0, quad, v); });
  } else {
    format.template decode<1>(unit, [&](int quad, auto v) __attribute__((always_inline)) { emit(0, quad, v); });
  }
}

// M rows of x times 32 rows of the weight, by tables.
template <class Format, int M>
void tabulated_rows(const Format& format, const uint8_t* blocks, int64_t k, const int32_t* x, const Output& out,
                    int64_t row0, int rows) {
  const int64_t row_quads = quads_of<Format>(padded(k));
  for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
    const int64_t begin = chunk * kChunk8 / Format::kColumns;
    const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
    Sums sums[M][kVectors];
    format.template sum<M>(blocks + begin * Format::kBytes, end - begin, x + begin * Format::kQuads, row_quads, sums);
    for (int r = 0; r < M; ++r)
      for (int row = 0; row < rows; row += kRowsOfSums)
        finish(format, sums[r][row / kRowsOfSums], out, r, chunk, row0 + row, std::min(kRowsOfSums, rows - row));
  }
}

// M rows of x times as many rows of a block as one call of decode gives, from vector `first` on.
template <class Format, int M>
void few_rows(const Format& format, const uint8_t* block, int first, int64_t k, const int32_t* x, const Output& out,
              int64_t row0, int rows) {
  constexpr int kDecoded = vectors_of<Format>(), kPasses = kHalves / kDecoded;
  constexpr int kSplit = kHalves > 1 ? 1 : M == 1 ? 4 : M <= 4 ? 2 : 1;  // chains of sums, to hide vpdpbusd's latency
  // A single pass asks for bytes a page ahead, because the CPU's own prefetching stops at the end of a page. Of several,
  // each asks for its share of the next block: the first alone would wait for memory, while the second reads none.
  constexpr int64_t kPage = 4096;
  const int64_t block_bytes = row_bytes<Format>(k);
  const uint8_t* const ahead = block + (kPasses == 1 ? kPage : block_bytes + first * block_bytes / kPasses);
  // Many rows take so long for a unit that the CPU looks no further: its sums would wait for look-ups. So the unit behind
  // is decoded meanwhile.
  constexpr bool kBehind = kHalves == 1 && M > 4;
  for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
    constexpr int kSums = M * kDecoded * kSplit;
    Sums sum[kSums];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = no_sums();
    const int64_t begin = chunk * kChunk8 / Format::kColumns;
    const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
    [[maybe_unused]] alignas(64) Sums decoded[2][kBehind ? Format::kQuads : 1];
    if constexpr (kBehind)
      format.decode(block + begin * Format::kBytes, [&](int quad, Sums v) { decoded[begin % 2][quad] = v; });
    for (int64_t u = begin; u < end; ++u) {
      const int32_t* quads = x + u * Format::kQuads * M;
      const auto multiply = [&](int vector, int quad, auto weights) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
          Sums& share = sum[(vector * M + r) * kSplit + quad % kSplit];
          const int32_t* at = quads + quad * M + r;
          if constexpr (requires { weights.quad; })
            share = multiply_add(share, weights, at, M);
          else
            share = multiply_add<is_wide<Format>()>(share, weights, *at);
        }
      };
      fetch(ahead + u * Format::kBytes / kPasses, Format::kBytes / kPasses);
      if constexpr (kBehind)
        format.decode(block + std::min(u + 1, end - 1) * Format::kBytes,
                      [&](int quad, Sums v) __attribute__((always_inline)) {
                        decoded[(u + 1) % 2][quad] = v;
                        multiply(0, quad, decoded[u % 2][quad]);
                      });
      else
        decode(format, block + u * Format::kBytes, first, multiply);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M * kDecoded; ++i) {
      Sums total = sum[i * kSplit];
#pragma GCC unroll 16
      for (int j = 1; j < kSplit; ++j) total = plus(total, sum[i * kSplit + j]);
      const int below = i / M * kRowsOfSums;
      if (below < rows) finish(format, total, out, i % M, chunk, row0 + below, std::min(kRowsOfSums, rows - below));
    }
  }
}

// sums[r * kVectors + 0..1] += quads of the panel (two vectors of its rows, kDepth quads apart) times M rows of x.
template <bool wide, int M>
void multiply_panel(const Sums* panel, int64_t depth, int64_t quads, const int32_t* x, Sums* sums) {
  Sums sum[M][2];  // in registers: every loop over it is unrolled
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) sum[r][0] = sums[r * kVectors], sum[r][1] = sums[r * kVectors + 1];
  constexpr int step = step_of<wide>();
  for (int64_t q = 0; q < quads; q += step) {
    const Sums *first = panel + q, *second = panel + depth + q;
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const int32_t* quad = x + q * M + r;
      if constexpr (step == 1) {
        sum[r][0] = multiply_add<wide>(sum[r][0], *first, *quad);
        sum[r][1] = multiply_add<wide>(sum[r][1], *second, *quad);
      } else {
        sum[r][0] = multiply_add_four(sum[r][0], first, quad, M);
        sum[r][1] = multiply_add_four(sum[r][1], second, quad, M);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) sums[r * kVectors] = sum[r][0], sums[r * kVectors + 1] = sum[r][1];
}

template <bool wide>
void multiply_group(int rows, const Sums* panel, int64_t depth, int64_t quads, const int32_t* x, Sums* sums) {
  with_count<kGroup>(rows, [&](auto count) { multiply_panel<wide, count>(panel, depth, quads, x, sums); });
}

// Two blocks of 16 rows (the second may be missing) times all m rows of x.
template <class Format>
void many_rows(const Format& format, const uint8_t* const* blocks, int count, int64_t k, const int32_t* x, int64_t m,
               int64_t group, const Output& out, int64_t row0, int rows) {
  constexpr int64_t kDepth = 128, kUnits = kDepth / Format::kQuads;
  alignas(64) Sums panel[kVectors][kDepth];
  alignas(64) Sums sums[kRowsBlock][kVectors];
  const int64_t row_quads = quads_of<Format>(padded(k));
  const int64_t block_rows = kRowsBlock / group * group;
  for (int64_t m0 = 0; m0 < m; m0 += block_rows) {
    const int64_t m1 = std::min(m, m0 + block_rows);
    for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
      for (int64_t r = 0; r < m1 - m0; ++r) std::fill(sums[r], sums[r] + kVectors, no_sums());
      const int64_t begin = chunk * kChunk8 / Format::kColumns;
      const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
      for (int64_t u0 = begin; u0 < end; u0 += kUnits) {
        const int64_t units = std::min(kUnits, end - u0);
        for (int b = 0; kHalves > 1 && b < count; ++b)
          fetch(blocks[b] + (u0 + units) * Format::kBytes, kUnits * Format::kBytes);
        for (int first = 0; first < count * kHalves; first += vectors_of<Format>())
          for (int64_t u = 0; u < units; ++u)
            decode(format, blocks[first / kHalves] + (u0 + u) * Format::kBytes, first % kHalves,
                   [&](int vector, int quad, Sums v) { panel[first + vector][u * Format::kQuads + quad] = v; });
        for (int64_t r = m0; r < m1; r += group) {
          const int64_t in_group = std::min(group, m - r);
          const int32_t* quads = x + r * row_quads + u0 * Format::kQuads * in_group;
          for (int vector = 0; vector < count * kHalves; vector += 2)
            multiply_group<is_wide<Format>()>(int(in_group), panel[vector], kDepth, units * Format::kQuads, quads,
                                              sums[r - m0] + vector);
        }
      }
      for (int64_t r = m0; r < m1; ++r)
        for (int row = 0; row < rows; row += kRowsOfSums)
          finish(format, sums[r - m0][row / kRowsOfSums], out, r, chunk, row0 + row, std::min(kRowsOfSums, rows - row));
    }
  }
}

#if defined(QUIP_AMX)
// The same by tiles; of a split format one block of 16 rows. Up to 32 rows of x keep their sums in tiles, so their panels
// may be short, which leaves the first-level cache to x. The bytes of the next panel are asked for here, since a loop full
// of tiles looks too short a way ahead to hide the memory.
template <class Format>
void tiled_rows(const Format& format, const uint8_t* const* blocks, int count, int64_t k, const int32_t* x, int64_t m,
                const Output& out, int64_t row0, int rows) {
  constexpr int64_t kRowsTiled = 512, kGroupRows = 2 * kTileRows;
  alignas(64) Sums panel[2 * 128];
  alignas(64) Sums sums[kRowsTiled][2];
  const int64_t depth = m <= kGroupRows ? 32 : 128, units = depth / Format::kQuads;
  const int64_t row_quads = quads_of<Format>(padded(k)), all = (k + Format::kColumns - 1) / Format::kColumns;
  const int64_t in_chunk = kChunk8 / Format::kColumns;
  const int64_t panel_bytes = count * row_bytes<Format>(k);
  const TileUnit tile_unit;
  for (int64_t m0 = 0; m0 < m; m0 += kRowsTiled) {
    const int64_t m1 = std::min(m, m0 + kRowsTiled);
    const bool stay = m1 - m0 <= kGroupRows;
    for (int64_t u0 = 0; u0 < all; u0 += units) {
      const int64_t u1 = std::min(u0 + units, all), steps = ((u1 - u0) * Format::kQuads + 15) / 16;
      const bool first = u0 % in_chunk == 0, last = u1 % in_chunk == 0 || u1 == all;
      for (int b = 0; b < count; ++b)
        for (int64_t u = u0; u < u1; ++u) {
          const uint8_t* unit = blocks[b] + u * Format::kBytes;
          Sums* at = panel + b * depth + (u - u0) * Format::kQuads;
          fetch<kSecondLevel>(unit + panel_bytes, Format::kBytes);
          if constexpr (Format::kTwoBytes)
            format.decode(unit, [&](int byte, int quad, Sums v) { at[byte * depth + quad] = v; });
          else
            format.decode(unit, [&](int quad, Sums v) { at[quad] = v; });
        }
      finish_stores(panel);  // what is left of the last 16 quads meets zeros of x
      for (int64_t r0 = m0; r0 < m1; r0 += kGroupRows) {
        const int64_t r1 = std::min(m1, r0 + kGroupRows);
        const bool two = r1 - r0 > kTileRows;
        Sums(*own)[2] = sums + (r0 - m0);
        if (first)
          clear_sums(two);
        else if (!stay)
          load_sums(own, two);
        const int32_t* upper = x + r0 * row_quads + u0 * Format::kQuads * kTileRows;
        for (int64_t q = 0; q < 16 * steps; q += 16)
          multiply_tiles(panel + q, depth, upper + q * kTileRows, upper + (row_quads + q) * kTileRows, two);
        if (!stay || last) store_sums(own, two);
        if (!last) continue;
        finish_stores(own);
        const int64_t chunk = (u1 - 1) / in_chunk;
        for (int64_t r = r0; r < r1; ++r) {
          const Sums* sum = own[r - r0];
          if constexpr (Format::kTwoBytes)
            finish(format, plus(sum[0], _mm512_slli_epi32(sum[1], 8)), out, r, chunk, row0, rows);
          else
            for (int row = 0; row < rows; row += kRowsOfSums)
              finish(format, sum[row / kRowsOfSums], out, r, chunk, row0 + row, std::min(kRowsOfSums, rows - row));
        }
      }
    }
  }
}
#endif

// Rows row0 .. row0 + 31 of the weight times m rows of x.
inline void int8_panel(const Weight& w, int64_t row0, const int8_t* x8, const float* scales, const int32_t* totals,
                       int64_t m, float* y, int64_t y_stride) {
  const int32_t* x = reinterpret_cast<const int32_t*>(x8);
  const Output out{scales, totals, (padded(w.k) + kChunk8 - 1) / kChunk8, y, y_stride};
  const int rows = int(std::min<int64_t>(2 * kTile, w.n - row0)), count = (rows + kTile - 1) / kTile;
  with_format(w, m, [&](auto* pointer) {
    using Format = std::remove_pointer_t<decltype(pointer)>;
    const Format format(w);
    const uint8_t* first = w.packed + row0 / Format::kUnitRows * row_bytes<Format>(w.k);
    if constexpr (Format::kTabulated) {
      with_count<Format::kFew>(
          m, [&](auto count) { tabulated_rows<Format, count>(format, first, w.k, x, out, row0, rows); });
    } else if (const uint8_t* blocks[2] = {first, first + (count > 1 ? row_bytes<Format>(w.k) : 0)};
               m <= few<Format>()) {
      constexpr int kRows = vectors_of<Format>() * kRowsOfSums;
      for (int row = 0; row < rows; row += kRows)
        with_count<few<Format>()>(m, [&](auto rows_of_x) {
          few_rows<Format, rows_of_x>(format, blocks[row / kTile], row / kRowsOfSums % kHalves, w.k, x, out, row0 + row,
                                      std::min(kRows, rows - row));
        });
#if defined(QUIP_AMX)
    } else if constexpr (is_tiled<Format>()) {
      constexpr int kBlocks = Format::kTwoBytes ? 1 : 2;  // together
      for (int b = 0; b < count; b += kBlocks)
        tiled_rows(format, blocks + b, std::min(kBlocks, count - b), w.k, x, m, out, row0 + b * kTile,
                   std::min(kBlocks * kTile, rows - b * kTile));
#endif
    } else if constexpr (!Format::kOnlyFew) {
      many_rows(format, blocks, count, w.k, x, m, group_rows(w, m), out, row0, rows);
    }
  });
}

}  // namespace
}  // namespace quip
#endif
