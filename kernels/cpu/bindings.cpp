// SPDX-License-Identifier: Apache-2.0
// torch ops over the kernels: checks, threads, tier choice. The only file here with torch headers (stable ABI).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace quip {

int64_t viterbi_bytes(int step_bits, int vector_dim) {
  return 2 * sizeof(float) * kCosts + int64_t(kSequence / vector_dim) * (kStates >> step_bits);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& choose_kernels() {
  std::vector<const Kernels*> runnable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    runnable.push_back(avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    runnable.push_back(avx2_kernels());
#endif
  runnable.push_back(portable_kernels());
  const char* wanted = std::getenv("QUIP_VLLM_CPU_TIER");
  if (!wanted || !*wanted) return *runnable.front();
  for (const Kernels* kernels : runnable)
    if (std::string(kernels->name) == wanted) return *kernels;
  std::string names;
  for (const Kernels* kernels : runnable) names += std::string(names.empty() ? "" : ", ") + kernels->name;
  STD_TORCH_CHECK(false, "QUIP_VLLM_CPU_TIER is ", wanted, ": this CPU runs ", names, "; choose one of them or unset it");
  return *runnable.front();
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

float half_to_float(uint16_t h) {
  _Float16 value;
  std::memcpy(&value, &h, sizeof value);
  return float(value);
}

// Rounds to nearest even; NaN stays NaN.
uint16_t float_to_bfloat(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if (f != f) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

void read_row(const void* data, ScalarType type, int64_t offset, int64_t n, float* out) {
  if (type == ScalarType::Float) {
    std::memcpy(out, static_cast<const float*>(data) + offset, sizeof(float) * n);
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(data) + offset;
  if (type == ScalarType::Half) {
    for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u = uint32_t(in[i]) << 16;
    std::memcpy(out + i, &u, sizeof u);
  }
}

void write_row(const float* in, ScalarType type, int64_t offset, int64_t n, void* data) {
  if (type == ScalarType::Float) {
    std::memcpy(static_cast<float*>(data) + offset, in, sizeof(float) * n);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data) + offset;
  for (int64_t i = 0; i < n; ++i) {
    if (type == ScalarType::Half) {
      _Float16 value = _Float16(in[i]);
      std::memcpy(out + i, &value, sizeof value);
    } else {
      out[i] = float_to_bfloat(in[i]);
    }
  }
}

const float* floats(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, name, " has ", t.numel(),
                  " elements: the op wants a contiguous float32 tensor of ", count);
  return t.const_data_ptr<float>();
}

// The fused layer around its weight: rotations, signs, sizes.
struct Linear {
  const float *su, *sv;
  std::vector<const float*> bases;           // input, then each projection
  std::vector<int64_t> orders, widths;       // q and p of each
  std::vector<int64_t> output_sizes;
  int64_t n = 0, k = 0;

  Linear(const Tensor& su_, const Tensor& sv_, const std::vector<Tensor>& bases_, std::vector<int64_t> widths_,
         std::vector<int64_t> sizes, int64_t k_)
      : widths(std::move(widths_)), output_sizes(std::move(sizes)), k(k_) {
    for (int64_t size : output_sizes) n += size;
    su = floats(su_, k, "su"), sv = floats(sv_, n, "sv");
    STD_TORCH_CHECK(bases_.size() == output_sizes.size() + 1 && widths.size() == bases_.size(),
                    "bases and widths have ", bases_.size(), " and ", widths.size(),
                    " entries: give one for the input and one for each of the ", output_sizes.size(), " projections");
    for (size_t i = 0; i < bases_.size(); ++i) {
      const int64_t q = bases_[i].size(0), p = widths[i], length = i ? output_sizes[i - 1] : k;
      STD_TORCH_CHECK(p > 0 && (p & (p - 1)) == 0 && length > 0 && length % (q * p) == 0, "a rotation of ", q, " x ", p,
                      " does not divide the length ", length, ": widths are powers of two whose product with the base does");
      bases.push_back(floats(bases_[i], q * q, "base"));
      orders.push_back(q);
    }
  }
};

template <class WeightOf>
Tensor run(const Tensor& x, const Linear& layer, WeightOf weight_of) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "x has an unsupported dtype: give float32, float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == layer.k && x.is_contiguous(), "x has ", x.dim(), " dimensions and ",
                  x.numel(), " elements: the op wants a contiguous [m, ", layer.k, "]");
  const int64_t m = x.size(0), k = layer.k, n = layer.n;
  Tensor y = torch::stable::new_empty(x, {m, n});
  if (m == 0) return y;
  const Kernels& ops = kernels();
  const int64_t stride = (k + kLanes - 1) / kLanes * kLanes;
  std::vector<float> rotated(m * stride), product(m * n);
  const void* in = x.const_data_ptr();
  void* out = y.mutable_data_ptr();

  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(layer.orders[0] * layer.widths[0]);
    for (int64_t r = begin; r < end; ++r) {
      float* row = rotated.data() + r * stride;
      read_row(in, type, r * k, k, row);
      for (int64_t c = 0; c < k; ++c) row[c] *= layer.su[c];
      ops.hadamard(row, k, layer.bases[0], layer.orders[0], layer.widths[0], scratch.data());
    }
  });

  struct Panel {
    int projection;
    int64_t row0;
  };
  std::vector<Panel> panels;
  std::vector<Weight> weights;
  std::vector<int64_t> starts;
  for (int64_t i = 0, start = 0; i < int64_t(layer.output_sizes.size()); start += layer.output_sizes[i++]) {
    weights.push_back(weight_of(i, start, layer.output_sizes[i]));
    starts.push_back(start);
    for (int64_t row = 0; row < layer.output_sizes[i]; row += kTile) panels.push_back({int(i), row});
  }
  torch::stable::parallel_for(0, int64_t(panels.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const Panel& panel = panels[j];
      ops.panel(weights[panel.projection], panel.row0, rotated.data(), stride, m,
                product.data() + starts[panel.projection], n);
    }
  });

  const int64_t projections = int64_t(layer.output_sizes.size());
  torch::stable::parallel_for(0, m * projections, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t r = j / projections, i = j % projections, size = layer.output_sizes[i];
      float* row = product.data() + r * n + starts[i];
      std::vector<float> scratch(layer.orders[i + 1] * layer.widths[i + 1]);
      ops.hadamard(row, size, layer.bases[i + 1], layer.orders[i + 1], layer.widths[i + 1], scratch.data());
      for (int64_t c = 0; c < size; ++c) row[c] *= layer.sv[starts[i] + c];
      write_row(row, type, r * n + starts[i], size, out);
    }
  });
  return y;
}

