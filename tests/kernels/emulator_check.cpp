// SPDX-License-Identifier: Apache-2.0
// Small kernels that show what the emulator does, right ones and wrong ones. test_emulator.py builds and runs this with
// the name of one of them; it prints "right", "wrong", or the sentence of a launch that failed.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "device.h"

namespace quip {
namespace device {
namespace {

using Answer = std::string;

Answer judge(const std::string& error, bool right) { return !error.empty() ? error : right ? "right" : "wrong"; }

// Sums over blocks of four warps: butterflies in a warp, shared memory between warps, one lane's word for everyone.
KERNEL(128) sum_kernel(const float* x, float* sums) {
  SHARED(shared);
  float* const partial = reinterpret_cast<float*>(shared);
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
  const int warp = warp_index();
  if (threadIdx.x % 32 == 0) partial[warp] = v;
  sync_block();
  const unsigned lane = threadIdx.x % 32;
  v = lane < 4 ? partial[lane] : 0.0f;
  v += shuffle_xor(v, 1);
  v += shuffle_xor(v, 2);
  const uint32_t bits = shuffle(bits_of(v), 35);
  sums[blockIdx.x * blockDim.x + threadIdx.x] = float_of(bits) + float(gridDim.y);
}

Answer sum() {
  constexpr int kBlocks = 3, kThreads = 128;
  std::vector<float> x(kBlocks * kThreads), sums(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 37) - 11;
  const std::string error = LAUNCH(sum_kernel, dim3(kBlocks), kThreads, 16, nullptr, x.data(), sums.data());
  bool right = true;
  for (int block = 0; block < kBlocks; ++block) {
    float expected = 1;
    for (int t = 0; t < kThreads; ++t) expected += x[size_t(block * kThreads + t)];
    for (int t = 0; t < kThreads; ++t) right &= sums[size_t(block * kThreads + t)] == expected;
  }
  return judge(error, right);
}

Answer sums_in_os_threads() {
  std::vector<Answer> answers(4);
  std::vector<std::thread> threads;
  for (Answer& answer : answers) threads.emplace_back([&] { answer = sum() == "right" ? sum() : "wrong"; });
  for (std::thread& t : threads) t.join();
  for (const Answer& answer : answers) {
    if (answer != "right") return answer;
  }
  return "right";
}

// Each thread copies 16 bytes per step and reads what another one copied.
constexpr int kCopiers = 64, kSteps = 7;

template <int kStages, bool kSyncBeforeUse, bool kSyncBeforeReuse, bool kWait = true>
KERNEL(kCopiers) pipeline_kernel(const uint32_t* x, uint32_t* sums) {
  SHARED(shared);
  const int t = int(threadIdx.x);
  const auto load = [&](int step) {
    unsigned char* const buffer = shared + step % kStages * kCopiers * 16;
    if (step < kSteps) copy_async(buffer + 16 * t, x + 4 * (step * kCopiers + t));  // the copy
    copy_commit();
  };
  uint32_t sum = 0;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < kSteps; ++step) {
    load(step + kStages - 1);
    if (kWait) copy_wait<kStages - 1>();
    if (kSyncBeforeUse) sync_block();
    const unsigned char* const other = shared + (step % kStages * kCopiers + (t + 37) % kCopiers) * 16;
    sum = 3 * sum + *reinterpret_cast<const uint32_t*>(other + 4);  // the use
    if (kSyncBeforeReuse) sync_block();
  }
  sums[blockIdx.x * kCopiers + threadIdx.x] = sum;
}

template <int kStages, bool... kRules>
Answer pipeline() {
  alignas(16) static uint32_t x[kSteps * kCopiers * 4];
  for (uint32_t i = 0; i < std::size(x); ++i) x[i] = i * 2654435761u;
  uint32_t sums[2 * kCopiers] = {};
  const auto kernel = pipeline_kernel<kStages, kRules...>;
  const std::string error = LAUNCH(kernel, dim3(2), kCopiers, kStages * kCopiers * 16, nullptr, x, sums);
  bool right = true;
  for (int t = 0; t < 2 * kCopiers; ++t) {
    uint32_t expected = 0;
    for (int step = 0; step < kSteps; ++step)
      expected = 3 * expected + x[4 * (step * kCopiers + (t + 37) % kCopiers) + 1];
    right &= sums[t] == expected;
  }
  return judge(error, right);
}

template <bool kSync>
KERNEL(64) exchange_kernel(uint32_t* out) {
  SHARED(shared);
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared);
  words[threadIdx.x] = threadIdx.x;
  if (kSync) sync_warp();
  out[threadIdx.x] = words[threadIdx.x ^ 5];  // the exchange
}

template <bool kSync>
Answer exchange() {
  uint32_t out[64] = {};
  const auto kernel = exchange_kernel<kSync>;
  const std::string error = LAUNCH(kernel, dim3(1), 64, 256, nullptr, out);
  bool right = true;
  for (uint32_t t = 0; t < 64; ++t) right &= out[t] == (t ^ 5);
  return judge(error, right);
}

KERNEL(32) same_word_kernel(uint32_t* out) {
  if (threadIdx.x == 3) out[0] = blockIdx.x;  // the same word
}
Answer blocks_write_the_same_word() {
  uint32_t out = 0;
  return judge(LAUNCH(same_word_kernel, dim3(2), 32, 0, nullptr, &out), out < 2);
}

// Fragments as the PTX manual lays them out: element i of a thread's a, b and c.
struct Element {
  int row, column;
};
Element a_halves(int lane, int i) { return {lane / 4 + (i / 2 % 2 ? 8 : 0), lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0)}; }
Element b_halves(int lane, int i) { return {lane % 4 * 2 + i % 2 + (i >= 2 ? 8 : 0), lane / 4}; }
Element a_bytes(int lane, int i) { return {lane / 4 + (i / 4 % 2 ? 8 : 0), lane % 4 * 4 + i % 4 + (i >= 8 ? 16 : 0)}; }
Element b_bytes(int lane, int i) { return {lane % 4 * 4 + i % 4 + (i >= 4 ? 16 : 0), lane / 4}; }
Element c_both(int lane, int i) { return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + i % 2}; }

