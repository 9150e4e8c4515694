// SPDX-License-Identifier: Apache-2.0
// The ops of a linear layer, and of the experts that rows choose: checks, threads, and the calls of the kernels.
#include <cmath>
#include <cstring>
#include <numeric>

#include "bindings.h"
#include "rows.h"

namespace quip {
namespace {

// A layer, or `count` layers of equal sizes and rotations: su and sv of one stand behind those of the other.
struct Linear {
  const float *su, *sv;
  std::vector<Rotation> rotations;  // of the input, then of each part
  std::vector<int64_t> output_sizes;
  int64_t n = 0, k = 0, scratch = 0;

  Linear(const Tensor& su_, const Tensor& sv_, const std::vector<Tensor>& bases, const std::vector<int64_t>& widths,
         std::vector<int64_t> sizes, int64_t count = 1)
      : output_sizes(std::move(sizes)), k(su_.numel() / count) {
    for (int64_t size : output_sizes) {
      STD_TORCH_CHECK(size > 0 && size <= sv_.numel(), "a part has ", size, " outputs and sv ", sv_.numel(),
                      ": sv has one for each output of each part");
      n += size;
    }
    su = floats(su_, count * k, "su"), sv = floats(sv_, count * n, "sv");
    STD_TORCH_CHECK(n > 0 && bases.size() == output_sizes.size() + 1 && widths.size() == bases.size(),
                    "bases and widths have ", bases.size(), " and ", widths.size(),
                    " entries: give one for the input and one for each of the ", output_sizes.size(), " parts");
    for (size_t i = 0; i < bases.size(); ++i) {
      const int64_t q = bases[i].size(0), p = widths[i];
      check_rotation(q, p, i ? output_sizes[i - 1] : k);
      rotations.push_back({floats(bases[i], q * q, "base"), q, p});
      scratch = std::max(scratch, rotation_scratch(q));
    }
  }
};

// The weights of the parts of `count` layers, layer after layer.
std::vector<Weight> all_weights(const Tensor& packed, const std::optional<Tensor>& table,
                                const std::optional<Tensor>& integers, const std::optional<Tensor>& units,
                                const Linear& layer, const std::string& code, int64_t bits, bool grid, int64_t count) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < count; ++i) sizes.insert(sizes.end(), layer.output_sizes.begin(), layer.output_sizes.end());
  for (int64_t size : layer.output_sizes)
    STD_TORCH_CHECK(code == "e8p" || size % kTile == 0, "a trellis weight has ", size,
                    " rows: they must be a multiple of 16");
  std::vector<Weight> weights = weights_of(packed, table, code, sizes, layer.k, bits);
  add_integers(weights, integers, units, grid);
  return weights;
}

struct Panel {
  size_t part;
  int64_t row0;
};

// The panels of all parts, `rows` rows of the weight each.
std::vector<Panel> panels_of(const Linear& layer, int64_t rows) {
  std::vector<Panel> panels;
  for (size_t part = 0; part < layer.output_sizes.size(); ++part)
    for (int64_t row = 0; row < layer.output_sizes[part]; row += rows) panels.push_back({part, row});
  return panels;
}

