// SPDX-License-Identifier: Apache-2.0
// The torch ops of a linear layer, and of the experts that rows choose.
#include <array>
#include <utility>

#include "bindings.h"

namespace quip {
namespace {

// Items from an expert's to the next of a tensor that holds `count` for each expert, or 0: then all share it.
int64_t stride_of(const Tensor& t, int64_t count, int64_t experts) {
  return experts > 1 && t.numel() == experts * count ? count : 0;
}

// Weights that are decoded as a whole: their memory is twice that in bytes.
constexpr int64_t kDenseLimit = int64_t(1) << 28;

const void* bias_of(const Tensor& bias, const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(bias.numel() == n && bias.is_contiguous() && bias.device() == x.device(), "bias has ", bias.numel(),
                  " elements: the op wants ", n, " contiguous ones on the device of x");
  return bias.const_data_ptr();
}

// Whether decode_gemm's epilogue can do what rotate_out does, once it has all of k: runs of one width lie within thread
// blocks.
bool fuses(const Gemm& g, const RotateOut& out) {
  const int p = out.part[0].rotation.p;
  const auto same = [p](const RotateOut::RotatedPart& part) { return part.rotation.q == 1 && part.rotation.p == p; };
  return g.warps_n * kRowTiles * kTile % p == 0 && std::all_of(out.part, out.part + out.parts, same);
}

// a b^T of fp16 matrices, float.
Tensor multiply(const Tensor& a, const Tensor& b) {
#if defined(__CUDACC__)
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
                                    torch::stable::detail::from(ScalarType::Float)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
#else
  const auto floats = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
  return torch::stable::matmul(floats(a), torch::stable::transpose(floats(b), 0, 1));
#endif
}

// What the rotations write beside their results, while it is needed.
struct RotationMemory {
  Memory scales, totals, in_scratch, out_scratch;
  RotationMemory(const Tensor& x, RotateIn& in, RotateOut& out)
      : scales(x, in.m),
        totals(x, 2 * int64_t(in.m) * in.slices),
        in_scratch(x, fits(in.work) ? 0 : int64_t(in.m) * in.slices * in.work),
        out_scratch(x, fits(out.work) ? 0 : int64_t(in.m) * out.parts * out.slices * out.work) {
    in.scales = scales.floats, in.totals = reinterpret_cast<int64_t*>(totals.floats);
    out.out.scales = in.scales, out.out.totals = in.totals, out.out.slices = in.slices;
    in.scratch = fits(in.work) ? nullptr : in_scratch.floats,
    out.scratch = fits(out.work) ? nullptr : out_scratch.floats;
  }
};

// The layer by way of its whole weight in fp16, which is gone again afterwards.
std::string multiply_dense(const Tensor& x, const GemmEntry& entry, const Gemm& g, RotateIn in, RotateOut out,
                           device::Stream stream) {
  const int64_t columns = int64_t(g.chunks) * kChunk;
  const RotationMemory memory(x, in, out);
  Tensor rotated = torch::stable::new_empty(x, {in.m, columns}, ScalarType::Half);
  Tensor weight = torch::stable::new_empty(x, {int64_t(g.tiles) * kTile, columns}, ScalarType::Half);
  in.order = XOrder::kRows, in.out = static_cast<unsigned char*>(rotated.mutable_data_ptr());
  uint16_t* const decoded = static_cast<uint16_t*>(weight.mutable_data_ptr());
  DecodeDense d{g.packed, g.table, g.table_stride, g.tiles, g.chunks, out.out.offset, decoded, g.parts, {}};
  std::copy(g.part, g.part + g.parts, d.part);
  std::string problem = rotate_in(in, stream);
  if (problem.empty()) problem = entry.dense(d, stream);
  if (!problem.empty()) return problem;
  const Tensor product = multiply(rotated, weight);
  out.partial = product.const_data_ptr<float>(), out.splits = 1, out.out.offset = 0;
  return rotate_out(out, stream);
}

// A layer, or layers of one kind that rows choose from (`ids`): then su and sv have a row for each, and packed and table
// are one for all of them or hold one for each.
struct Layer {
  const Tensor &packed, &su, &sv;
  const std::optional<Tensor>&table, &bias;
  const std::vector<Tensor>& bases;
  const std::vector<int64_t>&widths, &output_sizes;
  const std::string& code;
  int64_t bits;
  const std::vector<int64_t>& thread_blocks;
  int64_t outputs() const {
    int64_t n = 0;
    for (int64_t size : output_sizes) {
      STD_TORCH_CHECK(size > 0 && size <= (1 << 24), "a part has ", size, " outputs: give a positive number");
      n += size;
    }
    return n;
  }
};

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The packed words and tables of the layer, and its parts.
void weight_of(Gemm& g, const Layer& layer, const CodeKernels& info, const Tensor& x, int64_t experts, int64_t tiles,
               int64_t chunks) {
  const int64_t words = packed_words(tiles, chunks, layer.bits), parts = int64_t(layer.output_sizes.size());
  const int64_t table_words = info.table_words * (info.table_per_part ? parts : 1);
  g.expert_words = stride_of(layer.packed, words, experts);
  g.packed = packed_of(layer.packed, x, g.expert_words ? experts * words : words);
  g.expert_table = layer.table ? 4 * stride_of(*layer.table, table_words, experts) : 0;
  g.table = table_of(layer.table, x, layer.code, g.expert_table ? experts * table_words : table_words);
  g.table_stride = info.table_per_part ? 4 * info.table_words : 0;
  if (info.table_per_part) {
    int64_t tile = 0;
    for (int64_t size : layer.output_sizes) {
      STD_TORCH_CHECK(size % kTile == 0, "a part of ", size, " outputs: a multiple of 16 is wanted");
      g.part[g.parts++] = {0, int(tile), int(tile + size / kTile)};
      tile += size / kTile;
    }
  } else {
    g.part[g.parts++] = {0, 0, int(tiles)};
  }
}

// m: rows of the result.
RotateIn rotate_in_of(const Layer& layer, const CodeKernels& info, const Tensor& x, int64_t experts, int64_t m) {
  const int64_t k = x.size(1);
  RotateIn in{};
  in.type = type_of(x), in.x = data_of(x, x.scalar_type(), x.numel(), bytes_of(in.type), "x");
  in.su = floats(layer.su, x, experts * k, "su");
  in.rotation = rotation_of(layer.bases[0], layer.widths[0], k, x);
  in.m = int(m), in.k = int(k), in.chunks = int((k + kChunk - 1) / kChunk), in.order = info.order;
  in.slices = slices_of(m, is_aligned(in.x) && in.rotation.p % kSlices == 0 && info.order != XOrder::kBytes);
  in.early = layer.code.ends_with("_large");
  in.growth = int(std::ceil(std::log2(double(in.rotation.q) * in.rotation.p)));
  in.work = int((in.rotation.q > 1 ? 2 * k : k) / in.slices);
  return in;
}

RotateOut rotate_out_of(const Layer& layer, const CodeKernels& info, const Tensor& x, Tensor& y, int64_t experts) {
  const int64_t m = y.size(0), n = y.size(1), width = (n + kTile - 1) / kTile * kTile;
  RotateOut out{};
  out.out.offset = info.offset(int(layer.bits)), out.out.sv = floats(layer.sv, x, experts * n, "sv");
  if (layer.bias) out.out.bias = bias_of(*layer.bias, x, n), out.out.bias_type = type_of(*layer.bias, "bias");
  out.out.y = y.mutable_data_ptr(), out.out.type = type_of(x), out.out.n = int(n);
  out.m = int(m), out.stride = int(width), out.split_stride = m * width;
  out.integers = info.order == XOrder::kBytes;
  out.slices = kSlices;
  int start = 0;
  for (const int64_t wide_size : layer.output_sizes) {
    const int size = int(wide_size), i = out.parts++;
    const Rotation rotation = rotation_of(layer.bases[i + 1], layer.widths[i + 1], size, x);
    out.part[i] = {rotation, start, size, unit_of(info, rotation)};
    out.work = std::max(out.work, size);
    out.slices = std::min(out.slices, slices_of(m, start % kSlices == 0 && rotation.p % kSlices == 0));
    start += size;
  }
  out.work /= out.slices;
  return out;
}

// x [m][k] -> [m][n], plus bias [n], if there is one. thread_blocks has the chunks of a split, and then warps along n
// and depth for 1, up to 8, up to 16 and more rows. Up to one_launch_rows rows decode_gemm is the only launch, where it
// can be. From dense_rows rows on (0 is never) the weight is decoded as a whole, and cuBLAS multiplies. wide comes before
// that: empty, or the rows from which wide_gemm multiplies, the most of them in a thread block, the chunks of a split
// where one thread block has all rows (more rows fill a GPU, and k is whole), and 1 for wgmma_gemm in its place, else 0.
// With ids [rows of x][results of a row] it writes that many rows to y, those of the experts in turn.
void run_layer(const Layer& layer, const Tensor& x, Tensor& y, const Tensor* ids, int64_t one_launch_rows,
               int64_t dense_rows, const std::vector<int64_t>& wide) {
  const std::string& code = layer.code;
  const int64_t bits = layer.bits;
  const std::vector<int64_t>& thread_blocks = layer.thread_blocks;
  const CodeKernels& info = kernels_of(code);
  const GemmEntry entry = entry_of(info, code, bits);
  const int64_t experts = ids ? layer.su.size(0) : 1, k = layer.su.numel() / experts;
  const int64_t parts = int64_t(layer.output_sizes.size());
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == k && x.is_contiguous() && k > 0, "x has ", x.dim(), " dimensions and ",
                  x.numel(), " elements: the op wants a contiguous [m, ", k, "]");
  STD_TORCH_CHECK(parts >= 1 && parts <= kMaxParts && int64_t(layer.bases.size()) == parts + 1 &&
                      layer.widths.size() == layer.bases.size(),
                  "bases and widths have ", layer.bases.size(), " and ", layer.widths.size(),
                  " entries: give one for the input and one for each of the ", parts,
                  " parts, of which there are at most ", kMaxParts);
  const int64_t m = y.size(0), n = y.size(1), tiles = (n + kTile - 1) / kTile, chunks = (k + kChunk - 1) / kChunk;
  if (m == 0) return;
  STD_TORCH_CHECK(thread_blocks.size() == 8 && thread_blocks[0] > 0, "thread_blocks has ", thread_blocks.size(),
                  " entries: it comes from cuda_shapes.choose");
  const int rows_block = int(std::min(m, ids ? rows_of_expert(m, experts) : kRowBlock));
  const int turn = rows_block == 1 ? 0 : rows_block <= 8 ? 1 : rows_block <= 16 ? 2 : 3;
  const int64_t warps_n = thread_blocks[1 + 2 * turn], depth = turn == 3 ? 1 : thread_blocks[2 + 2 * turn];
  STD_TORCH_CHECK(entry.shared(rows_block, int(warps_n), int(depth), 0) > 0, "thread blocks of ", warps_n,
                  " warps along the outputs and depth ", depth, " are not compiled for ", code, " at ", bits,
                  " bits and ", m, " rows: take those of cuda_shapes.choose");
  const bool columns = wide.size() == 4 && wide[3] == 1;
  const WideEntry wide_entry = wide_entry_of(entry, code, bits, columns);
  STD_TORCH_CHECK(
      wide.empty() || (wide.size() == 4 && wide[0] > 0 && wide[1] > 0 && wide[1] <= kWideRows && wide[1] % 8 == 0 &&
                       wide[2] > 0 && wide_entry.run && wide_entry.shared(int(wide[1]))),
      "wide has ", wide.size(), " entries, for ", code, " at ", bits, " bits: it comes from cuda_shapes.choose_wide");
  const bool is_wide = !wide.empty() && m >= wide[0];
  // As few row blocks as there can be, of about as many rows each.
  const int64_t row_blocks = is_wide ? (m + wide[1] - 1) / wide[1] : 0;
  const int64_t row_block = is_wide ? ((m + row_blocks - 1) / row_blocks + 7) / 8 * 8 : ids ? rows_block : kRowBlock;

