// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane vectors in the compiler's own notation, one source for every tier. A narrower machine splits them.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

namespace quip {
namespace {  // internal linkage, so that each tier keeps its own copy

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
constexpr int kLanes = 16;

// The compiler keeps vectors wider than the machine's in memory, and it shuffles and compares them lane by lane.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// Vectors as wide as the machine's, for loops that compare or shuffle lanes.
constexpr int kRegisterLanes = kRegisterBytes / 4;
typedef float RegisterFloats __attribute__((vector_size(kRegisterBytes)));
typedef int32_t RegisterInts __attribute__((vector_size(kRegisterBytes)));

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

// A product, rounded: no compiler fuses it with the sum that it meets. So all tiers, and a GPU, round alike.
template <class V>
[[gnu::always_inline]] inline V rounded(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// Adds the upper half of the lanes to the lower half.
template <class Half, class V>
inline Half fold(V v) {
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  return halves[0] + halves[1];
}

// The sum of the lanes, in a fixed order.
inline float sum(Floats v) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  const Four rest = fold<Four>(fold<Eight>(v));
  return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}

// A constant vector of f(lane).
template <class V, class F>
inline V lanes(F f) {
  V v;
  for (int i = 0; i < int(sizeof v / sizeof v[0]); ++i) v[i] = f(i);
  return v;
}

template <auto from, class V, int... lane>
inline V shuffle(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, from(lane)...);
}

// Lane i is lane from(i) of a, with b behind a.
template <auto from, class V>
inline V shuffle(V a, V b) {
  return shuffle<from>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>());
}
template <auto from, class V>
inline V shuffle(V a) {
  return shuffle<from>(a, a);
}

// Calls f with the constants 0 .. count - 1.
template <int count, class F>
inline void unrolled(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, count>());
}

// Calls f with the constant that count is, of 1 .. most.
template <int most, class F>
inline void with_count(int64_t count, F f) {
  unrolled<most>([&](auto i) {
    if (count == i + 1) f(std::integral_constant<int, i + 1>());
  });
}

// The rates that are compiled, a bit each: programs under a sanitizer may have some of them (kernels/tests.cmake).
#ifndef QUIP_RATES
#define QUIP_RATES ~0u
#endif
// Calls f with the constant that bits is, of 1 .. most.
template <int most, class F>
inline void with_bits(int bits, F f) {
  with_count<most>(bits, [&](auto count) {
    if constexpr (QUIP_RATES >> count & 1) f(count);
  });
}

}  // namespace
}  // namespace quip
