// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of a tier over std::thread, as bindings_linear.cpp does with parallel_for, and compares with one
// thread bit for bit. kernels/tests.cmake builds it; tests/kernels/test_sanitizers.py runs it.
//
// Usage: panels TIER                                   exit 0, or 1 where bits differ
//        panels_planted TIER read|misaligned|race      an error on purpose, which the sanitizer must report
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tiers.h"

using namespace quip;

namespace {

const Kernels* kernels_of(const std::string& name) {
  for (const Tier& tier : tiers())
    if (name == tier.kernels->name) return tier.kernels;
  return nullptr;
}

template <class F>
void parallel(int threads, int64_t count, F f) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      for (int64_t i = t; i < count; i += threads) f(i);
    });
  for (std::thread& thread : pool) thread.join();
}

std::mt19937 generator(1);

template <class T>
std::vector<T> random_bits(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = T(generator());
  return values;
}

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(count);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(generator);
  return values;
}

// A random weight with memory of exactly its size.
struct Layer {
  std::vector<uint8_t> packed, table8;
  std::vector<int16_t> table16;
  std::vector<float> table, x, su, sv, base;
  Weight weight;

  // other: with the other order of tiles, or the other kind of table.
  Layer(const Kernels& ops, Code code, int bits, int64_t n, int64_t k, int64_t m, bool other = false)
      : packed(code == Code::kE8p ? std::vector<uint8_t>(ops.lattice_bytes(n, k, bits))
                                  : random_bits<uint8_t>(n * k * bits / 8)),
        table8(random_bits<uint8_t>(1024)),
        table16(random_bits<int16_t>(2 * kStates)),
        table(random_floats(code == Code::kLut || code == Code::kPairs ? 2 * kStates : 1024)),
        x(random_floats(m * k)),
        su(random_floats(k)),
        sv(random_floats(n)),
        base(random_floats(k / 8 * (k / 8))),
        weight{packed.data(), table.data(), code, bits, n, k, table8.data(), table16.data()} {
    weight.grid = other && code == Code::kHyb;
    if (other && !weight.grid) weight.order = has_swapped(code) ? TileOrder::kSwapped : TileOrder::kByRows;
    if (code != Code::kE8p) return;
    const std::vector<int16_t> codes = random_bits<int16_t>(n * k / 8), second = random_bits<int16_t>(n * k / 8);
    ops.put_rows(codes.data(), second.data(), 0, n, k, bits, packed.data());
  }
};

// The three loops of `run` in bindings_linear.cpp.
std::vector<float> linear(const Kernels& ops, const Layer& layer, bool int8, int64_t m, int threads) {
  const Weight& w = layer.weight;
  const int64_t stride = (w.k + 63) / 64 * 64, chunks = (stride + kChunk8 - 1) / kChunk8,
                rows = int8 ? 2 * kTile : kTile;
  const Rotation in{layer.base.data(), w.k / 8, 8}, out{layer.base.data(), 1, w.n & -w.n};
  std::vector<float> rotated(m * stride), product(m * w.n), y(m * w.n), scales(m);
  std::vector<int32_t> totals(m * chunks), arranged(int8 ? ops.int8_bytes(w, m) / 4 : 0);
  int8_t* x8 = reinterpret_cast<int8_t*>(arranged.data());
  parallel(threads, m, [&](int64_t r) {
    std::vector<float> scratch(rotation_scratch(in.q));
    float* row = rotated.data() + r * stride;
    ops.rotate_in(layer.x.data() + r * w.k, Type::kFloat, layer.su.data(), w.k, in, row, scratch.data());
    if (int8) ops.int8_quantize(w, row, r, m, x8, &scales[r], &totals[r * chunks]);
  });
  parallel(threads, (w.n + rows - 1) / rows, [&](int64_t j) {
    if (int8)
      ops.int8_panel(w, j * rows, x8, scales.data(), totals.data(), m, product.data(), w.n);
    else
      ops.panel(w, j * rows, rotated.data(), stride, m, product.data(), w.n);
  });
  parallel(threads, m, [&](int64_t r) {
    std::vector<float> scratch(rotation_scratch(out.q));
    ops.rotate_out(product.data() + r * w.n, w.n, out, layer.sv.data(), Type::kFloat, y.data() + r * w.n,
                   scratch.data());
  });
  return y;
}

std::vector<float> rows_of(const Kernels& ops, const Weight& w, int threads) {
  std::vector<float> decoded(w.n * w.k);
  parallel(threads, w.n, [&](int64_t r) { ops.decode_row(w, r, decoded.data() + r * w.k); });
  return decoded;
}

