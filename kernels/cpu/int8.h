// SPDX-License-Identifier: Apache-2.0
// The linear layer with int8 activations: integer products, so a result depends neither on threads nor on other rows.
//
// A rotated row becomes int8 q with one scale: x = scale * q. Formats (int8_lattice.h, int8_trellis.h and their _avx2.h) decode a
// unit of 16 rows x kColumns to kQuads vectors: lane = row of the weight, 32 bits of a lane = 4 columns as bytes (value +
// kOffset), or 2 as int16, or what one 1MAD product has to be summed, or magnitudes and signs. The activation has the same 32
// bits, repeated over the lanes. lanes_avx512.h has all 16 rows in a vector, lanes_avx2.h 8: there a block is two halves, rows
// 0..7 and 8..15.
//
// With AMX (amx.h), many rows of bytes are multiplied tile by tile, and x is simply x[row][quad].
//
//   few rows    each vector is multiplied as it is decoded (up to kFew, for which the sums and the decoding have registers);
//               or nothing is multiplied: products are looked up in tables of each row of x (int8_lattice_avx2.h)
//   many rows   32 rows of the weight, 128 vectors deep, are decoded to a panel that stays in cache, then multiplied with
//               groups of up to kGroup rows of x, whose 32-bit quads lie side by side: x[group][quad][row]
#pragma once
#if defined(__AVX2__)
#define QUIP_INT8
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "vector.h"

namespace quip {
namespace {

// Asks memory for bytes that will be read soon.
inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
}

// What a format leaves unsaid has the value of most formats.
template <class Format>
constexpr int repeat_of() {  // how often a column of x lies in a quad
  if constexpr (requires { Format::kRepeat; }) return Format::kRepeat;
  return 1;
}
template <class Format>
constexpr bool only_few() {  // another format multiplies many rows
  return repeat_of<Format>() > 1 || requires { Format::kOnlyFew; };
}
template <class Format>
constexpr bool is_wide() {  // int16
  return Format::kQuads * 2 == Format::kColumns * repeat_of<Format>();
}

}  // namespace
}  // namespace quip

#if defined(__AVX512VNNI__)
#include "int8_lattice.h"
#include "int8_trellis.h"
#include "lanes_avx512.h"
#if defined(__AMX_INT8__) || defined(QUIP_AMX_EMULATED)
#define QUIP_AMX
#include "amx.h"
#endif
#else
#include "int8_lattice_avx2.h"
#include "int8_trellis_avx2.h"
#include "lanes_avx2.h"
#endif

namespace quip {
namespace {

constexpr int kRowsBlock = 192;  // rows of x whose sums are kept while a panel is multiplied
constexpr int kPad = 64;         // columns of x are padded to a multiple of this
constexpr int kHalves = kTile / kRowsOfSums;  // vectors that hold the rows of a block
constexpr int kParts = 2 * kHalves;           // and those of a panel

template <class Format>
constexpr int offset_of() {
  if constexpr (requires { Format::kOffset; }) return Format::kOffset;
  return is_wide<Format>() ? 0 : kOffset8;
}

template <class F>
inline void with_bits(int bits, F f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
  }
}

// Calls f(a type whose value is count), 1 to most.
template <int most, class F>
inline void with_count(int64_t count, F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((count == i + 1 ? f(std::integral_constant<int, i + 1>{}) : void()), ...);
  }(std::make_integer_sequence<int, most>{});
}

template <int bits, class Table, class F>
inline void with_hyb([[maybe_unused]] int64_t m, F f) {
#if defined(__AVX512VNNI__)
  f(static_cast<Hyb8<bits, Table>*>(nullptr));
#else
  m <= Hyb8<bits, Table>::kFew ? f(static_cast<Hyb8<bits, Table>*>(nullptr)) : f(static_cast<Hyb16<bits, Table>*>(nullptr));
#endif
}