  Gemm g{};
  weight_of(g, layer, info, x, experts, tiles, chunks);
  g.m = int(m), g.tiles = int(tiles), g.chunks = int(chunks);
  g.split_chunks = int(std::min(row_blocks > 1 ? chunks
                                : is_wide      ? wide[2]
                                               : thread_blocks[0],
                                chunks)),
  g.splits = int((chunks + g.split_chunks - 1) / g.split_chunks);
  g.warps_n = int(warps_n), g.depth = int(depth), g.row_block = int(row_block);
  RotateIn in = rotate_in_of(layer, info, x, experts, m);
  in.row_block = g.row_block, in.columns = is_wide && columns;
  RotateOut out = rotate_out_of(layer, info, x, y, experts);
  out.splits = g.splits;

  const OnDevice on(x);
  const device::Stream stream = on.stream;
  if (!is_wide && dense_rows > 0 && m >= dense_rows && entry.dense && tiles * kTile * chunks * kChunk <= kDenseLimit) {
    const std::string problem = multiply_dense(x, entry, g, in, out, stream);
    STD_TORCH_CHECK(problem.empty(), "the kernels for ", code, " at ", bits, " bits did not run: ", problem);
    return;
  }

  // Where rows choose their experts: the most blocks of rows that there can be, one row in each but as few as can be.
  const int64_t groups = ids ? std::min(experts + 1, m) : 0;
  const int64_t blocks = ids ? (m + groups * (row_block - 1)) / row_block : 0;
  std::optional<Memory> routing;
  if (ids) {
    routing.emplace(x, 4 * m + blocks);
    static_assert(sizeof(RoutedRow) == 4 * sizeof(float));
    in.routed = out.out.routed = g.routed = reinterpret_cast<const RoutedRow*>(routing->floats);
    g.blocks = reinterpret_cast<const int*>(routing->floats + 4 * m), g.block_count = int(blocks);
    in.results = int(m / x.size(0)), in.y = out.out.y, in.n = int(n);
  }