template <class Sum>
KERNEL(32) product_kernel(const uint32_t* a, const uint32_t* b, Sum* c) {
  const unsigned lane = threadIdx.x;
  Sum d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[4 * lane + i];
  const uint32_t a_lane[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  multiply_add(d, a_lane, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = d[i];
}

// Number a(row, k), b(k, column): of type A or B as stored; Wide: what sums are exact in.
template <class Sum, class Wide, class A, class B, class AsWide>
Answer product(int depth, Element (*a_at)(int, int), Element (*b_at)(int, int), const std::vector<A>& a,
               const std::vector<B>& b, const std::vector<Sum>& c, AsWide wide) {
  const int each = depth / 2;  // elements of a in a lane
  std::vector<A> a_lanes(size_t(32 * each));
  std::vector<B> b_lanes(size_t(32 * each / 2));
  std::vector<Sum> c_lanes(128);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < each; ++i) {
      const Element e = a_at(lane, i);
      a_lanes[size_t(lane * each + i)] = a[size_t(e.row * depth + e.column)];
    }
    for (int i = 0; i < each / 2; ++i) {
      const Element e = b_at(lane, i);
      b_lanes[size_t(lane * each / 2 + i)] = b[size_t(e.row * 8 + e.column)];
    }
    for (int i = 0; i < 4; ++i)
      c_lanes[size_t(4 * lane + i)] = c[size_t(c_both(lane, i).row * 8 + c_both(lane, i).column)];
  }
  std::vector<uint32_t> a_words(128), b_words(64);
  std::memcpy(a_words.data(), a_lanes.data(), 512);
  std::memcpy(b_words.data(), b_lanes.data(), 256);
  const std::string error =
      LAUNCH(product_kernel<Sum>, dim3(1), 32, 0, nullptr, a_words.data(), b_words.data(), c_lanes.data());
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Element e = c_both(lane, i);
      Wide sum = Wide(c[size_t(e.row * 8 + e.column)]);
      for (int k = 0; k < depth; ++k) sum += wide(a[size_t(e.row * depth + k)]) * wide(b[size_t(k * 8 + e.column)]);
      right &= c_lanes[size_t(4 * lane + i)] == Sum(sum);
    }
  }
  return judge(error, right);
}

uint32_t next_random() {
  static uint32_t state = 1;
  return (state = state * 1664525u + 1013904223u) >> 8;
}

Answer product_of_bytes() {
  std::vector<uint8_t> a(16 * 32);
  std::vector<int8_t> b(32 * 8);
  std::vector<int32_t> c(16 * 8);
  for (auto& v : a) v = uint8_t(next_random());
  for (auto& v : b) v = int8_t(next_random());
  for (auto& v : c) v = int32_t(next_random() << 8);
  c[0] = INT32_MAX;  // sums wrap around
  c[1] = INT32_MIN;
  return product<int32_t, int64_t>(32, a_bytes, b_bytes, a, b, c, [](auto v) { return int64_t(v); });
}

Answer product_of_halves() {
  std::vector<uint16_t> a(16 * 16), b(16 * 8);
  std::vector<float> c(16 * 8);
  // Multiples of 2^-8 and below, subnormal ones too: sums are exact in double and round once.
  for (auto& v : a) v = to_half((float(next_random() % 2048) - 1024) / 256);
  for (auto& v : b) v = to_half((float(next_random() % 2048) - 1024) / 256);
  for (size_t i = 0; i < b.size(); i += 5) b[i] = uint16_t(next_random() % 1024);
  for (auto& v : c) v = float(next_random()) / 65536;
  return product<float, double>(16, a_halves, b_halves, a, b, c, [](uint16_t v) { return double(from_half(v)); });
}

