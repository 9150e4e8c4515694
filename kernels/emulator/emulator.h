// SPDX-License-Identifier: Apache-2.0
// The machine of device.h on a CPU. A C++20 compiler compiles the kernels against this file; scheduler.cpp runs them,
// one fiber per CUDA thread. What a GPU leaves undefined is an error here, or it turns up as a wrong result.
//
//   QUIP_VLLM_EMULATOR   two words with a comma: when copy_async copies, "deferred" (when waited for) or "eager" (at
//                        once), and who runs next, "roundrobin", "depthfirst", "reverse" or "random:SEED"
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

#include "../cuda/layout.h"

#define KERNEL(...) void
#define DEVICE inline
#define HOST_DEVICE inline
#define SHARED(name) unsigned char* const name = quip::device::shared_memory()
#define threadIdx (quip::device::thread_index())
#define blockIdx (quip::device::block_index())
#define blockDim (quip::device::block_size())
#define gridDim (quip::device::grid_size())

using std::max, std::min;  // nvcc has them so

#if !defined(__VECTOR_TYPES_H__)  // CUDA's header, if it came first
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#endif

namespace quip {
namespace device {

using Site = std::source_location;
using Stream = void*;

// Out of line for ThreadSanitizer, which must not see the runtime's own memory. Constant for the thread that asks.
[[gnu::const]] dim3 thread_index();
[[gnu::const]] dim3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] unsigned char* shared_memory();

// Ends the launch with this sentence. It does not return, which ASan had better not know: it would clean the wrong
// stack.
void stop(const char* what, Site site);

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

void sync_block(Site site = Site::current());
void sync_warp(Site site = Site::current());
uint32_t shuffle(uint32_t v, int from, Site site = Site::current());
float shuffle_xor(float v, int mask, Site site = Site::current());
DEVICE int lane_index() { return int(threadIdx.x % 32); }
DEVICE int warp_index(Site site = Site::current()) { return int(shuffle(threadIdx.x / 32, 0, site)); }
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current());
void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current());

DEVICE uint32_t bits_of(float v) { return std::bit_cast<uint32_t>(v); }
DEVICE float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= uint32_t(uint8_t(bytes >> 8 * (selector >> 4 * i & 7))) << 8 * i;
  return d;
}