  const bool whole = g.splits == 1, within = !is_wide && fuses(g, out);
  const bool alone = within && m <= one_launch_rows && is_aligned(in.x) && in.rotation.q == 1 &&
                     in.rotation.p == kRun && entry.shared(rows_block, g.warps_n, g.depth, g.split_chunks) > 0;
  const bool fused = within && (whole || alone);
  if (alone) in.slices = g.splits * int(tiles), in.work = 0;  // totals of each thread block
  const int64_t rows_of_x = std::max(m, row_blocks * row_block);
  Memory arranged(x, alone ? 0 : (rows_of_x * chunks + kSpare * rows_block) * row_bytes(info.order) / 4);
  const int64_t sums = fused && whole ? 0 : g.splits * out.split_stride;
  Memory partial(x, sums + (alone ? tiles : 0));  // and behind the sums the counters of the only launch
  const RotationMemory memory(x, in, out);
  in.out = reinterpret_cast<unsigned char*>(arranged.floats), g.x = in.out;
  g.partial = partial.floats, out.partial = partial.floats;
  if (fused) g.width = out.part[0].rotation.p, g.unit = out.part[0].unit, g.out = out.out;
  if (alone) g.in = in, g.arrivals = reinterpret_cast<uint32_t*>(partial.floats + sums);