Code code_of(const std::string& name) {
  if (name == "1mad") return Code::kOneMad;
  if (name == "3inst") return Code::kThreeInst;
  if (name == "hyb") return Code::kHyb;
  STD_TORCH_CHECK(name == "lut", "code is ", name, ": it must be one of 1mad, 3inst, hyb, lut");
  return Code::kLut;
}

Tensor qtip_linear(const Tensor& x, const Tensor& packed, const Tensor& su, const Tensor& sv, std::optional<Tensor> lut,
                   std::vector<Tensor> bases, std::vector<int64_t> widths, std::vector<int64_t> output_sizes,
                   std::string code_name, int64_t bits) {
  const Code code = code_of(code_name);
  STD_TORCH_CHECK(bits >= 1 && bits <= (code == Code::kHyb ? 4 : 8), "bits is ", bits, ": ", code_name, " has 1 to ",
                  code == Code::kHyb ? 4 : 8);
  const int64_t k = su.numel();
  Linear layer(su, sv, bases, widths, output_sizes, k);
  for (int64_t size : output_sizes)
    STD_TORCH_CHECK(size % kTile == 0 && k % kTile == 0, "a trellis weight of ", size, " x ", k,
                    ": both must be multiples of 16");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Short && packed.is_contiguous() &&
                      packed.numel() * kTile == layer.n * k * bits,
                  "packed has ", packed.numel(), " elements: a contiguous int16 tensor of n/16 * k*bits = ",
                  layer.n / kTile * k * bits, " is wanted");
  const float* table = nullptr;
  if (code == Code::kHyb || code == Code::kLut) {
    STD_TORCH_CHECK(lut.has_value(), "code ", code_name, " needs its table in lut");
    table = floats(*lut, code == Code::kLut ? kStates : int64_t(output_sizes.size()) * 1024, "lut");
  }
  const int16_t* words = packed.const_data_ptr<int16_t>();
  return run(x, layer, [&](int64_t i, int64_t start, int64_t size) {
    return Weight{words + start / kTile * k * bits, nullptr, nullptr, nullptr,
                  code == Code::kHyb ? table + 1024 * i : table, code, int(bits), size, k};
  });
}