std::vector<int32_t> encode(const Kernels& ops, const std::vector<float>& targets, const std::vector<float>& values,
                            int dim, int threads) {
  const int64_t steps = kSequence / dim, count = int64_t(targets.size()) / kSequence;
  std::vector<int32_t> states(count * steps);
  parallel(threads, count, [&](int64_t i) {
    ops.encode_trellis(targets.data() + i * kSequence, 1, values.data(), 2 * dim, dim, states.data() + i * steps);
  });
  return states;
}

std::vector<int16_t> nearest(const Kernels& ops, const std::vector<float>& points, int threads) {
  std::vector<int16_t> codes(points.size() / 8);
  parallel(threads, int64_t(codes.size()), [&](int64_t i) { codes[i] = ops.encode_lattice(points.data() + 8 * i); });
  return codes;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

[[maybe_unused]] int compare(const Kernels& ops) {
  int different = 0;
  const auto check = [&](bool equal, const char* what, int code, int bits, int64_t m, bool int8) {
    if (!equal) std::printf("%s differs: code %d, %d bits, %ld rows, int8 %d\n", what, code, bits, long(m), int8);
    different += !equal;
  };
  const auto compare_layer = [&](Code code, int bits, int64_t n, int64_t k, int64_t m, bool other) {
    const Layer layer(ops, code, bits, n, k, m, other);
    for (const bool int8 : {false, true}) {
      if (int8 && !(ops.int8_takes && ops.int8_takes(code, layer.weight.order, bits))) continue;
      check(same(linear(ops, layer, int8, m, 1), linear(ops, layer, int8, m, 4)), "linear", int(code), bits, m, int8);
    }
    if (m == 1)
      check(same(rows_of(ops, layer.weight, 1), rows_of(ops, layer.weight, 4)), "row", int(code), bits, n, false);
  };
  // One code of each kind: bytes and halves in both orders, a tile by rows, a table of each kind, the grid, the lattice.
  for (const int64_t m : {1, 5, 29}) {
    for (int bits = 1; bits <= 8; ++bits) {
      if (!(QUIP_RATES >> bits & 1)) continue;
      for (const auto& [code, other] : {std::pair{Code::kOneMad, false},
                                        {Code::kOneMad, true},
                                        {Code::kMul1, true},
                                        {Code::kMul1Half, true},
                                        {Code::kThreeInst, false},
                                        {Code::kThreeInst, true},
                                        {Code::kHyb, false},
                                        {Code::kHyb, true},
                                        {Code::kLut, false},
                                        {Code::kPairs, true},
                                        {Code::kGrid, false}})
        if (bits >= least_bits(code) && bits <= most_bits(code)) compare_layer(code, bits, 80, 272, m, other);
      for (const auto& [n, k] : {std::pair{76, 272}, {36, 40}, {1, 24}})
        if (bits >= 2 && bits <= 4) compare_layer(Code::kE8p, bits, n, k, m, false);
    }
  }
  for (const int dim : {1, 2}) {
    const std::vector<float> targets = random_floats(2 * kSequence), values = random_floats(dim * kStates);
    check(same(encode(ops, targets, values, dim, 1), encode(ops, targets, values, dim, 2)), "encode_trellis", dim, 2, 2,
          false);
  }
  const std::vector<float> points = random_floats(8 * 64);
  check(same(nearest(ops, points, 1), nearest(ops, points, 4)), "encode_lattice", -1, 2, 64, false);
  return different ? 1 : 0;
}

#ifdef QUIP_PLANTED
int plant(const Kernels& ops, const std::string& error) {
  Layer layer(ops, Code::kOneMad, 2, 32, 64, 1);
  std::vector<float> y(33);
  if (error == "read") {  // the last tile is one byte short
    const std::vector<uint8_t> cut(layer.packed.begin(), layer.packed.end() - 1);
    layer.weight.packed = cut.data();
    ops.panel(layer.weight, 16, layer.x.data(), 64, 1, y.data(), 32);
  } else if (error == "misaligned") {
    float* odd = reinterpret_cast<float*>(reinterpret_cast<char*>(y.data()) + 1);
    ops.panel(layer.weight, 0, layer.x.data(), 64, 1, odd, 32);
  } else if (error == "race") {  // two threads write one panel
    parallel(2, 2, [&](int64_t) { ops.panel(layer.weight, 0, layer.x.data(), 64, 1, y.data(), 32); });
  }
  return 0;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const Kernels* ops = argc > 1 ? kernels_of(argv[1]) : nullptr;
  if (!ops)
    return std::fprintf(stderr, "tier %s: give one of those in kernels/CMakeLists.txt\n",
                        argc > 1 ? argv[1] : "missing"),
           2;
#ifdef QUIP_PLANTED
  return argc > 2 ? plant(*ops, argv[2]) : 2;
#else
  return compare(*ops);
#endif
}