// Faults that end a launch.
KERNEL(32) divergent_kernel(uint32_t* out) {
  if (threadIdx.x < 7) {
    out[threadIdx.x] = shuffle(1, 0);
  } else {
    out[threadIdx.x] = shuffle(2, 0);
  }
}
KERNEL(32) lane_left_kernel(uint32_t* out) {
  if (threadIdx.x == 9) return;
  out[threadIdx.x] = shuffle(1, 0);
}
KERNEL(64) two_barriers_kernel(uint32_t* out) {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    sync_block();
  }
  out[threadIdx.x] = 1;
}
KERNEL(64) barrier_in_shuffle_kernel(uint32_t* out) {
  if (threadIdx.x == 40) sync_block();
  out[threadIdx.x] = shuffle(1, 0);
}
KERNEL(64) barrier_left_kernel(uint32_t*) {
  if (threadIdx.x != 5) sync_block();
}
KERNEL(64) overflow_kernel(uint32_t*) {
  SHARED(shared);
  shared[threadIdx.x] = 1;
}
KERNEL(32) misaligned_kernel(uint32_t* x) {
  SHARED(shared);
  copy_async(shared + 8, x);
}
KERNEL(32) outside_kernel(uint32_t* x) {
  SHARED(shared);
  copy_async(shared + 48, x);
}
KERNEL(32) misaligned_load_kernel(uint32_t* x) { x[0] = load16(x + 1).x; }
KERNEL(32) misaligned_store_kernel(uint32_t* x) { store16(x + 1, {}); }
KERNEL(32) misaligned_words_kernel(uint32_t* x) {
  uint32_t words[6];
  load_words<6>(x + 1, 0, words);
}

alignas(16) uint32_t words[64];
Answer then_sum(const std::string& error) {  // what was abandoned does no harm
  const Answer after = sum();
  return error.empty() ? "no error" : after == "right" ? error : "then " + after;
}
#define FAULT(kernel, threads) [] { return then_sum(LAUNCH(kernel, dim3(1, 2), threads, 48, nullptr, words)); }

// Bit-exact conversions for test_emulator.py: floats from the standard input, one table a function to the output.
Answer convert() {
  std::vector<float> x;
  for (float v; std::fread(&v, sizeof(v), 1, stdin) == 1;) x.push_back(v);
  const auto put = [](auto v) { std::fwrite(&v, sizeof(v), 1, stdout); };
  for (uint32_t h = 0; h < 65536; ++h) put(from_half(uint16_t(h)));
  for (uint32_t h = 0; h < 65536; ++h) put(from_bfloat(uint16_t(h)));
  for (const float v : x) put(to_half(v));
  for (const float v : x) put(to_bfloat(v));
  for (const float v : x) put(to_int(v));
  for (const float v : x) put(add_halves(bits_of(v), bits_of(v) * 2654435761u));
  return {};
}

Answer integers() {
  bool right = permute_bytes(0x33221100u, 0x77665544u, 0x7052u) == 0x77005522u;
  right &=
      permute_bytes(0x33221100u, 0x77665544u, 0xFFFF8A9Bu) == 0x00221133u;  // the fourth bit of a nibble is ignored
  right &= funnel_left(0x80000001u, 0xC0000000u, 0) == 0x80000001u && funnel_left(0x80000001u, 0xC0000000u, 2) == 7u;
  right &= funnel_left(1u, 0x80000001u, 31) == 0xC0000000u;
  right &= sum_bytes(0xFF01FF02u, 0xFFFFFFFFu) == 0x200u;
  alignas(16) const uint32_t x[4] = {1, 2, 3, 4};
  const Uint4 v = load16(x);
  right &= v.x == 1 && v.y == 2 && v.z == 3 && v.w == 4;
  alignas(16) uint32_t many[7 * 32];
  for (uint32_t i = 0; i < 7 * 32; ++i) many[i] = i;
  uint32_t seven[8] = {};  // parts of four, two and one word
  load_words<7>(many, 5, seven);
  right &= seven[0] == 20 && seven[3] == 23 && seven[4] == 128 + 10 && seven[5] == 128 + 11 && seven[6] == 192 + 5;
  return right ? "right" : "wrong";
}