Tensor quip_sharp_linear(const Tensor& x, const Tensor& codes, std::optional<Tensor> residual_codes, const Tensor& su,
                         const Tensor& sv, std::vector<Tensor> bases, std::vector<int64_t> widths,
                         std::vector<int64_t> output_sizes) {
  const int64_t k = su.numel();
  Linear layer(su, sv, bases, widths, output_sizes, k);
  STD_TORCH_CHECK(k % 8 == 0, "a lattice weight has ", k, " columns: they must be a multiple of 8");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Short && codes.is_contiguous() && codes.numel() * 8 == layer.n * k,
                  "codes has ", codes.numel(), " elements: a contiguous int16 tensor of n * k/8 = ", layer.n * k / 8,
                  " is wanted");
  const uint8_t* bytes = nullptr;
  const int16_t* words = nullptr;
  if (residual_codes.has_value()) {
    const Tensor& r = *residual_codes;
    STD_TORCH_CHECK(r.is_contiguous() && r.numel() == codes.numel() &&
                        (r.scalar_type() == ScalarType::Byte || r.scalar_type() == ScalarType::Short),
                    "residual_codes has ", r.numel(), " elements: as many uint8 or int16 as codes (", codes.numel(),
                    ") are wanted");
    if (r.scalar_type() == ScalarType::Byte)
      bytes = r.const_data_ptr<uint8_t>();
    else
      words = r.const_data_ptr<int16_t>();
  }
  const int16_t* first = codes.const_data_ptr<int16_t>();
  return run(x, layer, [&](int64_t, int64_t start, int64_t size) {
    const int64_t offset = start * (k / 8);
    return Weight{nullptr, first + offset, bytes ? bytes + offset : nullptr, words ? words + offset : nullptr,
                  nullptr, Code::kLut, 0, size, k};
  });
}

Tensor viterbi_encode(const Tensor& targets, const Tensor& values, int64_t bits) {
  const int64_t count = targets.size(0), dim = values.dim() == 2 ? values.size(0) : 0;
  STD_TORCH_CHECK((dim == 1 || dim == 2) && bits >= 1 && bits * dim <= 8, "values of ", dim, " components at ", bits,
                  " bits: 1 or 2 components and at most 8 bits a step are searched");
  const float* target = floats(targets, count * kSequence, "targets");
  const float* table = floats(values, dim * kStates, "values");
  const int64_t steps = kSequence / dim;
  Tensor states = torch::stable::new_empty(targets, {count, steps}, ScalarType::Int);
  int32_t* out = states.mutable_data_ptr<int32_t>();
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> work(viterbi_bytes(int(bits * dim), int(dim)) / sizeof(float) + kLanes);
    for (int64_t i = begin; i < end; ++i)
      ops.viterbi(target + i * kSequence, table, int(bits * dim), int(dim), out + i * steps, work.data());
  });
  return states;
}

Tensor e8p_nearest(const Tensor& x) {
  const int64_t count = x.numel() / 8;
  const float* in = floats(x, count * 8, "x");
  Tensor codes = torch::stable::new_empty(x, {count}, ScalarType::Short);
  int16_t* out = codes.mutable_data_ptr<int16_t>();
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = ops.nearest(in + 8 * i);
  });
  return codes;
}

std::string cpu_tier() { return kernels().name; }

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("qtip_linear", TORCH_BOX(&quip::qtip_linear));
  m.impl("quip_sharp_linear", TORCH_BOX(&quip::quip_sharp_linear));
  m.impl("viterbi_encode", TORCH_BOX(&quip::viterbi_encode));
  m.impl("e8p_nearest", TORCH_BOX(&quip::e8p_nearest));
}

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CompositeExplicitAutograd, m) { m.impl("cpu_tier", TORCH_BOX(&quip::cpu_tier)); }

// ---- Embeddings: rows of a weight by number ----

