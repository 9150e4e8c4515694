// SPDX-License-Identifier: Apache-2.0
// What a thread of a kernel can do on the emulator (emulator.h) beside plain C++: meet others, shuffle, copy, multiply.
#include <cstring>

#include "runtime.h"

namespace quip {
namespace device {
namespace {

constexpr uint64_t kPoisoned[2] = {0xCBCBCBCBCBCBCBCB, 0xCBCBCBCBCBCBCBCB};  // what an unfinished copy shows

template <class Number>
struct Product {
  Number* d;
  const uint32_t* a;
  uint32_t b[2];
};

struct Halves {
  using Number = float;
  using Sum = double;
  static constexpr int kPacked = 2;
  static double a(uint32_t v, int i) { return from_half(uint16_t(v >> 16 * i)); }
  static double b(uint32_t v, int i) { return a(v, i); }
};
struct Bytes {
  using Number = int32_t;
  using Sum = uint32_t;
  static constexpr int kPacked = 4;
  static uint32_t a(uint32_t v, int i) { return uint8_t(v >> 8 * i); }
  static uint32_t b(uint32_t v, int i) { return uint32_t(int8_t(v >> 8 * i)); }
};

// Exact products, and for halves sums in double that are rounded once; a GPU's own rounding is not documented.
template <class T>
void multiply(void* const* lanes) {
  constexpr int kPacked = T::kPacked, kDepth = 8 * kPacked;
  typename T::Sum a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product<typename T::Number>*>(lanes[lane]);
    for (int i = 0; i < kPacked; ++i) {
      const int k = lane % 4 * kPacked + i;
      for (int r = 0; r < 4; ++r) a[lane / 4 + 8 * (r % 2)][k + kDepth / 2 * (r / 2)] = T::a(p.a[r], i);
      for (int r = 0; r < 2; ++r) b[lane / 4][k + kDepth / 2 * r] = T::b(p.b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product<typename T::Number>*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      typename T::Sum sum = typename T::Sum(p.d[r]);
      for (int k = 0; k < kDepth; ++k) sum += a[lane / 4 + 8 * (r / 2)][k] * b[lane % 4 * 2 + r % 2][k];
      p.d[r] = typename T::Number(sum);
    }
  }
}

}  // namespace

dim3 thread_index() { return {unsigned(now->thread), 0, 0}; }
dim3 block_index() { return now->index; }
dim3 block_size() { return {unsigned(now->block), 1, 1}; }
dim3 grid_size() { return now->grid; }
unsigned char* shared_memory() { return now->shared; }

void stop(const char* what, Site site) {
  Launch& l = *now;
  if (l.tsan) __tsan_switch_to_fiber(l.tsan, 1);
  abandon(l, std::string(what) + ", at " + place(site));
}

void sync_block(Site site) {
  now->hidden |= now->self().hidden;
  meet(now->meetings.back(), "sync_block", site, true, nullptr, nullptr);
}

// Blocks run one after another, so nothing is written in between. To ThreadSanitizer a block comes after those before.
bool comes_last(uint32_t* counter, uint32_t count, Site site) {
  sync_block(site);
  Launch& l = *now;
  if (l.tsan) __tsan_release(counter), __tsan_acquire(counter);
  if (l.thread == 0) l.last = ++*counter == count;
  sync_block(site);
  return l.last;
}

void sync_warp(Site site) { meet_warp("sync_warp", site, nullptr, nullptr, true); }

struct Shuffle {
  uint32_t v;
  int from;
  uint32_t result;
};
static uint32_t shuffle_from(const char* call, uint32_t v, int from, const Site& site) {
  Shuffle s{v, from, 0};
  meet_warp(call, site, &s, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Shuffle& to = *static_cast<Shuffle*>(lanes[i]);
      to.result = static_cast<Shuffle*>(lanes[to.from & 31])->v;
    }
  });
  return s.result;
}
uint32_t shuffle(uint32_t v, int from, Site site) { return shuffle_from("shuffle", v, from, site); }
float shuffle_xor(float v, int mask, Site site) {
  return float_of(shuffle_from("shuffle_xor", bits_of(v), (now->thread ^ mask) & 31, site));
}

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Product<float> p{d, a, {b0, b1}};
  meet_warp("multiply_add", site, &p, multiply<Halves>);
}
void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Product<int32_t> p{d, a, {b0, b1}};
  meet_warp("multiply_add", site, &p, multiply<Bytes>);
}