// Calls f(type of the format that multiplies m rows).
template <class F>
inline void with_format(const Weight& w, int64_t m, F f) {
  with_bits(w.bits, [&](auto b) {
    constexpr int bits = decltype(b)::value;
    if (w.blocks) {
      if constexpr (bits > 1)
        m <= LatticeFew8<bits>::kFew ? f(static_cast<LatticeFew8<bits>*>(nullptr)) : f(static_cast<Lattice8<bits>*>(nullptr));
    } else if (w.code == Code::kThreeInst) {
      f(static_cast<ThreeInst16<bits>*>(nullptr));
    } else if (w.code == Code::kLut) {
      f(static_cast<Lut16<bits>*>(nullptr));
    } else if (w.code == Code::kHyb) {
      w.lut_grid ? with_hyb<bits, HybGrid>(m, f) : with_hyb<bits, HybTable>(m, f);
    } else if (m <= OneMad8<bits>::kFew) {
      f(static_cast<OneMad8<bits>*>(nullptr));
    } else {
      f(static_cast<OneMad16<bits>*>(nullptr));
    }
  });
}

// Up to how many rows are multiplied while decoding.
inline int few_of(const Weight& w) {
  int few = 0;
  with_format(w, 1, [&](auto* format) { few = std::remove_pointer_t<decltype(format)>::kFew; });
  return few;
}

// What with_format names.
inline bool int8_takes(const Weight& w) {
  const auto is = [&](auto... codes) { return ((w.code == codes) || ...); };
  return w.blocks || (w.bits <= 4 && is(Code::kOneMad, Code::kThreeInst, Code::kHyb, Code::kLut));
}

inline int64_t padded(int64_t k) { return (k + kPad - 1) / kPad * kPad; }

template <class Format>
constexpr int rows_of() {  // of the weight, in a unit
  if constexpr (requires { Format::kUnitRows; }) return Format::kUnitRows;
  return kTile;
}

// Of the units of a row of them.
template <class Format>
inline int64_t row_bytes(int64_t k) {
  return (k + Format::kColumns - 1) / Format::kColumns * Format::kBytes;
}

// Whether products of x are looked up in tables of each row of x, instead of being multiplied.
template <class Format>
constexpr bool is_tabulated() {
  return requires { Format::kTables; };
}

// Whether tiles multiply it.
template <class Format>
constexpr bool is_tiled() {
#if defined(QUIP_AMX)
  return !is_wide<Format>() && repeat_of<Format>() == 1;
#else
  return false;
#endif
}

// Rows of x that lie side by side.
inline int64_t group_rows(const Weight& w, int64_t m) {
  const bool few = m <= few_of(w);
  bool alone = false;
  with_format(w, m, [&](auto* format) {
    using Format = std::remove_pointer_t<decltype(format)>;
    alone = is_tabulated<Format>() || (is_tiled<Format>() && !few);
  });
  if (alone) return 1;
  if (few) return m;
  const int64_t groups = (m + kGroup - 1) / kGroup;
  return (m + groups - 1) / groups;
}

inline int64_t int8_bytes(const Weight& w, int64_t m) {
  int64_t bytes = 0;
  with_format(w, m, [&](auto* format) {
    using Format = std::remove_pointer_t<decltype(format)>;
    const int64_t rows = is_tiled<Format>() ? (m + 15) / 16 * 16 : m;  // the rest of the last tile is read, not used
    bytes = padded(w.k) * 4 * Format::kQuads / Format::kColumns * rows;
  });
  return bytes;
}

// Columns of one row of x as int8 to its quads, which lie `step` apart.
template <class Format>
inline void store_quads(const int8_t* q, int64_t columns, int32_t* out, int64_t step) {
  if constexpr (is_tabulated<Format>()) {
    Format::arrange(q, columns, out);
  } else if constexpr (repeat_of<Format>() == 4) {
    for (int64_t c = 0; c < columns; ++c) out[c * step] = int32_t(0x01010101u * uint8_t(q[c]));
  } else if constexpr (repeat_of<Format>() == 2) {
    for (int64_t c = 0; c < columns; ++c) out[c * step] = int32_t(0x00010001u * uint16_t(q[c]));
  } else if constexpr (is_wide<Format>()) {
    int16_t wide[kPad];
    for (int64_t c = 0; c < columns; c += kPad) {
      for (int i = 0; i < kPad; ++i) wide[Format::place(i)] = q[c + i];
      for (int i = 0; i < kPad / 2; ++i) std::memcpy(out + (c / 2 + i) * step, wide + 2 * i, 4);
    }
  } else {
    alignas(64) int32_t quads[kPad / 4];
    for (int64_t c = 0; c < columns; c += kPad) {
      permute<Format>(q + c, quads);
      for (int i = 0; i < kPad / 4; ++i) out[(c / 4 + i) * step] = quads[i];
    }
  }
}

