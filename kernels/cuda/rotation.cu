// SPDX-License-Identifier: Apache-2.0
// The rotations around decode_gemm: a thread block a row (and projection), its elements in shared memory as floats.
//
//   rotate_in    x * su, S_p within runs, H_q^T across, then fp16 times a power of two, or int8 of 127ths of the largest
//   rotate_out   sum of the splits, less the code's offset, S_p, H_q, times sv, plus bias
//
// A row too long for shared memory is worked on in global memory, by the same code.
#include "output.h"

namespace quip {
namespace {

constexpr int kThreads = 512;

// Calls f(i, element i of H_q across runs of p elements of v). A thread makes four elements of a column at a time, for which
// it reads the column once and four numbers of H_q in one load.
template <class F>
DEVICE void mix(const float* v, int count, const Rotation& r, F f) {
  if (r.q == 1) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(i, v[i]);
    return;
  }
  for (int u = threadIdx.x; u < count / 4; u += blockDim.x) {
    const int b = u % r.p, run = u / r.p / (r.q / 4) * r.q * r.p, a = u / r.p % (r.q / 4) * 4;
    float sum[4] = {};
    for (int j = 0; j < r.q; ++j) {
      const auto h = device::load16(r.base + j * r.q + a);
      const float x = v[run + j * r.p + b];
      sum[0] += device::float_of(h.x) * x, sum[1] += device::float_of(h.y) * x;
      sum[2] += device::float_of(h.z) * x, sum[3] += device::float_of(h.w) * x;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) f(run + (a + i) * r.p + b, sum[i]);
  }
}

// f(all threads' values), in an order that does not depend on anything; memory: 32 floats.
template <class F>
DEVICE float reduce(float v, float* memory, F f) {
  for (int step = kLanes / 2; step; step /= 2) v = f(v, device::shuffle_xor(v, step));
  device::sync_block();
  if (threadIdx.x % kLanes == 0) memory[threadIdx.x / kLanes] = v;
  device::sync_block();
  v = memory[0];
  for (int warp = 1; warp < int(blockDim.x) / kLanes; ++warp) v = f(v, memory[warp]);
  return v;
}

// The column that 16-byte unit `unit` of a row's chunk has at place `i` (layout.h); int8 places are four bytes wide.
DEVICE int column_of(XOrder order, int unit, int i) {
  const int t = unit % 4, block = unit / 4;
  switch (order) {
    case XOrder::kTrellis: return 32 * block + 16 * (t / 2) + 8 * (i / 2 % 2) + 4 * (t % 2) + 2 * (i / 4) + i % 2;
    case XOrder::kLattice: return 32 * block + 8 * t + i;
    default: return 32 * (block / 2) + 16 * (t / 2) + 8 * (i % 2) + 4 * (t % 2) + 2 * (block % 2) + i / 2;
  }
}

KERNEL(kThreads) rotate_in_kernel(const RotateIn r) {
  SHARED(memory);
  float* reduction = reinterpret_cast<float*>(memory);
  const int row = blockIdx.x, k = r.k;
  float* v = r.scratch ? r.scratch + int64_t(row) * r.work : reduction + kLanes;
  for (int i = threadIdx.x; i < k; i += blockDim.x) v[i] = read(r.x, r.type, int64_t(row) * k + i) * r.su[i];
  device::sync_block();
  walsh<1>(v, k, 0, r.rotation.p);
  if (r.rotation.q > 1) {
    mix(v, k, r.rotation, [&](int i, float value) { v[k + i] = value; });
    v += k;
    device::sync_block();
  }
  // A NaN is above infinity as an integer, and makes the whole row's result one.
  float largest = 0;
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const uint32_t magnitude = device::bits_of(v[i]) & 0x7FFFFFFFu;
    if (magnitude > device::bits_of(largest)) largest = device::float_of(magnitude);
  }
  largest = reduce(largest, reduction,
                   [](float a, float b) { return device::bits_of(a) > device::bits_of(b) ? a : b; });
  const uint32_t exponent = device::bits_of(largest) >> 23;
  const bool finite = exponent < 255, zero = largest < 1e-30f, bytes = r.order == XOrder::kBytes;
  const float scale = bytes ? largest / 127.0f : device::float_of((exponent < 9 ? 1 : exponent - 8) << 23);
  const float inverse = !finite || zero ? 0.0f : bytes ? 127.0f / largest : 1.0f / scale;