const void* copy_starts(void* to, const void* from, Site site) {
  Launch& l = *now;
  const uintptr_t at = reinterpret_cast<uintptr_t>(to), start = reinterpret_cast<uintptr_t>(l.shared);
  if (at % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    stop("copy_async between addresses that are not aligned to 16", site);
  if (at < start || at + 16 > start + size_t(l.shared_bytes)) stop("copy_async to a place outside shared memory", site);
  Fiber& self = l.self();
  if (l.eager) {
    self.hidden = true;
    return from;
  }
  if (l.tsan) __tsan_switch_to_fiber(l.tsan, 1);  // the vector is the scheduler's
  if (self.begun > self.copies.size() / 2) {
    self.copies.erase(self.copies.begin(), self.copies.begin() + std::ptrdiff_t(self.begun));
    self.begun = 0;
  }
  self.copies.push_back({to, from, self.groups});
  if (l.tsan) __tsan_switch_to_fiber(self.tsan, 1);
  return kPoisoned;
}

bool copy_ends(int pending, void** to, const void** from) {
  Fiber& self = now->self();
  if (self.begun == self.copies.size() || self.copies[self.begun].group >= self.groups - pending) return false;
  *to = self.copies[self.begun].to;
  *from = self.copies[self.begun].from;
  ++self.begun;
  self.hidden = true;
  return true;
}

void copy_commit() { ++now->self().groups; }

void show_copies() { now->self().hidden = false; }

uint64_t describe(const void* b, int leading, int stride, Site site) {
  const std::ptrdiff_t at = static_cast<const unsigned char*>(b) - now->shared;
  if (at < 0 || at >= now->shared_bytes || (at | leading | stride) % 16)
    stop("describe of what is not in shared memory or not aligned to 16", site);
  return matrix_of(uint32_t(at), leading, stride);
}

void products_begin() { now->self().begun_products = true; }
void products_commit() {
  ++now->self().product_groups;
  now->self().begun_products = false;
}

// The 16 rows of a warp, by all columns of b. Sums as for multiply_add.
static void multiply_async(void* const* lanes) {
  const auto product = [&](int lane) -> const AsyncProduct& { return *static_cast<const AsyncProduct*>(lanes[lane]); };
  const auto field = [b = product(0).b](int shift) { return int(b >> shift & 0x3FFF) << 4; };
  double a[16][16];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i)
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = Halves::a(product(lane).a[i / 2], i % 2);
  }
  for (int column = 0; column < product(0).rows; ++column) {
    double b[16];
    for (int k = 0; k < 16; ++k) {
      uint16_t half;
      std::memcpy(&half,
                  now->shared + field(0) + k / 8 * field(16) + column / 8 * field(32) + column % 8 * 16 + k % 8 * 2, 2);
      b[k] = from_half(half);
    }
    for (int row = 0; row < 16; ++row) {
      float& d = product(row % 8 * 4 + column % 8 / 2).d[column / 8 * 4 + row / 8 * 2 + column % 2];
      double sum = d;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
      d = float(sum);
    }
  }
}

void start_product(float* d, const uint32_t* a, uint64_t b, int rows, Site site) {
  Launch& l = *now;
  Fiber& self = l.self();
  const auto field = [b](int shift) { return int(b >> shift & 0x3FFF) << 4; };
  if (l.block % 128) stop("multiply_add_async in a block that is not whole warpgroups", site);
  if (!self.begun_products) stop("multiply_add_async without products_begin since the last products_commit", site);
  if (l.hidden) stop("multiply_add_async behind a barrier that a thread reached without show_copies", site);
  if (field(0) + field(16) + (rows / 8 - 1) * field(32) + 128 > l.shared_bytes)
    stop("multiply_add_async of what is outside shared memory", site);
  AsyncProduct product{d, a, b, rows, self.product_groups};
  meet_warp("multiply_add_async", site, &product, l.eager ? multiply_async : nullptr);
  if (!l.eager) self.products.push_back(product);
}

// All lanes have started the same, in one order.
void wait_for_products(int pending, Site site) {
  Fiber& self = now->self();
  size_t done = 0;
  for (; done < self.products.size() && self.products[done].group < self.product_groups - pending; ++done)
    meet_warp("products_wait", site, &self.products[done], multiply_async);
  self.products.erase(self.products.begin(), self.products.begin() + std::ptrdiff_t(done));
}

}  // namespace device
}  // namespace quip
