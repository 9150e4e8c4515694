// SPDX-License-Identifier: Apache-2.0
// torch ops over the kernels: checks, threads, tier choice. The only file here with torch headers (stable ABI).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace quip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__)
// AMX-TILE and AMX-INT8 in the CPU, and the system's leave to use the tile registers.
bool amx_runs() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The tiers that this CPU runs, best first.
std::vector<const Kernels*> runnable_tiers() {
  std::vector<const Kernels*> tiers;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni")) {
      if (amx_runs()) tiers.push_back(amx_kernels());
      tiers.push_back(avx512_vnni_kernels());
    }
    tiers.push_back(avx512_kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    tiers.push_back(avx2_kernels());
#endif
  tiers.push_back(portable_kernels());
#if defined(__x86_64__)
  for (const Kernels* tier : tiers)
    if (std::string(tier->name) == "avx512_vnni") return tiers.push_back(amx_emulated_kernels()), tiers;
#endif
  return tiers;
}

std::string names_of(const std::vector<const Kernels*>& tiers) {
  std::string names;
  for (const Kernels* tier : tiers) names += std::string(names.empty() ? "" : ", ") + tier->name;
  return names;
}

const Kernels& choose_kernels() {
  const std::vector<const Kernels*> tiers = runnable_tiers();
  const char* wanted = std::getenv("QUIP_VLLM_CPU_TIER");
  if (!wanted || !*wanted) return *tiers.front();
  for (const Kernels* tier : tiers)
    if (std::string(tier->name) == wanted) return *tier;
  STD_TORCH_CHECK(false, "QUIP_VLLM_CPU_TIER is ", wanted, ": this CPU runs ", names_of(tiers),
                  "; choose one of them or unset it");
  return *tiers.front();
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// Where a tensor lies. Compiled loops count on a multiple of the item's size, which torch.frombuffer does not give.
const void* address(const Tensor& t, size_t item, const char* name) {
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % item == 0, name, " lies at an address that is no multiple of ", item,
                  " bytes, the size of its items: give a clone of it");
  return data;
}

const float* floats(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, name, " has ", t.numel(),
                  " elements: the op wants a contiguous float32 tensor of ", count);
  return static_cast<const float*>(address(t, sizeof(float), name));
}

// The fused layer around its weight: rotations, signs, sizes.
struct Linear {
  const float *su, *sv;
  std::vector<Rotation> rotations;  // of the input, then of each projection
  std::vector<int64_t> output_sizes;
  int64_t n = 0, k = 0, scratch = 0;

  Linear(const Tensor& su_, const Tensor& sv_, const std::vector<Tensor>& bases, const std::vector<int64_t>& widths,
         std::vector<int64_t> sizes, int64_t k_)
      : output_sizes(std::move(sizes)), k(k_) {
    for (int64_t size : output_sizes) {
      STD_TORCH_CHECK(size > 0 && size <= sv_.numel(), "a projection has ", size, " outputs and sv ", sv_.numel(),
                      ": sv has one for each output of each projection");
      n += size;
    }
    su = floats(su_, k, "su"), sv = floats(sv_, n, "sv");
    STD_TORCH_CHECK(n > 0 && bases.size() == output_sizes.size() + 1 && widths.size() == bases.size(),
                    "bases and widths have ", bases.size(), " and ", widths.size(),
                    " entries: give one for the input and one for each of the ", output_sizes.size(), " projections");
    for (size_t i = 0; i < bases.size(); ++i) {
      const int64_t q = bases[i].size(0), p = widths[i], length = i ? output_sizes[i - 1] : k;
      const bool divides = q > 0 && p > 0 && (p & (p - 1)) == 0 && length > 0 && length % q == 0 && length / q % p == 0;
      STD_TORCH_CHECK(divides, "a rotation of ", q, " x ", p, " does not divide the length ", length, ": widths are powers of two whose product with the base does");
      rotations.push_back({floats(bases[i], q * q, "base"), q, p});
      scratch = std::max(scratch, q * p);
    }
  }
};

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Half: return Type::kHalf;
    case ScalarType::BFloat16: return Type::kBfloat;
    default: STD_TORCH_CHECK(false, "x has an unsupported dtype: give float32, float16 or bfloat16");
  }
  return Type::kFloat;
}

// Memory of one call, from torch's allocator.
struct Memory {
  Tensor tensor;
  float* floats;
  Memory(const Tensor& like, int64_t count)
      : tensor(torch::stable::new_empty(like, {std::max<int64_t>(count, 1)}, ScalarType::Float)),
        floats(tensor.mutable_data_ptr<float>()) {}
};

struct Panel {
  int projection;
  int64_t row0;
};

