// SPDX-License-Identifier: Apache-2.0
// What the ops of the CPU library have in common: the weight of a layer, checked, and memory.
#pragma once
#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../torch_checks.h"
#include "fastest.h"

namespace quip {
namespace {

// Floats for one call, from the start of a cache line on. Torch's own come by its dispatcher, which takes a microsecond.
struct Memory {
  float* const floats;
  explicit Memory(int64_t count)
      : floats(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64}))) {}
  ~Memory() { ::operator delete(floats, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
};

// Behind the name of a trellis code: Weight::order.
constexpr std::string_view kSwapped = "_swapped", kByRows = "_by_rows";

inline Code code_of(const std::string& name) {
#define QUIP_CASE(enumerator, own) \
  if (name == own) return Code::enumerator;
  QUIP_TRELLIS_CODES(QUIP_CASE)
#undef QUIP_CASE
#define QUIP_NAME(enumerator, own) own ", "
  STD_TORCH_CHECK(name == "e8p", "code is ", name, ": it must be one of " QUIP_TRELLIS_CODES(QUIP_NAME) "e8p");
#undef QUIP_NAME
  return Code::kE8p;
}

// A code and the order of its tiles.
inline std::pair<Code, TileOrder> code_and_order(const std::string& name) {
  if (name.ends_with(kSwapped)) return {code_of(name.substr(0, name.size() - kSwapped.size())), TileOrder::kSwapped};
  if (name.ends_with(kByRows)) return {code_of(name.substr(0, name.size() - kByRows.size())), TileOrder::kByRows};
  return {code_of(name), TileOrder::kOurs};
}

// Whether the tier in use has int8 activations.
inline bool takes_int8(Code code, TileOrder order, int bits) {
  return kernels().int8_takes && kernels().int8_takes(code, order, bits);
}

// Where the blocks of each part of a lattice layer begin, and the bytes of all.
inline std::vector<int64_t> block_offsets(const std::vector<int64_t>& output_sizes, int64_t k, int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, "bits is ", bits, ": the lattice has 2, 3 and 4");
  STD_TORCH_CHECK(k > 0 && k % 8 == 0, "a lattice weight has ", k, " columns: they must be a multiple of 8");
  std::vector<int64_t> offsets{0};
  for (int64_t size : output_sizes) {
    STD_TORCH_CHECK(size > 0, "a part has ", size, " outputs: give at least one");
    offsets.push_back(offsets.back() + kernels().lattice_bytes(size, k, int(bits)));
  }
  return offsets;
}

inline std::vector<Weight> lattice_weights(const Tensor& packed, const std::vector<int64_t>& output_sizes, int64_t k,
                                           int64_t bits) {
  const std::vector<int64_t> offsets = block_offsets(output_sizes, k, bits);
  const void* blocks = data_of(packed, ScalarType::Byte, offsets.back(), 1, "packed (the lattice's blocks)");
  std::vector<Weight> weights;
  for (size_t i = 0; i < output_sizes.size(); ++i)
    weights.push_back(
        {static_cast<const uint8_t*>(blocks) + offsets[i], nullptr, Code::kE8p, int(bits), output_sizes[i], k});
  return weights;
}

// Numbers of the table that each part has of its own, as floats and as int16; 0 for a code without such tables.
inline int64_t table_floats(Code code) {
  return code == Code::kHyb ? 1024 : code == Code::kTable ? kStates : code == Code::kPairs ? 2 * kStates : 0;
}
inline int64_t table_shorts(Code code) { return code == Code::kPairs ? 2 * kStates : kStates + 1; }

// The weight of each part of a layer, without the integers of its table.
inline std::vector<Weight> weights_of(const Tensor& packed, const std::optional<Tensor>& table, const std::string& name,
                                      const std::vector<int64_t>& output_sizes, int64_t k, int64_t bits) {
  const auto [code, order] = code_and_order(name);
  if (code == Code::kE8p) return lattice_weights(packed, output_sizes, k, bits);
  STD_TORCH_CHECK(order != TileOrder::kSwapped || has_swapped(code), "code ", name,
                  ": 3inst, mcg and mul1 have swapped tiles, the others do not");
  const int64_t own = table_floats(code);
  STD_TORCH_CHECK(bits >= least_bits(code) && bits <= most_bits(code), "bits is ", bits, ": ", name, " has ",
                  least_bits(code), " to ", most_bits(code));
  STD_TORCH_CHECK(k % kTile == 0, "a trellis weight has ", k, " columns: they must be a multiple of 16");
  std::vector<int64_t> starts{0};  // in bytes; a part has whole tiles
  for (int64_t size : output_sizes) starts.push_back(starts.back() + 2 * ((size + kTile - 1) / kTile) * k * bits);
  const void* words = data_of(packed, ScalarType::Short, starts.back() / 2, 2, "packed");
  const float* values = nullptr;
  if (own || code == Code::kLut) {
    STD_TORCH_CHECK(table.has_value(), "code ", name, " needs its table");
    values = floats(*table, own ? int64_t(output_sizes.size()) * own : kStates, "table");
  }
  std::vector<Weight> weights;
  for (size_t i = 0; i < output_sizes.size(); ++i)
    weights.push_back({.packed = static_cast<const uint8_t*>(words) + starts[i],
                       .table = own ? values + own * i : values,
                       .code = code,
                       .bits = int(bits),
                       .n = output_sizes[i],
                       .k = k,
                       .order = order});
  return weights;
}

// Adds the tables as integers, and their units: uint8 [parts, 2, 512] of HYB, int16 [65537] of LUT, [parts, 65537] of
// TABLE, [parts, 65536, 2] of PAIRS.
inline void add_integers(std::vector<Weight>& weights, const std::optional<Tensor>& integers,
                         const std::optional<Tensor>& units, bool grid) {
  const Code code = weights[0].code;
  const bool bytes = code == Code::kHyb, own = table_floats(code) > 0;
  if (!own && code != Code::kLut) return;
  STD_TORCH_CHECK(integers.has_value() && units.has_value(),
                  "a code with a table needs it as integers, too: give table_integers and table_units");
  const int64_t count = own ? int64_t(weights.size()) : 1, shorts = table_shorts(code);
  const float* unit = floats(*units, count, "table_units");
  const void* numbers = bytes ? data_of(*integers, ScalarType::Byte, count * 1024, 1, "table_integers")
                              : data_of(*integers, ScalarType::Short, count * shorts, 2, "table_integers");
  for (size_t i = 0; i < weights.size(); ++i) {
    if (bytes)
      weights[i].table8 = static_cast<const uint8_t*>(numbers) + 1024 * i;
    else
      weights[i].table16 = static_cast<const int16_t*>(numbers) + (own ? shorts * i : 0);
    weights[i].unit = unit[own ? i : 0];
    weights[i].grid = grid;
  }
}

}  // namespace
}  // namespace quip
