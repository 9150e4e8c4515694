// SPDX-License-Identifier: Apache-2.0
// Orthonormal Hadamard transforms of a row of floats, in place.
#pragma once
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace quip {
namespace {

// Unnormalised Sylvester transform of p values, p a power of two. A stage of distance h pairs i and i ^ h.
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
  for (int64_t i = 0; i < p; i += kLanes) {
    Floats x = load<Floats>(v + i);
    for (int h = 1; h < kLanes; h *= 2) {
      Ints partner = lanes<Ints>([h](int lane) { return lane ^ h; });
      Floats sign = lanes<Floats>([h](int lane) { return lane & h ? -1.0f : 1.0f; });
      x = __builtin_shuffle(x, partner) + x * sign;
    }
    store(v + i, x);
  }
  for (int64_t h = kLanes; h < p; h *= 2)
    for (int64_t start = 0; start < p; start += 2 * h)
      for (int64_t i = start; i < start + h; i += kLanes) {
        Floats a = load<Floats>(v + i), b = load<Floats>(v + i + h);
        store(v + i, a + b), store(v + i + h, a - b);
      }
}

inline void hadamard(float* row, int64_t n, const float* base, int64_t q, int64_t p, float* scratch) {
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

}  // namespace
}  // namespace quip
