// SPDX-License-Identifier: Apache-2.0
// Which format multiplies a weight with m rows of x, and how these rows lie.
#pragma once
#if defined(__AVX2__)
#define QUIP_INT8
#include <algorithm>
#include <type_traits>

#if defined(__AVX512VNNI__)
#include "lattice_avx512.h"
#include "trellis_avx512.h"
#if defined(__AMX_INT8__) || defined(QUIP_AMX_EMULATED)
#define QUIP_AMX
#include "trellis_tiles_avx512.h"
#endif
#else
#include "hyb_avx2.h"
#include "lattice_avx2.h"
#endif

namespace quip {
namespace {

// Whether tiles of AMX multiply many rows.
template <class Format>
constexpr bool is_tiled() {
#if defined(QUIP_AMX)
  return !is_wide<Format>() && Format::kRepeat == 1;
#else
  return false;
#endif
}

// Up to how many rows are multiplied while decoding.
template <class Format>
constexpr int few() {
  return is_tiled<Format>() ? std::min(Format::kFew, Format::kFewTiled) : Format::kFew;
}

// The format of many rows.
#if defined(QUIP_AMX)
template <int bits, TileOrder order, class Bytes>
using BytesMany = Split8<bits, by_rows(order), SumPairs<Bytes>>;
template <int bits, TileOrder order, uint32_t factor, uint32_t term>
using HalvesMany = Split8<bits, by_rows(order), ValuePairs<HalvesValue<factor, term>>>;
template <int bits, TileOrder order>
using LutMany = Split8<bits, by_rows(order), ValuePairs<LutValue>>;
template <int bits, TileOrder order>
using PairsMany = Split8<bits, by_rows(order), TablePairs>;
#else
template <int bits, TileOrder order, class Bytes>
using BytesMany = Bytes16<bits, order, Bytes>;
template <int bits, TileOrder order, uint32_t factor, uint32_t term>
using HalvesMany = Halves16<bits, order, factor, term>;
template <int bits, TileOrder order>
using LutMany = Lut16<bits, order>;
template <int bits, TileOrder order>
using PairsMany = Pairs16<bits, order>;
#endif

// Calls f(null pointer to Few) if it multiplies m rows, else f(null pointer to Many).
template <class Few, class Many, class F>
inline void with_either(int64_t m, F f) {
  m <= few<Few>() ? f(static_cast<Few*>(nullptr)) : f(static_cast<Many*>(nullptr));
}

// Whether with_order knows a format for a code, an order and a rate. Published tiles by rows have 4 bits at most.
constexpr bool has_order(Code code, TileOrder order, int bits) {
  const auto is = [&](auto... codes) { return ((code == codes) || ...); };
  switch (order) {
    case TileOrder::kOurs: return is(Code::kOneMad, Code::kThreeInst, Code::kMcg, Code::kMul1, Code::kLut);
    case TileOrder::kSwapped: return has_swapped(code) && bits >= least_bits(code) && bits <= most_bits(code);
    case TileOrder::kByRows: return bits <= 4 && is(Code::kOneMad, Code::kThreeInst, Code::kTable, Code::kPairs);
  }
  return false;
}

// Calls f(null pointer to the format that multiplies m rows) for the codes that have tiles of several orders.
template <int bits, TileOrder order, class F>
inline void with_order(Code code, int64_t m, F f) {
  const auto with = [&]<Code own, class Few, class Many>() {
    if constexpr (has_order(own, order, bits))
      if (code == own) with_either<Few, Many>(m, f);
  };
  const auto halves = [&]<Code own, uint32_t factor, uint32_t term>() {
    with.template operator()<own, Halves16<bits, order, factor, term>, HalvesMany<bits, order, factor, term>>();
  };
  const auto bytes = [&]<Code own, class Bytes>() {
    with.template operator()<own, Bytes8<bits, order, Bytes>, BytesMany<bits, order, Bytes>>();
  };
  bytes.template operator()<Code::kOneMad, OneMadBytes>();
  bytes.template operator()<Code::kMul1, Mul1Bytes>();
  bytes.template operator()<Code::kMul1Half, Mul1HalfBytes>();
  halves.template operator()<Code::kThreeInst, kThreeInstFactor, kThreeInstTerm>();
  halves.template operator()<Code::kMcg, kMcgFactor, 0>();
  with.template operator()<Code::kLut, Lut16<bits, order>, LutMany<bits, order>>();
  with.template operator()<Code::kTable, Lut16<bits, order>, LutMany<bits, order>>();
  with.template operator()<Code::kPairs, Pairs16<bits, order>, PairsMany<bits, order>>();
}

// Calls f(null pointer to the format that multiplies m rows).
template <class F>
inline void with_format(const Weight& w, int64_t m, F f) {
  with_bits<8>(w.bits, [&](auto b) {
    constexpr int bits = decltype(b)::value;
    if (w.code == Code::kGrid) return f(static_cast<Grid8<bits>*>(nullptr));
    if constexpr (bits <= 4) {
      if (w.code == Code::kE8p) {
        if constexpr (bits > 1) with_either<LatticeFew8<bits>, Lattice8<bits>>(m, f);
        return;
      }
      if (w.code == Code::kHyb)
        return w.grid ? with_either<Hyb8<bits, HybGrid>, HybMany<bits, HybGrid>>(m, f)
                      : with_either<Hyb8<bits, HybTable>, HybMany<bits, HybTable>>(m, f);
    }
    switch (w.order) {
      case TileOrder::kOurs: return with_order<bits, TileOrder::kOurs>(w.code, m, f);
      case TileOrder::kSwapped: return with_order<bits, TileOrder::kSwapped>(w.code, m, f);
      case TileOrder::kByRows: return with_order<bits, TileOrder::kByRows>(w.code, m, f);
    }
  });
}

// Whether with_format knows a format for it.
inline bool int8_takes(Code code, TileOrder order, int bits) {
  if (code == Code::kGrid || code == Code::kE8p || code == Code::kHyb)
    return order == TileOrder::kOurs && (bits <= 4 || code == Code::kGrid);
  return has_order(code, order, bits);
}

inline int few_of(const Weight& w) {
  int rows = 0;
  with_format(w, 1, [&](auto* format) { rows = few<std::remove_pointer_t<decltype(format)>>(); });
  return rows;
}

// Rows of x whose quads lie side by side, x[group][quad][row], where no tiles multiply them.
inline int64_t group_rows(const Weight& w, int64_t m) {
  bool alone = false;
  with_format(w, m, [&](auto* format) { alone = std::remove_pointer_t<decltype(format)>::kTabulated; });
  if (alone) return 1;
  if (m <= few_of(w)) return m;
  const int64_t groups = (m + kGroup - 1) / kGroup;
  return (m + groups - 1) / groups;
}

inline int64_t int8_bytes(const Weight& w, int64_t m) {
  int64_t bytes = 0;
  with_format(w, m, [&](auto* format) {
    using Format = std::remove_pointer_t<decltype(format)>;
    const int64_t rows = is_tiled<Format>() ? (m + 15) / 16 * 16 : m;  // the rest of the last tile is read, not used
    bytes = 4 * quads_of<Format>(padded(w.k)) * rows;
  });
  return bytes;
}

}  // namespace
}  // namespace quip
#endif
