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

// Unnormalised Sylvester transform of p values, p a power of two. A stage of distance h pairs i and i ^ h. One pass
// over memory does two stages.
inline void butterflies(float* v, int64_t p) {
  if (p < kLanes) {
    for (int64_t h = 1; h < p; h *= 2)
      for (int64_t i = 0; i < p; ++i)
        if (!(i & h)) {
          float a = v[i], b = v[i + h];
          v[i] = a + b, v[i + h] = a - b;
        }
    return;
  }
  for (int64_t i = 0; i < p; i += kLanes) store(v + i, stage<8>(stage<4>(stage<2>(stage<1>(load<Floats>(v + i))))));
  int64_t h = kLanes;
  for (; 2 * h < p; h *= 4)
    for (int64_t start = 0; start < p; start += 4 * h)
      for (int64_t i = start; i < start + h; i += kLanes) {
        Floats a = load<Floats>(v + i), b = load<Floats>(v + i + h);
        Floats c = load<Floats>(v + i + 2 * h), d = load<Floats>(v + i + 3 * h);
        Floats s = a + b, t = a - b, u = c + d, w = c - d;
        store(v + i, s + u), store(v + i + h, t + w), store(v + i + 2 * h, s - u), store(v + i + 3 * h, t - w);
      }
  if (h < p)
    for (int64_t i = 0; i < h; i += kLanes) {
      Floats a = load<Floats>(v + i), b = load<Floats>(v + i + h);
      store(v + i, a + b), store(v + i + h, a - b);
    }
}

inline void rotate(float* row, int64_t n, Rotation rotation, float* scratch) {
  const auto [base, q, p] = rotation;
  if (q * p == 1) return;
  const float scale = 1.0f / std::sqrt(float(q * p));
  for (int64_t start = 0; start < n; start += q * p) {
    float* v = row + start;
    for (int64_t a = 0; a < q; ++a) butterflies(v + a * p, p);
    if (q == 1) {
      for (int64_t i = 0; i < p; ++i) v[i] *= scale;
      continue;
    }
    for (int64_t a = 0; a < q; ++a) {
      float* out = scratch + a * p;
      std::fill(out, out + p, 0.0f);
      for (int64_t b = 0; b < q; ++b) {
        const float factor = base[a * q + b] * scale;
        for (int64_t i = 0; i < p; ++i) out[i] += factor * v[b * p + i];
      }
    }
    std::copy(scratch, scratch + q * p, v);
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
