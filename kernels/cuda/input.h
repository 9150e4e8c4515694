// SPDX-License-Identifier: Apache-2.0
// From x to rotated activations. rotate_in and the prologue of decode_gemm share this, so that both give the same bits.
#pragma once
#include "output.h"

namespace quip {

// Of two magnitudes; a NaN is above infinity as an integer, and makes the whole row's result one.
DEVICE float larger(float a, float b) {
  return device::float_of(max(device::bits_of(a) & 0x7FFFFFFFu, device::bits_of(b) & 0x7FFFFFFFu));
}

// A row's scale, before the rotation's norm, and what its rotated elements are multiplied by, or 0: then they are 0.
struct RowScale {
  float scale, inverse;
};

// For a row of this largest magnitude. fp16: a power of two, for sums of q p numbers are below 2^growth times the
// largest, and become numbers below 512.
DEVICE RowScale scale_of(float largest, int growth, bool bytes) {
  const uint32_t exponent = (device::bits_of(largest) >> 23) + (bytes ? 0 : growth);
  const bool finite = exponent < 255, zero = largest < 1e-30f;
  const float scale = bytes ? largest / 127.0f : device::float_of((exponent < 9 ? 1 : exponent - 8) << 23);
  return {finite ? (zero ? 0.0f : scale) : device::float_of(0x7FC00000u), !finite || zero ? 0.0f
                                                                          : bytes         ? 127.0f / largest
                                                                                          : 1.0f / scale};
}

DEVICE float norm_of(const Rotation& r) { return 1.0f / sqrtf(float(r.q) * float(r.p)); }

// Where column `c` of a chunk lies in a row of it, in bytes (layout.h); an int8 is four bytes wide.
DEVICE int place_of(XOrder order, int c) {
  const int t = c % 32 / 16 * 2 + c / 4 % 2;
  switch (order) {
    case XOrder::kTrellis: return c / 32 * kBlock + t * 16 + c / 2 % 2 * 8 + c / 8 % 2 * 4 + c % 2 * 2;
    case XOrder::kTilesByRows: return c / 8 % 2 * kBlock + c / 16 * 16 + c % 8 * 2;
    case XOrder::kLattice:
    case XOrder::kRows: return 2 * c;
    default: return (c / 32 * 2 + c / 2 % 2) * kBlock + t * 16 + c % 2 * 8 + c / 8 % 2 * 4;
  }
}

// The same from the first row's first byte, where each column of 8 numbers that operand B of a multiplication takes has
// `rows` rows.
DEVICE int place_in_columns(int place, int row, int rows) {
  return ((place / kBlock * 4 + place / 4 % 4) * rows + row) * 16 + place / 16 % 4 * 4 + place % 4;
}

// A finite fp16 number in units of 2^-24.
DEVICE int64_t fixed_point(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int64_t magnitude = int64_t((half & 1023) | (exponent ? 1024 : 0)) << max(exponent - 1, 0);
  return half & 0x8000 ? -magnitude : magnitude;
}

DEVICE float shuffle_xor(float v, int mask) { return device::shuffle_xor(v, mask); }
DEVICE int64_t shuffle_xor(int64_t v, int mask) {
  const int from = device::lane_index() ^ mask;
  const uint64_t high = device::shuffle(uint32_t(uint64_t(v) >> 32), from);
  return int64_t(high << 32 | device::shuffle(uint32_t(v), from));
}

// f of all lanes' values, in an order that does not depend on anything.
template <class T, class F>
DEVICE T reduce_warp(T v, F f) {
  for (int step = kLanes / 2; step; step /= 2) v = f(v, shuffle_xor(v, step));
  return v;
}

// What a thread block that rotates x has in shared memory of each row: a number a warp of sums and magnitudes.
struct RowMemory {
  int64_t totals[kFewRows][kMostWarps];
  float largest[kFewRows][kMostWarps];
  float scales[kFewRows];
};
static_assert(sizeof(RowMemory) % 16 == 0);

// Four elements of x * su.
DEVICE void read_four(const RotateIn& in, int row, int i, float (&e)[4]) {
  const int64_t at = int64_t(row) * in.k + i;
  const auto su = device::load16(in.su + i);
  if (in.type == Type::kFloat) {
    const auto x = device::load16(static_cast<const float*>(in.x) + at);
    e[0] = device::float_of(x.x), e[1] = device::float_of(x.y), e[2] = device::float_of(x.z),
    e[3] = device::float_of(x.w);
  } else {
    const uint32_t* const x = static_cast<const uint32_t*>(in.x) + at / 2;
    const uint32_t low = x[0], high = x[1];
    e[0] = from_16_bits(in.type, uint16_t(low)), e[1] = from_16_bits(in.type, uint16_t(low >> 16));
    e[2] = from_16_bits(in.type, uint16_t(high)), e[3] = from_16_bits(in.type, uint16_t(high >> 16));
  }
  e[0] *= device::float_of(su.x), e[1] *= device::float_of(su.y);
  e[2] *= device::float_of(su.z), e[3] *= device::float_of(su.w);
}

// Writes `chunks` chunks of all rows, rotated in runs of kRun, to out [chunk][row] in shared memory, and what memory
// has. A warp takes a run. The scale is of the whole row, so each thread block reads all of it once.
template <XOrder order>
DEVICE void rotate_runs(const RotateIn& in, bool totals, int begin, int chunks, unsigned char* out, RowMemory& memory) {
  const int lane = device::lane_index(), warp = device::warp_index(), warps = blockDim.x / kLanes;
#pragma unroll 1
  for (int row = 0; row < in.m; ++row) {
    float largest = 0;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < in.k; i += 4 * blockDim.x) {
      float e[4];
      read_four(in, row, i, e);
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = larger(largest, e[j]);
    }
    largest = reduce_warp(largest, larger);
    if (lane == 0) memory.largest[row][warp] = largest;
  }
  device::sync_block();
  const int runs = chunks * kChunk / kRun;
#pragma unroll 1
  for (int row = 0; row < in.m; ++row) {
    const float largest = reduce_warp(lane < warps ? memory.largest[row][lane] : 0.0f, larger);
    const RowScale scale = scale_of(largest, in.growth, false);
    if (threadIdx.x == 0) memory.scales[row] = scale.scale * norm_of(in.rotation);
    int64_t total = 0;
#pragma unroll 1
    for (int run = (warp + row * runs) % warps; run < runs; run += warps) {  // where runs are few, rows share the warps
      float e[4];
      read_four(in, row, begin * kChunk + run * kRun + 4 * lane, e);
      walsh_of_warp(e);
      const int c = run * kRun + 4 * lane;
      unsigned char* const to = out + (c / kChunk * in.m + row) * row_bytes(order);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const auto ready = [&](float v) { return scale.inverse != 0 ? v * scale.inverse : 0.0f; };
        const uint32_t halves = device::to_halves(ready(e[j]), ready(e[j + 1]));
        *reinterpret_cast<uint32_t*>(to + (place_of(order, c % kChunk + j) ^ (row & 1) * kBlock)) = halves;
        if (totals) total += fixed_point(uint16_t(halves)) + fixed_point(uint16_t(halves >> 16));
      }
    }
    if (!totals) continue;
    total = reduce_warp(total, [](int64_t a, int64_t b) { return a + b; });
    if (lane == 0) memory.totals[row][warp] = total;
  }
}

}  // namespace quip