  std::string problem;
  if (ids) {
    STD_TORCH_CHECK(ids->device() == x.device(), "ids and x are on different devices: move one");
    const void* const of_x = data_of(*ids, ScalarType::Long, m, sizeof(int64_t), "ids");
    problem = route(
        {static_cast<const int64_t*>(of_x), int(m), int(experts), int(row_block),
         reinterpret_cast<RoutedRow*>(routing->floats), reinterpret_cast<int*>(routing->floats + 4 * m), int(blocks)},
        stream);
  }
  if (!alone && problem.empty()) problem = rotate_in(in, stream);
  if (alone && !whole) problem = device::clear(g.arrivals, tiles * sizeof(uint32_t), stream);
  if (problem.empty()) problem = (is_wide ? wide_entry.run : entry.run)(g, stream);
  if (problem.empty() && !fused) problem = rotate_out(out, stream);
  STD_TORCH_CHECK(problem.empty(), "the kernels for ", code, " at ", bits, " bits did not run: ", problem);
}

Tensor cuda_linear(const Tensor& x, const Tensor& packed, std::optional<Tensor> table, const Tensor& su,
                   const Tensor& sv, std::vector<Tensor> bases, std::vector<int64_t> widths,
                   std::vector<int64_t> output_sizes, std::optional<Tensor> bias, std::string code, int64_t bits,
                   std::vector<int64_t> thread_blocks, int64_t one_launch_rows, int64_t dense_rows,
                   std::vector<int64_t> wide) {
  const Layer layer{packed, su, sv, table, bias, bases, widths, output_sizes, code, bits, thread_blocks};
  Tensor y = torch::stable::new_empty(x, {x.size(0), layer.outputs()});
  run_layer(layer, x, y, nullptr, one_launch_rows, dense_rows, wide);
  return y;
}

// x [rows][k], ids [rows][t] -> [rows * t][n]: each row by the experts that it names, 0 where an id is negative. Rows
// of one expert are multiplied together, at most kRowBlock in a thread block. So pieces of that many rows per expert
// decode as little as the whole, and bound the memory of the sums.
Tensor cuda_experts(const Tensor& x, const Tensor& ids, const Tensor& packed, std::optional<Tensor> table,
                    const Tensor& su, const Tensor& sv, std::vector<Tensor> bases, std::vector<int64_t> widths,
                    std::vector<int64_t> output_sizes, std::string code, int64_t bits,
                    std::vector<int64_t> thread_blocks) {
  STD_TORCH_CHECK(su.dim() == 2 && su.size(0) > 0 && su.size(0) <= kMostExperts, "su has ", su.dim(),
                  " dimensions: the op wants a row for each expert, of which there are at most ", kMostExperts);
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == x.size(0) && ids.is_contiguous(), "ids has ", ids.dim(),
                  " dimensions and ", ids.numel(), " elements: the op wants a contiguous row for each of the ",
                  x.size(0), " rows of x");
  const std::optional<Tensor> bias;
  const Layer layer{packed, su, sv, table, bias, bases, widths, output_sizes, code, bits, thread_blocks};
  const int64_t rows = x.size(0), results = ids.size(1), n = layer.outputs();
  Tensor y = torch::stable::new_empty(x, {rows * results, n});
  if (results == 0) return y;
  const int64_t piece = std::max<int64_t>(kRowBlock * su.size(0) / results, 1);
  for (int64_t first = 0; first < rows; first += piece) {
    const int64_t count = std::min(piece, rows - first);
    const auto part = [&](Tensor t, int64_t each) { return torch::stable::narrow(t, 0, first * each, count * each); };
    const Tensor of_rows = part(ids, 1);
    Tensor to = part(y, results);
    run_layer(layer, part(x, 1), to, &of_rows, 0, 0, {});
  }
  return y;
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, QUIP_DEVICE, m) {
  m.impl("cuda_linear", TORCH_BOX(&quip::cuda_linear));
  m.impl("cuda_experts", TORCH_BOX(&quip::cuda_experts));
}
