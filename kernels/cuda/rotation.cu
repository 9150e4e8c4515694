// SPDX-License-Identifier: Apache-2.0
// The rotations around decode_gemm. A thread block has a row (of a part), with its elements in shared memory as floats.
//
//   rotate_in    x * su, S_p within runs, H_q^T across, then fp16 times a power of two, or int8 in 127ths of the
//                largest
//   rotate_out   the sum of the splits, less the code's offset, S_p, H_q, times sv, plus bias
//
// One thread block per row leaves most of a GPU idle where rows are few, so a row is cut in eight slices. A block makes
// the elements whose number is its own modulo 8. It reads the whole row, needs one result in eight of the first three
// butterflies of S_p, and then works on an eighth. The additions and their order are those of one slice, and so are the
// bits.
//
// A row that is too long for shared memory is worked on in global memory, by the same code.
#include <algorithm>

#include "input.h"

namespace quip {
namespace {

constexpr int kThreads = 512;

// Element `slice` of S_8 of every eight elements in a row. read(i, e): e = elements i .. i + 7.
template <class F>
DEVICE void slice_of(float* v, int count, int slice, F read) {
#pragma unroll 2
  for (int u = threadIdx.x; u < count / kSlices; u += blockDim.x) {
    float e[8];
    read(8 * u, e);
#pragma unroll
    for (int half = 1; half < 8; half *= 2) {
#pragma unroll
      for (int i = 0; i < 8; i += 2 * half) e[i] = slice & half ? e[i] - e[i + half] : e[i] + e[i + half];
    }
    v[u] = e[0];
  }
}

DEVICE void read_floats(const float* from, float (&e)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const auto four = device::load16(from + i);
    e[i] = device::float_of(four.x), e[i + 1] = device::float_of(four.y);
    e[i + 2] = device::float_of(four.z), e[i + 3] = device::float_of(four.w);
  }
}

// Eight elements from an address aligned to 16.
DEVICE void read_eight(const void* from, Type type, int64_t i, float (&e)[8]) {
  if (type == Type::kFloat) return read_floats(static_cast<const float*>(from) + i, e);
  const auto four = device::load16(static_cast<const uint16_t*>(from) + i);
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) e[j] = from_16_bits(type, uint16_t(words[j / 2] >> (16 * (j % 2))));
}

// Calls f(i, element i of H_q across runs of p elements of v). A thread makes four elements of a column at a time. For
// them it reads the column once, and four numbers of H_q in one load.
template <class F>
DEVICE void mix(const float* v, int count, const Rotation& r, F f) {
  if (r.q == 1) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(i, v[i]);
    return;
  }
  for (int u = threadIdx.x; u < count / 4; u += blockDim.x) {
    const int b = u % r.p, run = u / r.p / (r.q / 4) * r.q * r.p, a = u / r.p % (r.q / 4) * 4;
    float sum[4] = {};
#pragma unroll 4
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

// f(all threads' values), in an order that does not depend on anything; memory: 32 of them.
template <class T, class F>
DEVICE T reduce(T v, T* memory, F f) {
  v = reduce_warp(v, f);
  device::sync_block();
  if (threadIdx.x % kLanes == 0) memory[threadIdx.x / kLanes] = v;
  device::sync_block();
  v = memory[0];
  for (int warp = 1; warp < int(blockDim.x) / kLanes; ++warp) v = f(v, memory[warp]);
  return v;
}

// Where there are no experts.
DEVICE RoutedRow plain_row(const RotateIn& r, int row) {
  const int first = row / r.row_block * r.row_block;
  return {row, 0, first, r.columns ? r.row_block : min(r.row_block, r.m - first)};
}

KERNEL(kThreads) rotate_in_kernel(const RotateIn r) {
  SHARED(memory);
  const int row = blockIdx.x, slice = blockIdx.y, k = r.k, count = k / r.slices;
  const bool bytes = r.order == XOrder::kBytes;
  float* v = reinterpret_cast<float*>(memory) + 2 * kLanes;
  if (r.scratch) v = r.scratch + (int64_t(row) * r.slices + slice) * r.work;
  float largest = 0;
  device::wait_for_writes();  // before the next may start: what it reads at once may have been written just now
  if (r.early) device::start_next();
  const RoutedRow own = r.routed ? r.routed[row] : plain_row(r, row);
  if (own.rows == 0) {
    const int64_t begin = int64_t(own.result) * r.n;
    for (int i = slice * blockDim.x + threadIdx.x; i < r.n; i += r.slices * blockDim.x)
      if (r.type == Type::kFloat)
        static_cast<float*>(r.y)[begin + i] = 0;
      else
        static_cast<uint16_t*>(r.y)[begin + i] = 0;
    return;
  }
  const int64_t x_row = int64_t(r.routed ? own.result / r.results : row) * k;
  const float* const su = r.su + int64_t(max(own.expert, 0)) * k;
  if (r.slices == 1) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
      v[i] = read(r.x, r.type, x_row + i) * su[i];
      largest = larger(largest, v[i]);
    }
  } else {
    slice_of(v, k, slice, [&](int i, float (&e)[8]) {
      float signs[8];
      read_eight(r.x, r.type, x_row + i, e), read_floats(su + i, signs);
#pragma unroll
      for (int j = 0; j < 8; ++j) e[j] *= signs[j], largest = larger(largest, e[j]);
    });
  }
  device::sync_block();
  const Rotation rotation = {r.rotation.base, r.rotation.q, r.rotation.p / r.slices};
  walsh<1>(v, count, 0, rotation.p);
  if (rotation.q > 1) {
    mix(v, count, rotation, [&](int i, float value) { v[count + i] = value; });
    v += count;
    device::sync_block();
  }
  if (bytes) {  // 127ths of what the largest became
    float rotated = largest > 0 && device::bits_of(largest) < 0x7F800000u ? 0 : largest;
    for (int i = threadIdx.x; i < k; i += blockDim.x) rotated = larger(rotated, v[i]);
    largest = rotated;
  }
  largest = reduce(largest, reinterpret_cast<float*>(memory), larger);
  if (own.expert < 0) largest = device::float_of(0x7FC00000u);
  if (!r.early) device::start_next();
  const RowScale scale = scale_of(largest, r.growth, bytes);

  const int in_block = row - own.first, rows = own.rows;
  unsigned char* out = r.out + int64_t(own.first) * r.chunks * row_bytes(r.order);
  int64_t total = 0;
  for (int i = threadIdx.x; i < r.chunks * kChunk / r.slices; i += blockDim.x) {
    const int c = i * r.slices + slice;
    const float value = c < k && scale.inverse != 0 ? v[i] * scale.inverse : 0;  // selected: 0 times a NaN is one
    const int place = place_of(r.order, c % kChunk);
    unsigned char* const chunk = out + int64_t(c / kChunk) * rows * row_bytes(r.order);
    unsigned char* const to = r.order == XOrder::kRows
                                  ? r.out + (int64_t(row) * r.chunks + c / kChunk) * row_bytes(r.order) + place
                              : r.columns ? chunk + place_in_columns(place, in_block, rows)
                                          : chunk + in_block * row_bytes(r.order) + (place ^ (in_block & 1) * kBlock);
    if (bytes) {
      const int q = device::to_int(value);
      *reinterpret_cast<uint32_t*>(to) = uint32_t(q & 0xFF) * 0x01010101u;
      total += q;
    } else {
      const uint16_t half = device::to_half(value);
      *reinterpret_cast<uint16_t*>(to) = half;
      total += fixed_point(half);
    }
  }
  total = reduce(total, reinterpret_cast<int64_t*>(memory), [](int64_t a, int64_t b) { return a + b; });
  if (threadIdx.x != 0) return;
  r.totals[int64_t(row) * r.slices + slice] = total;
  if (slice == 0) r.scales[row] = scale.scale * norm_of(r.rotation);
}