// A warpgroup multiplies 64 x 16 by 16 x 64: b lies in two columns of 8 numbers, of 64 rows each.
enum class Mistake { kNone, kNotBegun, kHidden, kNotWaited, kOutside };
KERNEL(128) product_async_kernel(const uint16_t* a, const uint16_t* b, float* c, Mistake mistake) {
  SHARED(shared);
  const int t = int(threadIdx.x), row = t / 32 * 16 + t % 32 / 4, k = t % 4 * 2;
  copy_async(shared + t * 16, b + t * 8);
  copy_commit();
  copy_wait<0>();
  if (mistake != Mistake::kHidden) show_copies();
  sync_block();
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&words[i], a + (row + i % 2 * 8) * 16 + k + i / 2 * 8, 4);
  float sums[8][4] = {};
  if (mistake != Mistake::kNotBegun) products_begin();
  const int column = mistake == Mistake::kOutside ? 2048 : 1024;
  multiply_add_async<64>(sums, words, describe(shared, column, 128));
  products_commit();
  if (mistake == Mistake::kNotWaited) words[0] = 0;
  products_wait<0>();
  for (int i = 0; i < 32; ++i) c[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + k + i % 2] = sums[i / 4][i % 4];
}

template <Mistake mistake>
Answer product_async() {
  std::vector<uint16_t> a(64 * 16), b(2 * 64 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = to_half(float(i * 7 % 23) - 11), b[i] = to_half(float(i * 5 % 19) - 9);
  std::vector<float> c(64 * 64);
  const std::string error =
      LAUNCH(product_async_kernel, dim3(1), 128, 2048, nullptr, a.data(), b.data(), c.data(), mistake);
  bool right = true;
  for (int i = 0; i < 64 * 64; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += from_half(a[size_t(i / 64 * 16 + k)]) * from_half(b[size_t(k / 8 * 512 + i % 64 * 8 + k % 8)]);
    right &= c[size_t(i)] == sum;
  }
  return judge(error, right);
}

KERNEL(256) switches_kernel(uint32_t* out, int times) {
  uint32_t v = threadIdx.x;
  for (int i = 0; i < times; ++i) v = shuffle(v, int(v + 1));
  out[threadIdx.x] = v;
}
Answer switches() {
  uint32_t out[256];
  const auto start = std::chrono::steady_clock::now();
  const std::string error = LAUNCH(switches_kernel, dim3(1), 256, 0, nullptr, out, 20000);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return judge(error, true) + ": " + std::to_string(256 * 20000 / seconds / 1e6) +
         " million resumed threads per second";
}

const std::map<std::string, std::function<Answer()>> kChecks = {
    {"sum", sum},
    {"sums_in_os_threads", sums_in_os_threads},
    {"pipeline", pipeline<2, true, true>},
    {"pipeline_of_one", pipeline<1, true, true>},
    {"pipeline_of_three", pipeline<3, true, true>},
    {"no_sync_before_use", pipeline<2, false, true>},
    {"no_sync_before_reuse", pipeline<2, true, false>},
    {"no_wait", pipeline<2, true, true, false>},
    {"exchange", exchange<true>},
    {"no_sync_warp", exchange<false>},
    {"blocks_write_the_same_word", blocks_write_the_same_word},
    {"product_of_bytes", product_of_bytes},
    {"product_of_halves", product_of_halves},
    {"product_async", product_async<Mistake::kNone>},
    {"product_not_begun", product_async<Mistake::kNotBegun>},
    {"product_of_hidden_copies", product_async<Mistake::kHidden>},
    {"product_not_waited_for", product_async<Mistake::kNotWaited>},
    {"product_outside", product_async<Mistake::kOutside>},
    {"divergent_shuffle", FAULT(divergent_kernel, 32)},
    {"lane_left", FAULT(lane_left_kernel, 32)},
    {"no_such_lane", FAULT(lane_left_kernel, 8)},
    {"two_barriers", FAULT(two_barriers_kernel, 64)},
    {"barrier_in_shuffle", FAULT(barrier_in_shuffle_kernel, 64)},
    {"barrier_left", FAULT(barrier_left_kernel, 64)},
    {"overflow", FAULT(overflow_kernel, 64)},
    {"misaligned_copy", FAULT(misaligned_kernel, 32)},
    {"copy_outside", FAULT(outside_kernel, 32)},
    {"misaligned_load", FAULT(misaligned_load_kernel, 32)},
    {"misaligned_store", FAULT(misaligned_store_kernel, 32)},
    {"misaligned_words", FAULT(misaligned_words_kernel, 32)},
    {"too_many_threads", FAULT(overflow_kernel, 1025)},
    {"convert", convert},
    {"integers", integers},
    {"switches", switches},
};

}  // namespace
}  // namespace device
}  // namespace quip

int main(int count, char** arguments) {
  const auto check = quip::device::kChecks.find(count > 1 ? arguments[1] : "");
  if (check == quip::device::kChecks.end()) return 2;
  std::printf("%s", check->second().c_str());
}