// The largest magnitude of x[0..count), as the bits of a float, so that a NaN is above infinity.
inline uint32_t largest_bits(const float* x, int64_t count) {
  Words top = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Words bits = load<Words>(x + c) & 0x7FFFFFFFu;
    top = bits > top ? bits : top;
  }
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, top[i]);
  return largest;
}

// Row r of m: x[0..k) to int8. x has padded(k) floats, zero beyond k. totals: the sum of q of each kChunk8 columns.
inline void int8_quantize(const Weight& w, const float* x, int64_t r, int64_t m, int8_t* out, float* scale, int32_t* totals) {
  const int64_t columns = padded(w.k);
  const uint32_t bits = largest_bits(x, columns);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const bool finite = bits < 0x7F800000u, zero = largest < 1e-35f;
  *scale = finite ? (zero ? 0.0f : largest / 127.0f) : NAN;
  const float inverse = finite && !zero ? 127.0f / largest : 0.0f;
  int8_t q[kChunk8];
  const int64_t group = r / group_rows(w, m), rows = std::min(group_rows(w, m), m - group * group_rows(w, m));
  for (int64_t chunk = 0; chunk * kChunk8 < columns; ++chunk) {
    const int64_t begin = chunk * kChunk8, count = std::min<int64_t>(kChunk8, columns - begin);
    totals[chunk] = round_row(x + begin, count, inverse, q);
    with_format(w, m, [&](auto* format) {
      using Format = std::remove_pointer_t<decltype(format)>;
      const auto quad_of = [](int64_t column) { return column * Format::kQuads / Format::kColumns; };
      int32_t* quads = reinterpret_cast<int32_t*>(out) + quad_of(padded(w.k)) * group * group_rows(w, m);
      store_quads<Format>(q, count, quads + quad_of(begin) * rows + r % group_rows(w, m), rows);
    });
  }
}

struct Output {
  const float* scales;
  const int32_t* totals;  // [m][chunks]
  int64_t chunks;
  float* y;
  int64_t stride;
};

// Adds the sums of one chunk to `rows` outputs of row r; the last chunk applies the scale.
template <class Format>
inline void finish(const Format& format, Sums sum, const Output& out, int64_t r, int64_t chunk, int64_t row0, int rows) {
  add_sums<Format>(sum, offset_of<Format>() * out.totals[r * out.chunks + chunk], format.unit(), chunk == 0,
                   chunk + 1 == out.chunks, out.scales[r], rows, out.y + r * out.stride + row0);
}

// Vectors of rows that a unit is decoded to at once, or else each by a call of its own.
template <class Format>
constexpr int parts_of() {
  if constexpr (rows_of<Format>() > kTile || requires { Format::kWhole; }) return rows_of<Format>() / kRowsOfSums;
  return 1;
}

// emit(part, quad, values): those parts of a unit, from `part` on.
template <class Format, class Emit>
[[gnu::always_inline]] inline void decode(const Format& format, const uint8_t* unit, int part, Emit emit) {
  if constexpr (parts_of<Format>() > 1) {
    format.decode(unit, emit);
  } else if constexpr (kHalves == 1) {
    format.decode(unit, [&](int quad, auto v) __attribute__((always_inline)) { emit(0, quad, v); });
  } else if (part == 0) {
    format.template decode<0>(unit, [&](int quad, auto v) __attribute__((always_inline)) { emit(0, quad, v); });
  } else {
    format.template decode<1>(unit, [&](int quad, auto v) __attribute__((always_inline)) { emit(0, quad, v); });
  }
}

// M rows of x times 32 rows of the weight, by tables.
template <class Format, int M>
void tabulated_rows(const Format& format, const uint8_t* blocks, int64_t k, const int32_t* x, const Output& out, int64_t row0,
                    int rows) {
  const int64_t row_quads = padded(k) * Format::kQuads / Format::kColumns;
  for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
    const int64_t begin = chunk * kChunk8 / Format::kColumns;
    const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
    Sums sums[M][kParts];
    format.template sum<M>(blocks + begin * Format::kBytes, end - begin, x + begin * Format::kQuads, row_quads, sums);
    for (int r = 0; r < M; ++r)
      for (int row = 0; row < rows; row += kRowsOfSums)
        finish(format, sums[r][row / kRowsOfSums], out, r, chunk, row0 + row, std::min(kRowsOfSums, rows - row));
  }
}