  const int units = row_bytes(r.order) / 16, row0 = row / kRowBlock * kRowBlock, rows = min(kRowBlock, r.m - row0);
  unsigned char* out = r.out + int64_t(row0) * r.chunks * row_bytes(r.order);
  float total = 0;  // of at most 32768 integers below 128, or of numbers below 512: exact, or rounded as sums are
  for (int u = threadIdx.x; u < r.chunks * units; u += blockDim.x) {
    const int chunk = u / units, unit = u % units, block = unit / 4 ^ (row & 1);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < (bytes ? 1 : 2); ++j) {
        const int c = chunk * kChunk + column_of(r.order, unit, bytes ? i : 2 * i + j);
        // Zero times a NaN is no number: select.
        const float value = c < k && inverse != 0 ? v[c] * inverse : 0;
        if (bytes) {
          const int q = device::to_int(value);
          word = uint32_t(q & 0xFF) * 0x01010101u;
          total += float(q);
        } else {
          const uint16_t half = device::to_half(value);
          word |= uint32_t(half) << (16 * j);
          total += device::from_half(half);
        }
      }
      words[i] = word;
    }
    const int64_t at = (int64_t(chunk) * rows + row - row0) * row_bytes(r.order) + block * kBlock + unit % 4 * 16;
    uint32_t* to = reinterpret_cast<uint32_t*>(out + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = words[i];
  }
  total = reduce(total, reduction, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) {
    const float norm = 1.0f / sqrtf(float(r.rotation.q) * float(r.rotation.p));
    r.scales[row] = finite ? (zero ? 0.0f : scale * norm) : device::float_of(0x7FC00000u);
    r.totals[row] = bytes ? device::float_of(uint32_t(int32_t(total))) : total;
  }
}

KERNEL(kThreads) rotate_out_kernel(const RotateOut r) {
  SHARED(memory);
  const int s = blockIdx.x, row = blockIdx.y;
  const RotateOut::Part& part = r.part[s];
  float* v = r.scratch ? r.scratch + (int64_t(row) * r.segments + s) * r.work : reinterpret_cast<float*>(memory);
  const float* from = r.partial + int64_t(row) * r.stride + part.start;
  for (int i = threadIdx.x; i < part.size; i += blockDim.x) {
    if (r.integers) {
      uint32_t sum = 0;
      for (int j = 0; j < r.splits; ++j) sum += device::bits_of(from[j * r.split_stride + i]);
      v[i] = centred(r.out, int32_t(sum), row);
    } else {
      float sum = from[i];
      for (int j = 1; j < r.splits; ++j) sum += from[j * r.split_stride + i];
      v[i] = centred(r.out, sum, row);
    }
  }
  device::sync_block();
  walsh<1>(v, part.size, 0, part.rotation.p);
  mix(v, part.size, part.rotation, [&](int i, float sum) { write(r.out, part.unit, row, part.start + i, sum); });
}

}  // namespace

std::string rotate_in(const RotateIn& r, device::Stream stream) {
  const int bytes = (kLanes + (r.scratch ? 0 : r.work)) * int(sizeof(float));
  return LAUNCH(rotate_in_kernel, dim3(r.m), kThreads, bytes, stream, r);
}

std::string rotate_out(const RotateOut& r, device::Stream stream) {
  const int bytes = r.scratch ? 16 : r.work * int(sizeof(float));
  return LAUNCH(rotate_out_kernel, dim3(r.segments, r.m), kThreads, bytes, stream, r);
}

}  // namespace quip