// Writes [m * repeats, n] of `out_type`. The weights of the parts of all layers are in `weights`, layer after layer.
void run(const Tensor& x, const Linear& layer, const std::string& activations, const std::vector<Weight>& weights,
         std::vector<Rows> layers, int64_t repeats, Type out_type, void* y) {
  STD_TORCH_CHECK(activations.empty() || activations == "exact" || activations == "int8", "activations is ",
                  activations, ": give exact, int8, or nothing for int8 where it is there and x is no float32");
  const Type type = type_of(x);
  const int64_t item = bytes_of(type);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == layer.k && x.is_contiguous(), "x has ", x.dim(), " dimensions and ",
                  x.numel(), " elements: the op wants a contiguous [m, ", layer.k, "]");
  const int64_t k = layer.k, n = layer.n, parts = int64_t(layer.output_sizes.size());
  const Kernels& ops = kernels();
  std::vector<int64_t> starts{0};
  for (int64_t size : layer.output_sizes) starts.push_back(starts.back() + size);
  const bool takes = takes_int8(weights[0].code, weights[0].order, weights[0].bits);
  STD_TORCH_CHECK(takes || activations != "int8", "int8 activations are not there for this format at tier ", ops.name,
                  ": use exact ones");
  const bool int8 = takes && (activations == "int8" || (activations.empty() && type != Type::kFloat));
  const char* in = static_cast<const char*>(data_of(x, x.scalar_type(), x.numel(), item, "x"));
  char* out = static_cast<char*>(y);
  const int64_t out_item = bytes_of(out_type);
  const int64_t stride = (k + 63) / 64 * 64, chunks = (stride + kChunk8 - 1) / kChunk8;
  const int64_t rows_of_panel = int8 ? 2 * kTile : kTile;
  const std::vector<Panel> panels = panels_of(layer, rows_of_panel);

  if (int8) layers = in_pieces(std::move(layers), ops.int8_bytes(weights[0], 64) / 64);
  for (size_t begin = 0, end; begin < layers.size(); begin = end) {
    end = batch_end(layers, begin, n);
    const int64_t count = int64_t(end - begin);
    std::vector<int64_t> first{0}, first8{0};  // of each layer, its first row and byte among those of the batch
    std::vector<int64_t> owner;                // of each row
    std::vector<const Kernels*> products;      // of each layer
    for (size_t l = begin; l < end; ++l) {
      const int64_t m = int64_t(layers[l].order.size());
      first.push_back(first.back() + m);
      products.push_back(int8 ? &fastest(weights[0], m) : &ops);
      first8.push_back(first8.back() + (int8 ? (products.back()->int8_bytes(weights[0], m) + 63) / 64 * 64 : 0));
      owner.insert(owner.end(), m, int64_t(l - begin));
    }
    const int64_t m = first.back();
    Memory rotated(int8 ? 0 : m * stride), product(m * n), scales(m * (1 + chunks)), arranged(first8.back() / 4);
    int8_t* x8 = reinterpret_cast<int8_t*>(arranged.floats);
    int32_t* totals = reinterpret_cast<int32_t*>(scales.floats + m);

    torch::stable::parallel_for(0, m, 1, [&](int64_t from, int64_t to) {
      Memory scratch(layer.scratch + stride);
      for (int64_t r = from; r < to; ++r) {
        const int64_t l = owner[r], own = r - first[l];
        const Rows& rows = layers[begin + l];
        float* row = int8 ? scratch.floats + layer.scratch : rotated.floats + r * stride;
        std::fill(row + k, row + stride, 0.0f);
        ops.rotate_in(in + rows.order[own] / repeats * k * item, type, layer.su + rows.layer * k, k, layer.rotations[0],
                      row, scratch.floats);
        if (int8)
          products[l]->int8_quantize(weights[rows.layer * parts], row, own, first[l + 1] - first[l], x8 + first8[l],
                                     scales.floats + r, totals + r * chunks);
      }
    });

    // Every thread has about as many panels of each layer, and computes those of one layer in a row. The products of a
    // panel lie together, [panel][row of x][row of the weight]: rows of y would be pages apart.
    torch::stable::parallel_for(0, int64_t(panels.size()) * count, 1, [&](int64_t from, int64_t to) {
      for (int64_t l = 0; l < count; ++l)
        for (int64_t j = std::max<int64_t>(from - l + count - 1, 0) / count; j * count + l < to; ++j) {
          const auto [part, row0] = panels[j];
          const Weight& weight = weights[layers[begin + l].layer * parts + part];
          const int64_t own = first[l + 1] - first[l], width = std::min(rows_of_panel, layer.output_sizes[part] - row0);
          float* into = product.floats + first[l] * n + (starts[part] + row0) * own - row0;
          if (int8)
            products[l]->int8_panel(weight, row0, x8 + first8[l], scales.floats + first[l], totals + first[l] * chunks,
                                    own, into, width);
          else
            ops.panel(weight, row0, rotated.floats + first[l] * stride, stride, own, into, width);
        }
    });

    torch::stable::parallel_for(0, m * parts, 1, [&](int64_t from, int64_t to) {
      Memory scratch(layer.scratch + n);
      float* row = scratch.floats + layer.scratch;
      for (int64_t j = from; j < to; ++j) {
        const int64_t r = j / parts, i = j % parts, l = owner[r], own = first[l + 1] - first[l];
        const int64_t size = layer.output_sizes[i];
        const Rows& rows = layers[begin + l];
        for (int64_t row0 = 0; row0 < size; row0 += rows_of_panel) {
          const int64_t width = std::min(rows_of_panel, size - row0);
          const float* piece = product.floats + first[l] * n + (starts[i] + row0) * own + (r - first[l]) * width;
          std::copy(piece, piece + width, row + row0);
          for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(piece + width + c);  // of the next row
        }
        ops.rotate_out(row, size, layer.rotations[i + 1], layer.sv + rows.layer * n + starts[i], out_type,
                       out + (rows.order[r - first[l]] * n + starts[i]) * out_item, scratch.floats);
      }
    });
  }
}

// For each layer that a row of `ids` names, which rows those are. A negative number names none.
std::vector<Rows> rows_of(const Tensor& ids, int64_t m, int64_t count) {
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == m, "ids has ", ids.dim(), " dimensions and ", ids.numel(),
                  " elements: the op wants the layers of each of the ", m, " rows of x");
  const int64_t total = ids.numel();
  const int64_t* id = static_cast<const int64_t*>(data_of(ids, ScalarType::Long, total, sizeof(int64_t), "ids"));
  std::vector<Rows> all(count), found;
  for (int64_t i = 0; i < total; ++i) {
    STD_TORCH_CHECK(id[i] < count, "id ", id[i], " is not among the ", count, " layers: give 0 to ", count - 1,
                    ", or -1 for none");
    if (id[i] >= 0) all[id[i]].order.push_back(i);
  }
  for (int64_t l = 0; l < count; ++l)
    if (!all[l].order.empty()) found.push_back({l, std::move(all[l].order)});
  return found;
}