namespace quip {
namespace {

// weight: its n is the number of rows that may be asked for, sv's length.
Tensor look_up_rows(const Tensor& ids, const Weight& weight, const Tensor& su_, const Tensor& sv_, const Tensor& base_,
                    int64_t width, ScalarType type) {
  const int64_t n = weight.n, k = weight.k, order = base_.size(0);
  const float *su = floats(su_, k, "su"), *sv = floats(sv_, n, "sv"), *base = floats(base_, order * order, "base");
  STD_TORCH_CHECK(width > 0 && (width & (width - 1)) == 0 && k > 0 && k % (order * width) == 0, "a rotation of ", order,
                  " x ", width, " does not divide the length ", k, ": give a power of two whose product with the base does");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "dtype is not supported: give float32, float16 or bfloat16");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && ids.is_contiguous(),
                  "ids has ", ids.dim(), " dimensions: a contiguous int64 vector is wanted");
  const int64_t m = ids.numel();
  const int64_t* rows = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < m; ++i)
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < n, "id ", rows[i], " is not in the table of ", n, " rows: give 0 to ", n - 1);
  Tensor y = torch::stable::new_empty(su_, {m, k}, type);
  void* out = y.mutable_data_ptr();
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(order * width), row(k);
    for (int64_t i = begin; i < end; ++i) {
      ops.embedding_row(weight, rows[i], su, sv[rows[i]], base, order, width, scratch.data(), row.data());
      write_row(row.data(), type, i * k, k, out);
    }
  });
  return y;
}

Tensor qtip_embedding(const Tensor& ids, const Tensor& packed, const Tensor& su, const Tensor& sv,
                      std::optional<Tensor> lut, const Tensor& base, int64_t width, std::string code_name, int64_t bits,
                      ScalarType type) {
  const Code code = code_of(code_name);
  STD_TORCH_CHECK(bits >= 1 && bits <= (code == Code::kHyb ? 4 : 8), "bits is ", bits, ": ", code_name, " has 1 to ",
                  code == Code::kHyb ? 4 : 8);
  const int64_t n = sv.numel(), k = su.numel(), tiles = (n + kTile - 1) / kTile;
  STD_TORCH_CHECK(k % kTile == 0, "a trellis weight has ", k, " columns: they must be a multiple of 16");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Short && packed.is_contiguous() && packed.numel() == tiles * k * bits,
                  "packed has ", packed.numel(), " elements: a contiguous int16 tensor of ceil(n/16) * k*bits = ",
                  tiles * k * bits, " is wanted");
  const float* table = nullptr;
  if (code == Code::kHyb || code == Code::kLut) {
    STD_TORCH_CHECK(lut.has_value(), "code ", code_name, " needs its table in lut");
    table = floats(*lut, code == Code::kLut ? kStates : 1024, "lut");
  }
  const Weight weight{packed.const_data_ptr<int16_t>(), nullptr, nullptr, nullptr, table, code, int(bits), n, k};
  return look_up_rows(ids, weight, su, sv, base, width, type);
}

Tensor quip_sharp_embedding(const Tensor& ids, const Tensor& codes, std::optional<Tensor> residual_codes, const Tensor& su,
                            const Tensor& sv, const Tensor& base, int64_t width, ScalarType type) {
  const int64_t n = sv.numel(), k = su.numel();
  STD_TORCH_CHECK(k % 8 == 0, "a lattice weight has ", k, " columns: they must be a multiple of 8");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Short && codes.is_contiguous() && codes.numel() * 8 == n * k,
                  "codes has ", codes.numel(), " elements: a contiguous int16 tensor of n * k/8 = ", n * k / 8, " is wanted");
  Weight weight{nullptr, codes.const_data_ptr<int16_t>(), nullptr, nullptr, nullptr, Code::kLut, 0, n, k};
  if (residual_codes.has_value()) {
    const Tensor& r = *residual_codes;
    const bool bytes = r.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(r.is_contiguous() && r.numel() == codes.numel() && (bytes || r.scalar_type() == ScalarType::Short),
                    "residual_codes has ", r.numel(), " elements: as many uint8 or int16 as codes (", codes.numel(),
                    ") are wanted");
    if (bytes)
      weight.residual8 = r.const_data_ptr<uint8_t>();
    else
      weight.residual16 = r.const_data_ptr<int16_t>();
  }
  return look_up_rows(ids, weight, su, sv, base, width, type);
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("qtip_embedding", TORCH_BOX(&quip::qtip_embedding));
  m.impl("quip_sharp_embedding", TORCH_BOX(&quip::quip_sharp_embedding));
}
