// SPDX-License-Identifier: Apache-2.0
// The ops of the quantizer: the searches for the codes of weights.
#include "../torch_checks.h"
#include "tiers.h"

namespace quip {
namespace {

// targets [count, 256], values [vector_dim, 65536] -> states, int32 [count, 256 / vector_dim].
Tensor encode_trellis(const Tensor& targets, const Tensor& values, int64_t bits) {
  const int64_t count = targets.size(0), dim = searched_components(values, bits);
  const float* target = floats(targets, count * kSequence, "targets");
  const float* table = floats(values, dim * kStates, "values");
  const int64_t steps = kSequence / dim;
  Tensor states = torch::stable::new_empty(targets, {count, steps}, ScalarType::Int);
  int32_t* out = states.mutable_data_ptr<int32_t>();
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    ops.encode_trellis(target + begin * kSequence, end - begin, table, int(bits * dim), int(dim), out + begin * steps);
  });
  return states;
}

// x [count, 8] -> codes, int16 [count].
Tensor encode_lattice(const Tensor& x) {
  const int64_t count = x.numel() / 8;
  const float* in = floats(x, count * 8, "x");
  Tensor codes = torch::stable::new_empty(x, {count}, ScalarType::Short);
  int16_t* out = codes.mutable_data_ptr<int16_t>();
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = ops.encode_lattice(in + 8 * i);
  });
  return codes;
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("encode_trellis", TORCH_BOX(&quip::encode_trellis));
  m.impl("encode_lattice", TORCH_BOX(&quip::encode_lattice));
}
