// SPDX-License-Identifier: Apache-2.0
// The other ops: rows of an embedding, the lattice's blocks, and what the library runs on.
#include "bindings.h"

namespace quip {
namespace {

// The tiers that multiply 1, 16 and many rows with int8 activations, by name and in this order.
std::string cpu_fastest(const Tensor& packed, std::optional<Tensor> table, std::optional<Tensor> table_integers,
                        std::optional<Tensor> table_units, std::vector<int64_t> output_sizes, int64_t k,
                        std::string code, int64_t bits, bool grid) {
  std::vector<Weight> weights = weights_of(packed, table, code, output_sizes, k, bits);
  add_integers(weights, table_integers, table_units, grid);
  std::string names;
  for (int64_t m : kRowsMeasured) names += (names.empty() ? "" : ", ") + std::string(fastest(weights[0], m).name);
  return names;
}

// Rows of a weight by number. sv has one element for each row that may be asked for.
Tensor cpu_embedding(const Tensor& ids, const Tensor& packed, std::optional<Tensor> table, const Tensor& su_,
                     const Tensor& sv_, const Tensor& base, int64_t width, std::string code, int64_t bits,
                     ScalarType dtype) {
  const int64_t n = sv_.numel(), k = su_.numel(), order = base.size(0), m = ids.numel();
  const Weight weight = weights_of(packed, table, code, {n}, k, bits).front();
  const float *su = floats(su_, k, "su"), *sv = floats(sv_, n, "sv");
  const Rotation rotation{floats(base, order * order, "base"), order, width};
  check_rotation(order, width, k);
  STD_TORCH_CHECK(ids.dim() == 1, "ids has ", ids.dim(), " dimensions: the op wants a vector");
  const int64_t* rows = static_cast<const int64_t*>(data_of(ids, ScalarType::Long, m, sizeof(int64_t), "ids"));
  for (int64_t i = 0; i < m; ++i)
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < n, "id ", rows[i], " is not in the table of ", n, " rows: give 0 to ",
                    n - 1);
  Tensor y = torch::stable::new_empty(su_, {m, k}, dtype);
  const Type type = type_of(y);
  const int64_t bytes = k * bytes_of(type);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    Memory row(k), scratch(rotation_scratch(order));
    for (int64_t i = begin; i < end; ++i) {
      ops.decode_row(weight, rows[i], row.floats);
      for (int64_t c = 0; c < k; ++c) row.floats[c] *= sv[rows[i]];
      ops.rotate_out(row.floats, k, rotation, su, type, out + i * bytes, scratch.floats);
    }
  });
  return y;
}

// The codes of a lattice layer as this tier's kernels read them. codes: int16 [n, k/8]; second: of the same shape,
// uint8 at 3 bits and int16 at 4.
Tensor cpu_lattice_blocks(const Tensor& codes, std::optional<Tensor> second, std::vector<int64_t> output_sizes,
                          int64_t bits) {
  STD_TORCH_CHECK(codes.dim() == 2, "codes has ", codes.dim(), " dimensions: the op wants [n, k/8]");
  const int64_t k = 8 * codes.size(1), count = codes.numel();
  const std::vector<int64_t> offsets = block_offsets(output_sizes, k, bits);
  int64_t n = 0;
  for (int64_t size : output_sizes) n += size;
  STD_TORCH_CHECK(n == codes.size(0), "codes has ", codes.size(0), " rows and output_sizes ", n,
                  ": give them the same");
  STD_TORCH_CHECK(bits == 2 || second.has_value(), "the second stage is missing: ", bits, " bits need residual_codes");
  const int item = bits == 3 ? 1 : 2;
  const int16_t* first =
      static_cast<const int16_t*>(data_of(codes, ScalarType::Short, count, sizeof(int16_t), "codes"));
  const char* rest = nullptr;
  if (bits > 2)
    rest = static_cast<const char*>(
        data_of(*second, bits == 3 ? ScalarType::Byte : ScalarType::Short, count, item, "residual_codes"));
  Tensor blocks = torch::stable::new_empty(codes, {offsets.back()}, ScalarType::Byte);
  uint8_t* out = blocks.mutable_data_ptr<uint8_t>();
  std::fill(out, out + offsets.back(), uint8_t(0));
  int64_t start = 0;
  for (size_t i = 0; i < output_sizes.size(); start += output_sizes[i++]) {
    const int64_t size = output_sizes[i], group = 2 * kTile, at = start * (k / 8);
    torch::stable::parallel_for(0, (size + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
      const int64_t row0 = begin * group, rows = std::min(end * group, size) - row0;
      kernels().put_rows(first + at, rest ? rest + at * item : nullptr, row0, rows, k, int(bits), out + offsets[i]);
    });
  }
  return blocks;
}

std::string cpu_tier() { return kernels().name; }

// A line for each tier: its name, and the features that it needs, with + where the CPU has one and - where not.
std::string cpu_tiers() {
  std::string lines;
  for (const Tier& tier : tiers()) {
    lines += tier.kernels->name;
    for (const Feature& feature : tier.needs) lines += std::string(feature.here ? " +" : " -") + feature.name;
    lines += "\n";
  }
  return lines;
}

// Whether the tier in use has int8 activations for a format.
bool cpu_takes_int8(std::string code, int64_t bits) {
  const auto [own, order] = code_and_order(code);
  return takes_int8(own, order, int(bits));
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("cpu_fastest", TORCH_BOX(&quip::cpu_fastest));
  m.impl("cpu_embedding", TORCH_BOX(&quip::cpu_embedding));
  m.impl("cpu_lattice_blocks", TORCH_BOX(&quip::cpu_lattice_blocks));
}

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CompositeExplicitAutograd, m) {
  m.impl("cpu_tier", TORCH_BOX(&quip::cpu_tier));
  m.impl("cpu_tiers", TORCH_BOX(&quip::cpu_tiers));
  m.impl("cpu_takes_int8", TORCH_BOX(&quip::cpu_takes_int8));
}
