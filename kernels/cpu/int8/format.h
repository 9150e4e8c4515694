// SPDX-License-Identifier: Apache-2.0
// What the loops of panel.h know of a format.
//
// A format decodes a unit, kUnitRows rows x kColumns columns of the weight in kBytes bytes, to kQuads vectors for each
// set of rows that a vector holds. A lane of a vector is a row of the weight, and its 32 bits are a quad:
//
//   bytes   four columns, value + kOffset          repeated   one column, whose parts are summed, kRepeat of them
//   wide    two columns as int16                   signed     magnitudes and signs of two quads (TwoQuads)
//   two bytes   four columns twice, their low bytes and then their high ones
//
// A quad of the activation has the same columns, and it is the same for all lanes.
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace quip {
namespace {

// What most formats have. A format derives from this. It defines kColumns, kBytes, kQuads, and kFew, which is up to how
// many rows of x are multiplied while the weight is decoded. A decoded number is weight / unit() + kOffset + kRest.
struct FormatDefaults {
  static constexpr int kUnitRows = kTile;
  static constexpr int kOffset = 0;
  static constexpr float kRest = 0;
  static constexpr int kRepeat = 1;          // how often a column of x lies in a quad
  static constexpr bool kOnlyFew = false;    // whether another format multiplies many rows
  static constexpr bool kTabulated = false;  // whether products are looked up in tables of each row of x
  static constexpr bool kWhole = false;      // whether one call of decode gives all rows of a unit
  static constexpr int kFewTiled = 4;        // kFew where tiles multiply more rows, if that is less
  static constexpr bool kTwoBytes = false;   // whether a number takes two bytes, each in a vector of its own
  // Lane i of a vector of rows row, row + 1 .. is row first_row(row) + i * kRowStep.
  static constexpr int kRowStep = 1;
  static int64_t first_row(int64_t row) { return row; }
};

// kFew of a trellis code whose kernels gain by `few`. Above 4 bits, which few layers have, fewer are compiled.
constexpr int few_at(int bits, int few) { return bits <= 4 || few == 0 ? few : 1; }

// QuIP's grid: the numbers k of four columns are a quad, and a level is 2 k - (2^bits - 1).
template <int bits>
struct GridFormat : FormatDefaults {
  static constexpr int kColumns = 16, kQuads = 4, kBytes = 32 * bits, kOffset = (1 << (bits - 1)) - 1;
  static constexpr float kRest = 0.5f;
  float unit() const { return 2; }
  // Column 8 C + 2 cc + c is byte 2 C + 1 - c of quad cc.
  static int place(int column) { return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + 1 - column % 2; }
};

template <class Format>
constexpr bool is_wide() {
  return Format::kQuads * 2 == Format::kColumns * Format::kRepeat;
}

constexpr int kPad = 64;  // columns of x are padded to a multiple of this
inline int64_t padded(int64_t k) { return (k + kPad - 1) / kPad * kPad; }

template <class Format>
constexpr int64_t quads_of(int64_t columns) {
  return columns * Format::kQuads / Format::kColumns;
}

// The bytes of the units of kUnitRows rows of k columns.
template <class Format>
inline int64_t row_bytes(int64_t k) {
  return (k + Format::kColumns - 1) / Format::kColumns * Format::kBytes;
}

// Asks memory for bytes that will be read soon, into the first-level cache, or, if later, into the second.
constexpr int kFirstLevel = 3, kSecondLevel = 2;
template <int level = kFirstLevel>
inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, 0, level);
}

}  // namespace
}  // namespace quip