KERNEL(kThreads) rotate_out_kernel(const RotateOut r) {
  SHARED(memory);
  const int row = blockIdx.x, s = blockIdx.y, slice = blockIdx.z;
  const RotateOut::RotatedPart& part = r.part[s];
  float* v = reinterpret_cast<float*>(memory);
  if (r.scratch) v = r.scratch + ((int64_t(row) * r.parts + s) * r.slices + slice) * r.work;
  const float* from = r.partial + int64_t(row) * r.stride + part.start;
  device::start_next();
  device::wait_for_writes();
  if (r.out.routed && r.out.routed[row].rows == 0) return;
  const int64_t total = total_of(r.out, row);
  // With integers what is read and added are their bits.
  const auto add = [&](float a, float b) {
    return r.integers ? device::float_of(device::bits_of(a) + device::bits_of(b)) : a + b;
  };
  const auto ready = [&](float sum) {
    return r.integers ? centred(r.out, int32_t(device::bits_of(sum)), total) : centred(r.out, sum, total);
  };
  if (r.slices > 1) {
    slice_of(v, part.size, slice, [&](int i, float (&e)[8]) {
      read_floats(from + i, e);
#pragma unroll 2
      for (int j = 1; j < r.splits; ++j) {
        float more[8];
        read_floats(from + j * r.split_stride + i, more);
#pragma unroll
        for (int l = 0; l < 8; ++l) e[l] = add(e[l], more[l]);
      }
#pragma unroll
      for (int l = 0; l < 8; ++l) e[l] = ready(e[l]);
    });
  } else {
    for (int i = threadIdx.x; i < part.size; i += blockDim.x) {
      float sum = from[i];
      for (int j = 1; j < r.splits; ++j) sum = add(sum, from[j * r.split_stride + i]);
      v[i] = ready(sum);
    }
  }
  device::sync_block();
  const Rotation rotation = {part.rotation.base, part.rotation.q, part.rotation.p / r.slices};
  const int count = part.size / r.slices;
  walsh<1>(v, count, 0, rotation.p);
  mix(v, count, rotation,
      [&](int i, float sum) { write(r.out, part.unit, row, part.start + i * r.slices + slice, sum); });
}

// Threads that have eight elements of a row each, if there are as many.
int threads_of(int count) { return std::clamp((count / 8 + kLanes - 1) / kLanes * kLanes, 64, kThreads); }

}  // namespace

std::string rotate_in(const RotateIn& r, device::Stream stream) {
  const int bytes = (2 * kLanes + (r.scratch ? 0 : r.work)) * int(sizeof(float));
  return LAUNCH(rotate_in_kernel, dim3(r.m, r.slices), threads_of(r.k), bytes, stream, r);
}

std::string rotate_out(const RotateOut& r, device::Stream stream) {
  const int bytes = r.scratch ? 16 : r.work * int(sizeof(float));
  return LAUNCH(rotate_out_kernel, dim3(r.m, r.parts, r.slices), threads_of(r.work * r.slices), bytes, stream, r);
}

}  // namespace quip