DEVICE uint32_t funnel_left(uint32_t high, uint32_t low, int shift) {
  return uint32_t((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}

DEVICE uint32_t sum_bytes(uint32_t v, uint32_t base) {
  return base + (v & 255) + (v >> 8 & 255) + (v >> 16 & 255) + (v >> 24);
}

DEVICE float product(float a, float b) { return a * b; }  // tests.cmake has the compiler fuse nothing

DEVICE uint16_t to_half(float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return 0x7FFF;
  if (size >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520, halfway beyond the largest
  // Under 2^-14 the step is 2^-24, which is the step of floats from 1/2 on.
  if (size < 0x38800000u) return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
  return uint16_t(sign | (size + 0xFFFu + (size >> 13 & 1) - (112u << 23)) >> 13);
}
DEVICE uint32_t to_halves(float low, float high) { return uint32_t(to_half(high)) << 16 | to_half(low); }
DEVICE float from_half(uint16_t v) {
  const uint32_t sign = uint32_t(v & 0x8000) << 16, size = v & 0x7FFF;
  if (size < 0x400u) return float_of(sign | bits_of(float(size) * 0x1p-24f));
  return float_of(sign | ((size << 13) + (size < 0x7C00u ? 112u << 23 : 224u << 23)));
}
DEVICE uint16_t to_bfloat(float v) {
  const uint32_t bits = bits_of(v);
  return v != v ? 0x7FFF : uint16_t((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
DEVICE float from_bfloat(uint16_t v) { return float_of(uint32_t(v) << 16); }

// fp32 holds enough digits of the sum that rounding it twice is rounding it once.
DEVICE uint32_t add_halves(uint32_t a, uint32_t b) {
  const uint32_t low = to_half(from_half(uint16_t(a)) + from_half(uint16_t(b)));
  return uint32_t(to_half(from_half(uint16_t(a >> 16)) + from_half(uint16_t(b >> 16)))) << 16 | low;
}

// MUL1's product and sum have few enough digits to be exact in fp32.
DEVICE uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [&](int shift) {
    const auto part = [&](uint32_t v) { return from_half(uint16_t(v >> shift)); };
    return uint32_t(to_half(part(a) * part(b) + part(c)));
  };
  return half(16) << 16 | half(0);
}

// Saturates, and turns NaN into 0, as CUDA's does.
DEVICE int to_int(float v) {
  if (!(std::fabs(v) < 0x1p31f)) return v > 0 ? INT32_MAX : v < 0 ? INT32_MIN : 0;
  return int(std::nearbyint(v));
}

struct Uint4 {
  uint32_t x, y, z, w;
};
DEVICE Uint4 load16(const void* from, Site site = Site::current()) {
  if (reinterpret_cast<uintptr_t>(from) % 16) stop("load16 from an address that is not aligned to 16", site);
  typedef uint32_t __attribute__((may_alias)) Word;
  const Word* const words = static_cast<const Word*>(from);
  return {words[0], words[1], words[2], words[3]};
}
DEVICE void store16(void* to, const Uint4& v, Site site = Site::current()) {
  if (reinterpret_cast<uintptr_t>(to) % 16) stop("store16 to an address that is not aligned to 16", site);
  typedef uint32_t __attribute__((may_alias)) Word;
  Word* const words = static_cast<Word*>(to);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

template <int count, int size>
DEVICE void load_words(const void* from, int lane, uint32_t (&words)[size], Site site = Site::current()) {
  static_assert(count <= size);
  if (reinterpret_cast<uintptr_t>(from) % 16) stop("load_words from an address that is not aligned to its loads", site);
  for (int i = 0; i < count; ++i) {
    const int width = i < count / 4 * 4 ? 4 : i < count / 2 * 2 ? 2 : 1, part = i / width * width;  // words of a part
    words[i] = static_cast<const uint32_t*>(from)[32 * part + width * lane + i - part];
  }
}

// The copies themselves are here, where ThreadSanitizer sees them as accesses of the thread. A deferred one begins with
// poison, for a GPU may write at any time from the start.
const void* copy_starts(void* to, const void* from, Site site);  // what to write at once
bool copy_ends(int pending, void** to, const void** from);       // false: no more than `pending` groups are left
DEVICE void copy16(void* to, const void* from) {
  typedef uint64_t __attribute__((may_alias)) Word;
  for (int i = 0; i < 2; ++i) static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
}
DEVICE void copy_async(void* to, const void* from, Site site = Site::current()) {
  copy16(to, copy_starts(to, from, site));
}
void copy_commit();
template <int pending>
DEVICE void copy_wait() {
  void* to;
  const void* from;
  while (copy_ends(pending, &to, &from)) copy16(to, from);
}

inline int multiprocessors() { return 2; }

// Asynchronous products of a warpgroup. Deferred, they are multiplied when they are waited for, by what registers and
// shared memory then hold.
void products_begin();
void products_commit();
void wait_for_products(int pending, Site site);
template <int pending>
DEVICE void products_wait(Site site = Site::current()) {
  wait_for_products(pending, site);
}
void show_copies();
uint64_t describe(const void* b, int leading, int stride, Site site = Site::current());
void start_product(float* d, const uint32_t* a, uint64_t b, int rows, Site site);
template <int rows>
DEVICE void multiply_add_async(float (&d)[rows / 8][4], const uint32_t (&a)[4], uint64_t b,
                               Site site = Site::current()) {
  static_assert(rows == 64 || rows == 128 || rows == 256);
  start_product(&d[0][0], a, b, rows, site);
}

inline std::string clear(void* memory, size_t bytes, Stream) {
  std::memset(memory, 0, bytes);
  return {};
}

DEVICE int add(int* number, int v) { return __atomic_fetch_add(number, v, __ATOMIC_RELAXED); }
bool comes_last(uint32_t* counter, uint32_t count, Site site = Site::current());
DEVICE void wait_for_writes() {}  // a kernel runs after the one before
DEVICE void start_next() {}

std::string run(const char* name, dim3 grid, int block, int shared_bytes, void (*call)(const void*),
                const void* kernel);

template <class Kernel, class... Args>
std::string launch(const char* name, Kernel kernel, dim3 grid, int block, int shared_bytes, Stream, Args... args) {
  const auto thread = [&] { kernel(args...); };
  const auto call = [](const void* thread_) { (*static_cast<decltype(&thread)>(thread_))(); };
  return run(name, grid, block, shared_bytes, call, &thread);
}
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  quip::device::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

}  // namespace device
}  // namespace quip