// The panels of all projections, `rows` rows of the weight each.
std::vector<Panel> panels_of(const Linear& layer, int64_t rows) {
  std::vector<Panel> panels;
  for (size_t i = 0; i < layer.output_sizes.size(); ++i)
    for (int64_t row = 0; row < layer.output_sizes[i]; row += rows) panels.push_back({int(i), row});
  return panels;
}

template <class WeightOf>
Tensor run(const Tensor& x, const Linear& layer, const std::string& activations, WeightOf weight_of) {
  STD_TORCH_CHECK(activations.empty() || activations == "exact" || activations == "int8", "activations is ", activations,
                  ": give exact, int8, or nothing for int8 where it is there and x is no float32");
  const Type type = type_of(x);
  const int64_t item = type == Type::kFloat ? 4 : 2;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == layer.k && x.is_contiguous(), "x has ", x.dim(), " dimensions and ",
                  x.numel(), " elements: the op wants a contiguous [m, ", layer.k, "]");
  const int64_t m = x.size(0), k = layer.k, n = layer.n;
  Tensor y = torch::stable::new_empty(x, {m, n});
  if (m == 0) return y;
  const Kernels& ops = kernels();
  std::vector<Weight> weights;
  std::vector<int64_t> starts;
  for (size_t i = 0; i < layer.output_sizes.size(); ++i) {
    starts.push_back(i ? starts.back() + layer.output_sizes[i - 1] : 0);
    weights.push_back(weight_of(i, starts.back(), layer.output_sizes[i]));
  }
  const bool takes = ops.int8_takes && ops.int8_takes(weights[0]);
  STD_TORCH_CHECK(takes || activations != "int8", "int8 activations are not there for this format at tier ", ops.name,
                  ": use exact ones");
  const bool int8 = takes && (activations == "int8" || (activations.empty() && type != Type::kFloat));
  const char* in = static_cast<const char*>(address(x, item, "x"));
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t stride = (k + 63) / 64 * 64, chunks = (stride + kChunk8 - 1) / kChunk8;
  Memory rotated(x, int8 ? 0 : m * stride), product(x, m * n), scales(x, m * (1 + chunks));
  Memory arranged(x, int8 ? ops.int8_bytes(weights[0], m) / 4 : 0);
  int8_t* x8 = reinterpret_cast<int8_t*>(arranged.floats);
  int32_t* totals = reinterpret_cast<int32_t*>(scales.floats + m);

  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    Memory scratch(x, layer.scratch + stride);
    for (int64_t r = begin; r < end; ++r) {
      float* row = int8 ? scratch.floats + layer.scratch : rotated.floats + r * stride;
      std::fill(row + k, row + stride, 0.0f);
      ops.rotate_in(in + r * k * item, type, layer.su, k, layer.rotations[0], row, scratch.floats);
      if (int8) ops.int8_quantize(weights[0], row, r, m, x8, scales.floats + r, totals + r * chunks);
    }
  });

  const std::vector<Panel> panels = panels_of(layer, int8 ? 2 * kTile : kTile);
  torch::stable::parallel_for(0, int64_t(panels.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const auto [i, row0] = panels[j];
      float* to = product.floats + starts[i];
      if (int8)
        ops.int8_panel(weights[i], row0, x8, scales.floats, totals, m, to, n);
      else
        ops.panel(weights[i], row0, rotated.floats, stride, m, to, n);
    }
  });

  const int64_t projections = int64_t(layer.output_sizes.size());
  torch::stable::parallel_for(0, m * projections, 1, [&](int64_t begin, int64_t end) {
    Memory scratch(x, layer.scratch);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t r = j / projections, i = j % projections, first = r * n + starts[i];
      ops.rotate_out(product.floats + first, layer.output_sizes[i], layer.rotations[i + 1], layer.sv + starts[i], type,
                     out + first * item, scratch.floats);
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

// Whether HYB's table in bytes is a grid of magnitudes (formats/trellis_codes.py), all even.
bool is_grid(const uint8_t* lut8) {
  const uint8_t *x = lut8, *y = lut8 + 512;
  bool grid = true;
  for (int r = 0; r < 256; ++r)
    grid &= x[r] == x[r / 128 * 128 + r % 16] && y[r] == y[r / 16 * 16] && x[r] >= 128 && y[r] >= 128 && x[256 + r] == x[r] &&
            y[256 + r] == uint8_t(-y[r]) && (x[r] | y[r]) % 2 == 0;
  return grid;
}

Tensor qtip_linear(const Tensor& x, const Tensor& packed, const Tensor& su, const Tensor& sv, std::optional<Tensor> lut,
                   std::optional<Tensor> lut_integers, std::optional<Tensor> lut_units, std::vector<Tensor> bases,
                   std::vector<int64_t> widths, std::vector<int64_t> output_sizes, std::string code_name, int64_t bits,
                   std::string activations) {
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
  const uint8_t* table8 = nullptr;
  const int16_t* table16 = nullptr;
  const float* units = nullptr;
  if (table) {
    const bool bytes = code == Code::kHyb;
    const int64_t count = bytes ? int64_t(output_sizes.size()) : 1, size = bytes ? 1024 : kStates + 1;
    STD_TORCH_CHECK(lut_integers.has_value() && lut_units.has_value() && lut_integers->is_contiguous() &&
                        lut_integers->scalar_type() == (bytes ? ScalarType::Byte : ScalarType::Short) &&
                        lut_integers->numel() == count * size,
                    "code ", code_name, " needs its table as ", count * size, bytes ? " bytes" : " int16",
                    " in lut_integers and their units in lut_units, too");
    if (bytes) table8 = lut_integers->const_data_ptr<uint8_t>();
    if (!bytes) table16 = static_cast<const int16_t*>(address(*lut_integers, sizeof(int16_t), "lut_integers"));
    units = floats(*lut_units, count, "lut_units");
  }
  const int16_t* words = static_cast<const int16_t*>(address(packed, sizeof(int16_t), "packed"));
  return run(x, layer, activations, [&](int64_t i, int64_t start, int64_t size) {
    Weight weight{words + start / kTile * k * bits, nullptr, table, code, int(bits), size, k};
    weight.lut16 = table16;
    if (units) weight.lut_unit = units[table8 ? i : 0];
    if (table8) {
      weight.lut = table + 1024 * i;
      weight.lut8 = table8 + 1024 * i;
      weight.lut_grid = is_grid(weight.lut8);
    }
    return weight;
  });
}

// Where the blocks of each projection of a lattice layer begin, and the bytes of all.
std::vector<int64_t> block_offsets(const std::vector<int64_t>& output_sizes, int64_t k, int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, "bits is ", bits, ": the lattice has 2, 3 and 4");
  STD_TORCH_CHECK(k > 0 && k % 8 == 0, "a lattice weight has ", k, " columns: they must be a multiple of 8");
  std::vector<int64_t> offsets{0};
  for (int64_t size : output_sizes) {
    STD_TORCH_CHECK(size > 0, "a projection has ", size, " outputs: give at least one");
    offsets.push_back(offsets.back() + kernels().lattice_bytes(size, k, int(bits)));
  }
  return offsets;
}

// The codes of a layer as this tier's kernels read them: int16 [n, k/8] and, of the same shape, uint8 at 3 bits, int16 at 4.
Tensor quip_sharp_blocks(const Tensor& codes, std::optional<Tensor> second, std::vector<int64_t> output_sizes, int64_t bits) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == ScalarType::Short && codes.is_contiguous(), "codes has ",
                  codes.dim(), " dimensions and ", codes.numel(), " elements: a contiguous int16 [n, k/8] is wanted");
  const int64_t k = 8 * codes.size(1);
  const std::vector<int64_t> offsets = block_offsets(output_sizes, k, bits);
  int64_t n = 0;
  for (int64_t size : output_sizes) n += size;
  STD_TORCH_CHECK(n == codes.size(0), "codes has ", codes.size(0), " rows and output_sizes ", n, ": give them the same");
  STD_TORCH_CHECK(bits == 2 || (second.has_value() && second->is_contiguous() && second->numel() == codes.numel() &&
                                second->scalar_type() == (bits == 3 ? ScalarType::Byte : ScalarType::Short)),
                  "the second stage at ", bits, " bits is a contiguous tensor of ", codes.numel(), " elements, ",
                  bits == 3 ? "uint8" : "int16");
  Tensor blocks = torch::stable::new_empty(codes, {offsets.back()}, ScalarType::Byte);
  uint8_t* out = blocks.mutable_data_ptr<uint8_t>();
  std::fill(out, out + offsets.back(), uint8_t(0));
  const int16_t* first = static_cast<const int16_t*>(address(codes, sizeof(int16_t), "codes"));
  const int item = bits == 3 ? 1 : 2;
  const char* rest = bits == 2 ? nullptr : static_cast<const char*>(address(*second, item, "residual_codes"));
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

