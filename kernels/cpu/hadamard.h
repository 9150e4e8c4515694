// SPDX-License-Identifier: Apache-2.0
// Rotations: orthonormal Hadamard transforms of a row, with signs before or after, from and to the caller's dtype.
#pragma once
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace quip {
namespace {

// The stages of distance 1, 2, 4 and 8 inside one vector.
template <int h>
constexpr int partner(int lane) {
  return lane ^ h;
}
template <int h>
inline Floats stage(Floats x) {
  const Floats sign = lanes<Floats>([](int lane) { return lane & h ? -1.0f : 1.0f; });
  return shuffle<partner<h>>(x) + x * sign;
}

// The stages of distance h, 2 h .. between the 2^count runs of h values that v has, and a factor.
template <int count>
inline void stages(float* v, int64_t h, float factor) {
  constexpr int runs = 1 << count;
  for (int64_t i = 0; i < h; i += kRegisterLanes) {
    RegisterFloats x[runs];  // in registers: every loop over it is unrolled
    unrolled<runs>([&](auto r) { x[r] = load<RegisterFloats>(v + r * h + i); });
    unrolled<count>([&](auto s) {
      unrolled<runs>([&](auto r) {
        constexpr int other = r | 1 << s;
        if constexpr (r != other) {
          const RegisterFloats sum = x[r] + x[other];
          x[other] = x[r] - x[other], x[r] = sum;
        }
      });
    });
    unrolled<runs>([&](auto r) { store(v + r * h + i, x[r] * factor); });
  }
}

// Unnormalised Sylvester transform of p values, p a power of two, times a factor. A stage of distance h pairs i and
// i ^ h. One pass over memory does up to three stages.
inline void butterflies(float* v, int64_t p, float factor) {
  if (p < kLanes) {
    for (int64_t h = 1; h < p; h *= 2)
      for (int64_t i = 0; i < p; ++i)
        if (!(i & h)) {
          float a = v[i], b = v[i + h];
          v[i] = a + b, v[i + h] = a - b;
        }
    for (int64_t i = 0; i < p; ++i) v[i] *= factor;
    return;
  }
  const float only = p == kLanes ? factor : 1.0f;
  for (int64_t i = 0; i < p; i += kLanes)
    store(v + i, stage<8>(stage<4>(stage<2>(stage<1>(load<Floats>(v + i))))) * only);
  for (int64_t h = kLanes, next; h < p; h = next) {
    const int count = 8 * h <= p ? 3 : 4 * h <= p ? 2 : 1;
    next = h << count;
    const float last = next == p ? factor : 1.0f;
    for (int64_t start = 0; start < p; start += next)
      with_count<3>(count, [&](auto own) { stages<own>(v + start, h, last); });
  }
}

// Multiplies a few columns of the q runs of p values by a matrix. Each sum goes from the first run to the last.
template <class V>
inline void multiply_columns(float* v, const float* matrix, int64_t q, int64_t p, float* columns) {
  constexpr int kTogether = 4, kWidth = sizeof(V) / sizeof(float);
  // Together in memory: runs that are a power of two apart would take each other's place in the cache.
  for (int64_t b = 0; b < q; ++b) store(columns + b * kWidth, load<V>(v + b * p));
  const auto sums = [&](int64_t a, auto count) __attribute__((always_inline)) {
    V sum[count];
    unrolled<count>([&](auto j) { sum[j] = V{}; });
    for (int64_t b = 0; b < q; ++b) {
      const V x = load<V>(columns + b * kWidth);
      unrolled<count>([&](auto j) { sum[j] += matrix[(a + j) * q + b] * x; });
    }
    unrolled<count>([&](auto j) { store(v + (a + j) * p, sum[j]); });
  };
  int64_t a = 0;
  for (; a + kTogether <= q; a += kTogether) sums(a, std::integral_constant<int, kTogether>());
  for (; a < q; ++a) sums(a, std::integral_constant<int, 1>());
}

inline void rotate(float* row, int64_t n, Rotation rotation, float* scratch) {
  const auto [base, q, p] = rotation;
  if (q * p == 1) return;
  const float scale = 1.0f / std::sqrt(float(q * p));
  if (q == 1) {  // the scratch may be null
    for (int64_t start = 0; start < n; start += p) butterflies(row + start, p, scale);
    return;
  }
  float* const matrix = scratch + q * kLanes;
  for (int64_t i = 0; i < q * q; ++i) matrix[i] = base[i] * scale;
  for (int64_t start = 0; start < n; start += q * p) {
    float* v = row + start;
    for (int64_t a = 0; a < q; ++a) butterflies(v + a * p, p, 1.0f);
    int64_t i = 0;
    for (; i + kRegisterLanes <= p; i += kRegisterLanes) multiply_columns<RegisterFloats>(v + i, matrix, q, p, scratch);
    for (; i < p; ++i) multiply_columns<float>(v + i, matrix, q, p, scratch);
  }
}

// Rounds to nearest even; NaN stays NaN.
inline uint16_t to_bfloat(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  return uint16_t(f != f ? u >> 16 | 0x40 : rounded);
}

inline void rotate_in(const void* x, Type type, const float* su, int64_t k, Rotation rotation, float* out,
                      float* scratch) {
  if (type == Type::kFloat) {
    const float* in = static_cast<const float*>(x);
    for (int64_t i = 0; i < k; ++i) out[i] = in[i] * su[i];
  } else if (type == Type::kHalf) {
    const _Float16* in = static_cast<const _Float16*>(x);
    for (int64_t i = 0; i < k; ++i) out[i] = float(in[i]) * su[i];
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t u = uint32_t(in[i]) << 16;
      float f;
      std::memcpy(&f, &u, sizeof f);
      out[i] = f * su[i];
    }
  }
  rotate(out, k, rotation, scratch);
}

inline void rotate_out(float* row, int64_t n, Rotation rotation, const float* sv, Type type, void* y, float* scratch) {
  rotate(row, n, rotation, scratch);
  if (type == Type::kFloat) {
    float* out = static_cast<float*>(y);
    for (int64_t i = 0; i < n; ++i) out[i] = row[i] * sv[i];
  } else if (type == Type::kHalf) {
    _Float16* out = static_cast<_Float16*>(y);
    for (int64_t i = 0; i < n; ++i) out[i] = _Float16(row[i] * sv[i]);
  } else {
    uint16_t* out = static_cast<uint16_t*>(y);
    for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat(row[i] * sv[i]);
  }
}

}  // namespace
}  // namespace quip