// M rows of x times the rows of a block that parts_of() says, from `part` on.
template <class Format, int M>
void few_rows(const Format& format, const uint8_t* block, int part, int64_t k, const int32_t* x, const Output& out, int64_t row0,
              int rows) {
  constexpr int kVectors = parts_of<Format>(), kPasses = kHalves / kVectors;
  constexpr int kSplit = kHalves > 1 ? 1 : M == 1 ? 4 : M == 2 ? 2 : 1;  // chains of sums, to hide vpdpbusd's latency
  // Each pass asks for its share of the next block: the first alone would wait for memory, while the second reads none.
  const uint8_t* const ahead = block + row_bytes<Format>(k) + part * row_bytes<Format>(k) / kPasses;
  for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
    constexpr int kSums = M * kVectors * kSplit;
    Sums sum[kSums];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = no_sums();
    const int64_t begin = chunk * kChunk8 / Format::kColumns;
    const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
    for (int64_t u = begin; u < end; ++u) {
      const int32_t* quads = x + u * Format::kQuads * M;
      if (kHalves > 1) fetch(ahead + u * Format::kBytes / kPasses, Format::kBytes / kPasses);
      decode(format, block + u * Format::kBytes, part, [&](int vector, int quad, auto weights) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
          Sums& share = sum[(vector * M + r) * kSplit + quad % kSplit];
          const int32_t* at = quads + quad * M + r;
          if constexpr (requires { weights.quad; })
            share = multiply_add(share, weights, at, M);
          else
            share = multiply_add<Format>(share, weights, *at);
        }
      });
    }
#pragma GCC unroll 16
    for (int i = 0; i < M * kVectors; ++i) {
      Sums total = sum[i * kSplit];
#pragma GCC unroll 16
      for (int j = 1; j < kSplit; ++j) total = plus(total, sum[i * kSplit + j]);
      const int below = i / M * kRowsOfSums;
      if (below < rows) finish(format, total, out, i % M, chunk, row0 + below, std::min(kRowsOfSums, rows - below));
    }
  }
}

// sums[r * kParts + 0..1] += quads of the panel (two parts of its rows, kDepth quads apart) times M rows of x.
template <class Format, int M>
void multiply_panel(const Sums* panel, int64_t depth, int64_t quads, const int32_t* x, Sums* sums) {
  Sums sum[M][2];  // in registers: every loop over it is unrolled
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) sum[r][0] = sums[r * kParts], sum[r][1] = sums[r * kParts + 1];
  constexpr int step = step_of<Format>();
  for (int64_t q = 0; q < quads; q += step) {
    const Sums *first = panel + q, *second = panel + depth + q;
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const int32_t* quad = x + q * M + r;
      if constexpr (step == 1) {
        sum[r][0] = multiply_add<Format>(sum[r][0], *first, *quad);
        sum[r][1] = multiply_add<Format>(sum[r][1], *second, *quad);
      } else {
        sum[r][0] = multiply_add_four(sum[r][0], first, quad, M);
        sum[r][1] = multiply_add_four(sum[r][1], second, quad, M);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) sums[r * kParts] = sum[r][0], sums[r * kParts + 1] = sum[r][1];
}

template <class Format>
void multiply_group(int rows, const Sums* panel, int64_t depth, int64_t quads, const int32_t* x, Sums* sums) {
  with_count<kGroup>(rows, [&](auto count) { multiply_panel<Format, count>(panel, depth, quads, x, sums); });
}

