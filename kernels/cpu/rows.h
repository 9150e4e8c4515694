// SPDX-License-Identifier: Apache-2.0
// Which rows of x are multiplied together. The choice moves no bit of a result.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quip {

// Which rows one of several layers multiplies: row order[i] of y is a product of row order[i] / repeats of x.
struct Rows {
  int64_t layer;
  std::vector<int64_t> order;
};

// Products that are in memory at once, those of one layer's rows excepted: 16 MiB. An allocation of 32 MiB and more is
// fresh memory each time, which takes longer than to write it.
constexpr int64_t kProductsAtOnce = 1 << 22;

// The first of the layers behind `begin` whose rows are not computed together with those of `begin`, of n outputs each.
inline size_t batch_end(const std::vector<Rows>& layers, size_t begin, int64_t n) {
  size_t end = begin, rows = 0;
  do rows += layers[end++].order.size();
  while (end < layers.size() && int64_t(rows + layers[end].order.size()) * n <= kProductsAtOnce);
  return end;
}

// Bytes that stay in the second-level cache beside others.
inline int64_t cached_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t level2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (level2 > 0) return level2 / 4 * 3;
#endif
  return 1 << 20;
}

// The rows of each layer in pieces of about equal size, whose int8 numbers stay in the cache while every panel of the
// weight is multiplied with them. A piece has at least 64 rows: the weight is decoded again for each.
inline std::vector<Rows> in_pieces(std::vector<Rows> layers, int64_t bytes_of_row) {
  const int64_t most = std::max<int64_t>(64, cached_bytes() / bytes_of_row);
  const auto fits = [&](const Rows& rows) { return int64_t(rows.order.size()) <= most; };
  if (std::all_of(layers.begin(), layers.end(), fits)) return layers;
  std::vector<Rows> pieces;
  for (const Rows& rows : layers) {
    const int64_t m = int64_t(rows.order.size()), count = (m + most - 1) / most;
    const int64_t size = ((m + count - 1) / count + kTile - 1) / kTile * kTile;
    for (int64_t i = 0; i < m; i += size)
      pieces.push_back({rows.layer, {rows.order.begin() + i, rows.order.begin() + std::min(m, i + size)}});
  }
  return pieces;
}

}  // namespace quip
