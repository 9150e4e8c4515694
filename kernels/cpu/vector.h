// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane vectors in the compiler's own notation: one source for every tier; a narrower machine splits them.
#pragma once
#include <cstdint>
#include <cstring>

namespace quip {
namespace {  // internal linkage: each tier keeps its own copy

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
constexpr int kLanes = 16;

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline Floats splat(float x) { return x - Floats{}; }
inline Floats to_floats(Words bits) { return (Floats)bits; }

// Sum of the lanes in a fixed order.
inline float sum(Floats v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// A constant vector of f(lane).
template <class V, class F>
inline V lanes(F f) {
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = f(i);
  return v;
}

}  // namespace
}  // namespace quip