// Zeros in the rows of `y`, [ids.numel(), n] of `type`, that name no layer.
void clear_others(const Tensor& ids, int64_t n, Type type, void* y) {
  const int64_t bytes = n * bytes_of(type);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (id[i] < 0) std::memset(static_cast<char*>(y) + i * bytes, 0, bytes);
}

// The sums of `count` rows each, times their shares, as rows [tokens, n] of `type`.
void sum_up(float* rows, const float* shares, int64_t tokens, int64_t count, int64_t n, Type type, void* out) {
  const int64_t item = bytes_of(type);
  const std::vector<float> ones(n, 1.0f);
  torch::stable::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* const sum = rows + t * count * n;
      for (int64_t c = 0; c < n; ++c) sum[c] *= shares[t * count];
      for (int64_t i = 1; i < count; ++i)
        for (int64_t c = 0; c < n; ++c) sum[c] += shares[t * count + i] * sum[i * n + c];
      kernels().rotate_out(sum, n, {nullptr, 1, 1}, ones.data(), type, static_cast<char*>(out) + t * n * item, nullptr);
    }
  });
}

// Several layers of equal sizes, one tensor behind the other: row i of ids [m, t] names those that multiply row i of x.
// Returns [m * t, n], zeros where a number is negative; with shares, float32 [tokens, s] where tokens * s = m * t, the
// sums of s rows each, times these.
Tensor cpu_experts(const Tensor& x, const Tensor& ids, std::optional<Tensor> shares, const Tensor& packed,
                   std::optional<Tensor> table, std::optional<Tensor> table_integers, std::optional<Tensor> table_units,
                   const Tensor& su, const Tensor& sv, std::vector<Tensor> bases, std::vector<int64_t> widths,
                   std::vector<int64_t> output_sizes, std::string code, int64_t bits, std::string activations,
                   bool grid) {
  STD_TORCH_CHECK(su.dim() == 2 && su.size(0) > 0, "su has ", su.dim(),
                  " dimensions: the op wants a row for each layer");
  const int64_t count = su.size(0);
  const Linear layer(su, sv, bases, widths, output_sizes, count);
  std::vector<Rows> rows = rows_of(ids, x.size(0), count);
  const std::vector<Weight> weights =
      all_weights(packed, table, table_integers, table_units, layer, code, bits, grid, count);
  const int64_t each = ids.numel();
  if (!shares) {
    Tensor y = torch::stable::new_empty(x, {each, layer.n});
    run(x, layer, activations, weights, std::move(rows), ids.size(1), type_of(x), y.mutable_data_ptr());
    clear_others(ids, layer.n, type_of(x), y.mutable_data_ptr());
    return y;
  }
  STD_TORCH_CHECK(shares->dim() == 2 && shares->size(1) > 0, "shares has ", shares->dim(),
                  " dimensions: the op wants [tokens, s]");
  const float* share = floats(*shares, each, "shares");
  Memory products(each * layer.n);
  run(x, layer, activations, weights, std::move(rows), ids.size(1), Type::kFloat, products.floats);
  clear_others(ids, layer.n, Type::kFloat, products.floats);
  Tensor y = torch::stable::new_empty(x, {shares->size(0), layer.n});
  sum_up(products.floats, share, shares->size(0), shares->size(1), layer.n, type_of(y), y.mutable_data_ptr());
  return y;
}

Tensor cpu_linear(const Tensor& x, const Tensor& packed, std::optional<Tensor> table,
                  std::optional<Tensor> table_integers, std::optional<Tensor> table_units, const Tensor& su,
                  const Tensor& sv, std::vector<Tensor> bases, std::vector<int64_t> widths,
                  std::vector<int64_t> output_sizes, std::string code, int64_t bits, std::string activations,
                  bool grid) {
  const Linear layer(su, sv, bases, widths, output_sizes);
  const std::vector<Weight> weights =
      all_weights(packed, table, table_integers, table_units, layer, code, bits, grid, 1);
  std::vector<int64_t> order(x.dim() > 0 ? x.size(0) : 0);
  std::iota(order.begin(), order.end(), 0);
  Tensor y = torch::stable::new_empty(x, {int64_t(order.size()), layer.n});
  run(x, layer, activations, weights, order.empty() ? std::vector<Rows>{} : std::vector<Rows>{{0, order}}, 1,
      type_of(x), y.mutable_data_ptr());
  return y;
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&quip::cpu_linear));
  m.impl("cpu_experts", TORCH_BOX(&quip::cpu_experts));
}
