// SPDX-License-Identifier: Apache-2.0
// From sums to outputs. rotate_out and the epilogue of decode_gemm share this, so that both give the same bits.
//
// Where a sum and a product meet, fmaf says that they are rounded once, so that the compiler does not choose.
#pragma once
#include "device.h"
#include "kernels.h"

namespace quip {

// Butterflies of `radix` elements, `span` apart. kRows rows of `count` elements lie `stride` apart.
template <int radix, int kRows>
DEVICE void butterflies(float* v, int count, int stride, int span) {
#pragma unroll 1
  for (int u = threadIdx.x; u < count / radix * kRows; u += blockDim.x) {
    const int i = u / kRows, low = i & (span - 1);
    float* first = v + u % kRows * stride + (i - low) * radix + low;
    float e[radix];
#pragma unroll
    for (int j = 0; j < radix; ++j) e[j] = first[j * span];
#pragma unroll
    for (int half = 1; half < radix; half *= 2) {
#pragma unroll
      for (int j = 0; j < radix; ++j) {
        if (j & half) continue;
        const float a = e[j], b = e[j | half];
        e[j] = a + b, e[j | half] = a - b;
      }
    }
#pragma unroll
    for (int j = 0; j < radix; ++j) first[j * span] = e[j];
  }
  device::sync_block();
}

// S_kRun of the numbers of a warp, four neighbours a lane: the additions of the butterflies in their order.
DEVICE void walsh_of_warp(float (&e)[4]) {
  static_assert(kRun == 4 * kLanes);
  const float a = e[0] + e[1], b = e[0] - e[1], c = e[2] + e[3], d = e[2] - e[3];
  e[0] = a + c, e[1] = b + d, e[2] = a - c, e[3] = b - d;
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) {
    const float sign = device::lane_index() & mask ? -1.0f : 1.0f;  // fused or not, the product is exact
#pragma unroll
    for (int j = 0; j < 4; ++j) e[j] = device::shuffle_xor(e[j], mask) + sign * e[j];
  }
}

// S_p within each run of p elements, not normalised.
template <int kRows>
DEVICE void walsh(float* v, int count, int stride, int p) {
  if (p == kRun) {
#pragma unroll 1
    for (int u = threadIdx.x / kLanes; u < count / kRun * kRows; u += blockDim.x / kLanes) {
      float* const four = v + u % kRows * stride + u / kRows * kRun + threadIdx.x % kLanes * 4;
      const auto bits = device::load16(four);
      float e[4] = {device::float_of(bits.x), device::float_of(bits.y), device::float_of(bits.z),
                    device::float_of(bits.w)};
      walsh_of_warp(e);
      device::store16(four,
                      {device::bits_of(e[0]), device::bits_of(e[1]), device::bits_of(e[2]), device::bits_of(e[3])});
    }
    device::sync_block();
    return;
  }
  int span = 1;
#pragma unroll 1
  for (; span * 8 <= p; span *= 8) butterflies<8, kRows>(v, count, stride, span);
  if (span * 4 <= p) butterflies<4, kRows>(v, count, stride, span), span *= 4;
  if (span * 2 <= p) butterflies<2, kRows>(v, count, stride, span);
}

DEVICE float from_16_bits(Type type, uint16_t bits) {
  return type == Type::kHalf ? device::from_half(bits) : device::from_bfloat(bits);
}

DEVICE float read(const void* from, Type type, int64_t i) {
  if (type == Type::kFloat) return static_cast<const float*>(from)[i];
  return from_16_bits(type, static_cast<const uint16_t*>(from)[i]);
}

// The sum of a row of rotated x, exact; 0 where nothing takes it.
DEVICE int64_t total_of(const Output& out, int row) {
  int64_t total = 0;
  if (out.offset == 0) return total;
#pragma unroll 8
  for (int i = 0; i < out.slices; ++i) total += out.totals[int64_t(row) * out.slices + i];
  return total;
}

// A row's sum, less what the code's numbers are too large by. Integers are added modulo 2^32: the result is below 2^31.
DEVICE float centred(const Output& out, float sum, int64_t total) {
  return fmaf(-out.offset, float(total) * 0x1p-24f, sum);
}
DEVICE float centred(const Output& out, int32_t sum, int64_t total) {
  return float(int32_t(uint32_t(sum) - uint32_t(int(out.offset)) * uint32_t(total)));
}

// Writes an element of y. A rotated sum is multiplied by unit, the row's scale and sv.
DEVICE void write(const Output& out, float unit, int row, int column, float sum) {
  const float added = out.bias ? read(out.bias, out.bias_type, column) : 0, scale = unit * out.scales[row];
  int64_t sv = column, i = int64_t(row) * out.n + column;
  if (out.routed) {
    sv += int64_t(max(out.routed[row].expert, 0)) * out.n;
    i = int64_t(out.routed[row].result) * out.n + column;
  }
  const float v = fmaf(sum, scale * out.sv[sv], added);
  if (out.type == Type::kFloat)
    static_cast<float*>(out.y)[i] = v;
  else
    static_cast<uint16_t*>(out.y)[i] = out.type == Type::kHalf ? device::to_half(v) : device::to_bfloat(v);
}

}  // namespace quip