// Two blocks of 16 rows (the second may be missing) times all m rows of x.
template <class Format>
void many_rows(const Format& format, const uint8_t* const* blocks, int count, int64_t k, const int32_t* x, int64_t m,
               int64_t group, const Output& out, int64_t row0, int rows) {
  constexpr int64_t kDepth = 128, kUnits = kDepth / Format::kQuads;
  alignas(64) Sums panel[kParts][kDepth];
  alignas(64) Sums sums[kRowsBlock][kParts];
  const int64_t row_quads = padded(k) * Format::kQuads / Format::kColumns;
  const int64_t block_rows = kRowsBlock / group * group;
#if defined(QUIP_AMX)
  [[maybe_unused]] const TileUnit tile_unit;
#endif
  for (int64_t m0 = 0; m0 < m; m0 += block_rows) {
    const int64_t m1 = std::min(m, m0 + block_rows);
    for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
      for (int64_t r = 0; r < m1 - m0; ++r) std::fill(sums[r], sums[r] + kParts, no_sums());
      const int64_t begin = chunk * kChunk8 / Format::kColumns;
      const int64_t end = (std::min(k, (chunk + 1) * kChunk8) + Format::kColumns - 1) / Format::kColumns;
      for (int64_t u0 = begin; u0 < end; u0 += kUnits) {
        const int64_t units = std::min(kUnits, end - u0);
        for (int b = 0; kHalves > 1 && b < count; ++b) fetch(blocks[b] + (u0 + units) * Format::kBytes, kUnits * Format::kBytes);
        for (int first = 0; first < count * kHalves; first += parts_of<Format>())
          for (int64_t u = 0; u < units; ++u)
            decode(format, blocks[first / kHalves] + (u0 + u) * Format::kBytes, first % kHalves,
                   [&](int part, int quad, Sums v) { panel[first + part][u * Format::kQuads + quad] = v; });
#if defined(QUIP_AMX)
        if constexpr (is_tiled<Format>()) {
          const int64_t quads = units * Format::kQuads, whole = (quads + 15) / 16 * 16;
          for (int b = 0; b < 2; ++b) std::fill(panel[b] + quads, panel[b] + whole, no_sums());
          multiply_tiles(panel[0], kDepth, whole, x + m0 * row_quads + u0 * Format::kQuads, row_quads, m1 - m0, sums);
          continue;
        }
#endif
        for (int64_t r = m0; r < m1; r += group) {
          const int64_t in_group = std::min(group, m - r);
          const int32_t* quads = x + r * row_quads + u0 * Format::kQuads * in_group;
          for (int part = 0; part < count * kHalves; part += 2)
            multiply_group<Format>(int(in_group), panel[part], kDepth, units * Format::kQuads, quads, sums[r - m0] + part);
        }
      }
      for (int64_t r = m0; r < m1; ++r)
        for (int row = 0; row < rows; row += kRowsOfSums)
          finish(format, sums[r - m0][row / kRowsOfSums], out, r, chunk, row0 + row,
                         std::min(kRowsOfSums, rows - row));
    }
  }
}

// Rows row0 .. row0 + 31 of the weight times m rows of x.
inline void int8_panel(const Weight& w, int64_t row0, const int8_t* x8, const float* scales, const int32_t* totals, int64_t m,
                       float* y, int64_t y_stride) {
  const int32_t* x = reinterpret_cast<const int32_t*>(x8);
  const Output out{scales, totals, (padded(w.k) + kChunk8 - 1) / kChunk8, y, y_stride};
  const int rows = int(std::min<int64_t>(2 * kTile, w.n - row0)), count = (rows + kTile - 1) / kTile;
  with_format(w, m, [&](auto* pointer) {
    using Format = std::remove_pointer_t<decltype(pointer)>;
    const Format format(w);
    const uint8_t* first = w.blocks ? w.blocks : reinterpret_cast<const uint8_t*>(w.packed);
    first += row0 / rows_of<Format>() * row_bytes<Format>(w.k);
    if constexpr (is_tabulated<Format>()) {
      with_count<Format::kFew>(m, [&](auto count) { tabulated_rows<Format, count>(format, first, w.k, x, out, row0, rows); });
    } else if (const uint8_t* blocks[2] = {first, first + (count > 1 ? row_bytes<Format>(w.k) : 0)}; m <= Format::kFew) {
      constexpr int kRows = parts_of<Format>() * kRowsOfSums;
      for (int row = 0; row < rows; row += kRows)
        with_count<Format::kFew>(m, [&](auto rows_of_x) {
          few_rows<Format, rows_of_x>(format, blocks[row / kTile], row / kRowsOfSums % kHalves, w.k, x, out, row0 + row,
                                      std::min(kRows, rows - row));
        });
    } else if constexpr (!only_few<Format>()) {
      many_rows(format, blocks, count, w.k, x, m, group_rows(w, m), out, row0, rows);
    }
  });
}

}  // namespace
}  // namespace quip
#endif
