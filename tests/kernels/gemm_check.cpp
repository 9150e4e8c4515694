// SPDX-License-Identifier: Apache-2.0
// Runs rotate_in, decode_gemm and rotate_out of the codes and bits that it is told, without torch, for the sanitizers;
// decode_gemm alone, where it can be; wide_gemm in its place, where it can be; the same with rows of two experts; and
// what the dense weight needs. Prints a checksum a case, or the emulator's sentence.
//
//   gemm_check CODE BITS ...      CODE: one of those that kernels/tests.cmake compiles
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "decode_gemm.h"
#include "kernels.h"

namespace {

using namespace quip;

constexpr int kN = 80, kK = 688;  // 5 tiles, and 11 chunks of which the last is not whole

// cut: rows in slices, with rotations of runs of 16, else of 172 * 4 and 20 * 4 elements; fused: k whole, and the
// output rotation, of runs of 16, in decode_gemm's epilogue; alone: k in two parts, and decode_gemm rotates both sides;
// many: wide_gemm in two row blocks; routed: two results of a row of x, of two experts and of one that does not exist.
std::string run(const CodeKernels& code, int bits, int m, int warps_n, int depth, bool cut, bool fused, bool alone,
                bool many = false, bool routed = false) {
  const int kK = alone ? 5 * kRun : ::kK;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int row_block = many ? (m / 2 + 7) / 8 * 8 : routed ? 8 : kRowBlock, experts = routed ? 2 : 1;
  const int tiles = kN / kTile, chunks = (kK + kChunk - 1) / kChunk;
  const int words = (tiles * chunks + kSpare) * kLanes * bits;
  std::vector<uint32_t> packed(experts * words), table(experts * std::max(code.table_words, 1));
  for (auto& word : packed) word = random();
  for (auto& word : table) word = random() & 0x3BFF3BFF;  // halves below one
  std::vector<float> x(m * kK), su(experts * kK, 1.0f), sv(experts * kN, 1.0f), base(172 * 172), y(m * kN);
  for (auto& v : x) v = normal(random);
  for (auto& v : base) v = random() % 2 ? 1.0f : -1.0f;
  std::vector<unsigned char> arranged(int64_t(m * chunks + kSpare * std::min(m, kRowBlock)) * row_bytes(code.order) +
                                      16);
  unsigned char* aligned = arranged.data() + (16 - reinterpret_cast<uintptr_t>(arranged.data()) % 16);

  Gemm g{};
  g.packed = packed.data(), g.x = aligned, g.table = table.data();
  g.m = m, g.tiles = tiles, g.chunks = chunks, g.warps_n = warps_n, g.depth = depth;
  g.row_block = row_block;
  g.splits = fused && !alone ? 1 : 2, g.split_chunks = fused && !alone ? chunks : 8;
  g.parts = 1, g.part[0] = {0, 0, tiles};
  const bool bytes = code.order == XOrder::kBytes;
  const int slices = cut ? kSlices : 1, in_slices = bytes ? 1 : slices;
  std::vector<float> partial(g.splits * m * kN), scales(m);
  std::vector<int64_t> totals(m * std::max(in_slices, tiles * g.splits));
  std::vector<uint32_t> arrivals(tiles);
  g.partial = partial.data();
  const Rotation runs{base.data(), 1, 16}, wide{base.data(), 1, kRun};
  const Rotation of_x = alone ? wide : cut ? runs : Rotation{base.data(), 172, 4};
  const int work = (of_x.q > 1 ? 2 * kK : kK) / in_slices, growth = alone ? 7 : cut ? 4 : 10;
  std::vector<int64_t> ids(m);
  for (int i = 0; i < m; ++i) ids[i] = i % 7 ? 0 : i % 2 ? 7 : 1;
  std::vector<RoutedRow> routed_rows(m);
  std::vector<int> blocks(3 + m / 8);
  const RoutedRow* const order = routed ? routed_rows.data() : nullptr;
  const Route rows_of_experts{ids.data(), m, 2, row_block, routed_rows.data(), blocks.data(), int(blocks.size())};
  g.routed = order, g.blocks = blocks.data(), g.block_count = int(blocks.size());
  if (routed) g.expert_words = words, g.expert_table = 4 * code.table_words;
  const RotateIn in{x.data(),      Type::kFloat,  su.data(), of_x,      m,     kK,     chunks,
                    code.order,    row_block,     false,     in_slices, false, growth, aligned,
                    scales.data(), totals.data(), nullptr,   work,      order, 2};
  const Output output{510,      scales.data(), totals.data(), in_slices, sv.data(), sv.data(),
                      y.data(), Type::kFloat,  Type::kFloat,  kN,        order};
  if (fused) g.width = 16, g.unit = 1, g.out = output;
  if (alone) g.in = in, g.arrivals = arrivals.data();
  RotateOut out{partial.data(), g.splits, m, kN, int64_t(m) * kN, bytes, output, slices, 1, {}, nullptr, kN / slices};
  out.part[0] = {cut ? runs : Rotation{base.data(), 20, 4}, 0, kN, 1};
  const GemmEntry entry = code.entry(bits);
  std::string problem = routed ? route(rows_of_experts, {}) : "";
  if (problem.empty() && !alone) problem = rotate_in(in, {});
  if (problem.empty()) problem = (many ? entry.wide.run : entry.run)(g, {});
  if (problem.empty() && !fused) problem = rotate_out(out, {});
  if (problem.empty() && entry.dense && !alone && !routed) {
    std::vector<uint16_t> weight(kN * chunks * kChunk);
    RotateIn rows = in;
    rows.order = XOrder::kRows;
    problem = rotate_in(rows, {});
    if (problem.empty())
      problem = entry.dense({g.packed, g.table, 0, tiles, chunks, 510, weight.data(), 1, {{0, 0, tiles}}}, {});
  }
  if (!problem.empty()) return problem;
  uint64_t hash = 14695981039346656037ull;
  for (float v : y) {
    if (v != v) v = 0;  // of an expert that does not exist
    uint32_t word;
    std::memcpy(&word, &v, sizeof word);
    hash = (hash ^ word) * 1099511628211ull;
  }
  return std::to_string(hash);
}

}  // namespace

int main(int count, char** words) {
  for (int i = 1; i + 1 < count; i += 2) {
    const CodeKernels& code = codes().at(words[i]);
    const bool gathers = !std::strcmp(words[i], "lut") || !std::strcmp(words[i], "pairs_by_rows");
    const int bits = std::atoi(words[i + 1]), depth = bits > 4 || gathers ? 1 : 2;
    for (int m : {2, 9, 17}) {
      for (bool fused : {false, true}) {
        const std::string answer = run(code, bits, m, m > 16 ? 1 : 2, m > 16 ? 1 : depth, m > 2, fused, false);
        std::printf("%s %d, %d rows%s: %s\n", words[i], bits, m, fused ? ", fused" : "", answer.c_str());
      }
      if (m > kFewRows)
        std::printf("%s %d, %d rows of experts: %s\n", words[i], bits, m,
                    run(code, bits, m, 2, depth, true, false, false, false, true).c_str());
      if (m > kFewRows && code.entry(bits).wide.run)
        std::printf("%s %d, %d rows, wide: %s\n", words[i], bits, m,
                    run(code, bits, m, 1, 1, false, false, false, true).c_str());
      if (m > kFewRows || !code.entry(bits).shared(m, 2, depth, 8)) continue;
      std::printf("%s %d, %d rows, one launch: %s\n", words[i], bits, m,
                  run(code, bits, m, 2, depth, false, true, true).c_str());
    }
  }
  return 0;
}
