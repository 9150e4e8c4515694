// SPDX-License-Identifier: Apache-2.0
// The nearest E8P code of each vector of eight numbers: cpu/search/encode_lattice.h, which explains it, with its sums and
// its choice of equal ones, so its codes bit for bit. A thread has a vector.
#include "../lattice_tables.h"
#include "kernels.h"

namespace quip {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 256;

// Of a row: eight absolute values, half of its squared norm, and 1 where its component 7 is negative.
struct alignas(16) Row {
  float absolute[8], half_norm, odd, unused[2];
};

KERNEL(kThreads) encode_lattice_kernel(const EncodeLattice e) {
  SHARED(memory);
  Row* const rows = reinterpret_cast<Row*>(memory);
  for (int r = threadIdx.x; r < kRows; r += blockDim.x) {
    float norm = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = float(e.rows[r] >> 3 * i & 7) * 0.5f;
      rows[r].absolute[i] = a, norm = fmaf(a, a, norm);
    }
    rows[r].half_norm = norm / 2, rows[r].odd = float(e.rows[r] >> 24);
  }
  device::sync_block();
  device::wait_for_writes();
  const int64_t vector = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (vector >= e.count) return;
  const float* const x = e.x + 8 * vector;
  float least = INFINITY;
  int code = 0;
#pragma unroll 1
  for (int parity = 0; parity < 2; ++parity) {
    float magnitude[8], norm = 0, best = -INFINITY;
    int negatives = 0, row = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float y = x[i] - (parity ? -0.25f : 0.25f);
      magnitude[i] = fabsf(y);
      negatives |= int(y < 0) << i;
      norm += device::product(y, y);
    }
    bool y_odd = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) y_odd ^= bool(negatives >> i & 1);
#pragma unroll 4
    for (int r = 0; r < kRows; ++r) {
      float dot = 0, cheapest = INFINITY;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float term = device::product(rows[r].absolute[i], magnitude[i]);
        dot += term;
        cheapest = term < cheapest ? term : cheapest;
      }
      const bool mismatch = (rows[r].odd != 0) != y_odd;
      const float score = dot - (mismatch ? 2 * cheapest : 0) - rows[r].half_norm;
      if (score > best) best = score, row = r;
    }
    const float distance = norm - 2 * best;
    if (!(distance < least)) continue;
    least = distance;
    int flips = 0, cheapest = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int flip = (negatives >> i & 1) ^ (i == 7 && rows[row].odd != 0);
      flips |= flip << (i / 2 + i % 2 * 4), odd ^= flip;
    }
    float lowest = INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float term = device::product(magnitude[i], rows[row].absolute[i]);
      if (term < lowest) lowest = term, cheapest = i / 2 + i % 2 * 4;
    }
    if (odd) flips ^= 1 << cheapest;
    code = row << 8 | (flips ^ parity);
  }
  e.codes[vector] = int16_t(code);
}

}  // namespace

std::string encode_lattice(EncodeLattice e, device::Stream stream) {
  static const LatticeTables tables;
  for (int r = 0; r < kRows; ++r) {
    e.rows[r] = uint32_t(tables.odd[r]) << 24;
    for (int i = 0; i < 8; ++i) e.rows[r] |= uint32_t(2 * tables.absolute[i][r]) << 3 * i;
  }
  const int blocks = int((e.count + kThreads - 1) / kThreads);
  return LAUNCH(encode_lattice_kernel, dim3(blocks), kThreads, kRows * int(sizeof(Row)), stream, e);
}

}  // namespace quip