// The blocks of each projection of a lattice layer, checked.
std::vector<const uint8_t*> lattice_blocks(const Tensor& blocks, const std::vector<int64_t>& output_sizes, int64_t k,
                                           int64_t bits) {
  const std::vector<int64_t> offsets = block_offsets(output_sizes, k, bits);
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Byte && blocks.is_contiguous() && blocks.numel() == offsets.back(),
                  "blocks has ", blocks.numel(), " elements: a contiguous uint8 tensor of ", offsets.back(), " is wanted");
  std::vector<const uint8_t*> found;
  for (size_t i = 0; i < output_sizes.size(); ++i) found.push_back(blocks.const_data_ptr<uint8_t>() + offsets[i]);
  return found;
}

Tensor quip_sharp_linear(const Tensor& x, const Tensor& blocks, const Tensor& su, const Tensor& sv,
                         std::vector<Tensor> bases, std::vector<int64_t> widths, std::vector<int64_t> output_sizes,
                         int64_t bits, std::string activations) {
  const int64_t k = su.numel();
  Linear layer(su, sv, bases, widths, output_sizes, k);
  const std::vector<const uint8_t*> bytes = lattice_blocks(blocks, output_sizes, k, bits);
  return run(x, layer, activations, [&](int64_t i, int64_t, int64_t size) {
    return Weight{nullptr, bytes[i], nullptr, Code::kLut, int(bits), size, k};
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
    ops.viterbi(target + begin * kSequence, end - begin, table, int(bits * dim), int(dim), out + begin * steps);
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

// Whether this tier has int8 activations for a format; code_name is empty for the lattice.
bool cpu_takes_int8(std::string code_name, int64_t bits) {
  const uint8_t block = 0;
  const bool lattice = code_name.empty();
  const Weight w{nullptr, lattice ? &block : nullptr, nullptr, lattice ? Code::kLut : code_of(code_name), int(bits), 16, 16};
  return kernels().int8_takes && kernels().int8_takes(w);
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("qtip_linear", TORCH_BOX(&quip::qtip_linear));
  m.impl("quip_sharp_linear", TORCH_BOX(&quip::quip_sharp_linear));
  m.impl("quip_sharp_blocks", TORCH_BOX(&quip::quip_sharp_blocks));
  m.impl("viterbi_encode", TORCH_BOX(&quip::viterbi_encode));
  m.impl("e8p_nearest", TORCH_BOX(&quip::e8p_nearest));
}

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CompositeExplicitAutograd, m) {
  m.impl("cpu_tier", TORCH_BOX(&quip::cpu_tier));
  m.impl("cpu_takes_int8", TORCH_BOX(&quip::cpu_takes_int8));
}

// ---- Embeddings: rows of a weight by number ----

namespace quip {
namespace {

// weight: its n is the number of rows that may be asked for, sv's length.
Tensor look_up_rows(const Tensor& ids, const Weight& weight, const Tensor& su_, const Tensor& sv_, const Tensor& base_,
                    int64_t width, ScalarType dtype) {
  const int64_t n = weight.n, k = weight.k, order = base_.size(0);
  const float *su = floats(su_, k, "su"), *sv = floats(sv_, n, "sv");
  const Rotation rotation{floats(base_, order * order, "base"), order, width};
  STD_TORCH_CHECK(width > 0 && (width & (width - 1)) == 0 && k > 0 && k % (order * width) == 0, "a rotation of ", order,
                  " x ", width, " does not divide the length ", k, ": give a power of two whose product with the base does");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && ids.is_contiguous(),
                  "ids has ", ids.dim(), " dimensions: a contiguous int64 vector is wanted");
  const int64_t m = ids.numel();
  const int64_t* rows = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < m; ++i)
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < n, "id ", rows[i], " is not in the table of ", n, " rows: give 0 to ", n - 1);
  Tensor y = torch::stable::new_empty(su_, {m, k}, dtype);
  const Type type = type_of(y);
  const int64_t bytes = k * (type == Type::kFloat ? 4 : 2);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const Kernels& ops = kernels();
  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    Memory row(su_, k), scratch(su_, order * width);
    for (int64_t i = begin; i < end; ++i) {
      ops.decode_row(weight, rows[i], row.floats);
      for (int64_t c = 0; c < k; ++c) row.floats[c] *= sv[rows[i]];
      ops.rotate_out(row.floats, k, rotation, su, type, out + i * bytes, scratch.floats);
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
  const Weight weight{packed.const_data_ptr<int16_t>(), nullptr, table, code, int(bits), n, k};
  return look_up_rows(ids, weight, su, sv, base, width, type);
}

Tensor quip_sharp_embedding(const Tensor& ids, const Tensor& blocks, const Tensor& su, const Tensor& sv, const Tensor& base,
                            int64_t width, int64_t bits, ScalarType type) {
  const uint8_t* bytes = lattice_blocks(blocks, {sv.numel()}, su.numel(), bits).front();
  return look_up_rows(ids, {nullptr, bytes, nullptr, Code::kLut, int(bits), sv.numel(), su.numel()}, su, sv, base, width, type);
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("qtip_embedding", TORCH_BOX(&quip::qtip_embedding));
  m.impl("quip_sharp_embedding", TORCH_BOX(&quip::quip_sharp_embedding));
}
