// SPDX-License-Identifier: Apache-2.0
// The other torch ops: rows of an embedding, the quantizer's searches, and what the choice of thread blocks asks for.
#include "bindings.h"

namespace quip {
namespace {

// ids [m] -> rows of the dequantized weight, [m][k] in `dtype`; base and width are of the input rotation's inverse.
Tensor cuda_embedding(const Tensor& ids, const Tensor& packed, std::optional<Tensor> table, const Tensor& su,
                      const Tensor& sv, const Tensor& base, int64_t width, std::string code, int64_t bits,
                      ScalarType dtype) {
  const CodeKernels& info = kernels_of(code);
  const GemmEntry entry = entry_of(info, code, bits);
  STD_TORCH_CHECK(entry.rows != nullptr, "code is ", code, ": rows are decoded to fp16; name 1mad");
  STD_TORCH_CHECK(ids.dim() == 1, "ids has ", ids.dim(), " dimensions: the op wants a vector");
  const int64_t k = su.numel(), rows = sv.numel(), m = ids.numel(), tiles = (rows + kTile - 1) / kTile;
  const int64_t chunks = (k + kChunk - 1) / kChunk;
  Tensor y = torch::stable::new_empty(su, {m, k}, dtype);
  if (m == 0) return y;
  DecodeRows d{};
  d.ids = static_cast<const int64_t*>(data_of(ids, ScalarType::Long, m, sizeof(int64_t), "ids"));
  d.packed = packed_of(packed, ids, packed_words(tiles, chunks, bits));
  d.table = table_of(table, ids, code, info.table_words);
  d.sv = floats(sv, ids, rows, "sv"), d.rows = rows, d.m = int(m), d.k = int(k), d.chunks = int(chunks),
  d.offset = info.offset(int(bits));
  RotateOut out{};
  const Rotation rotation = rotation_of(base, width, k, ids);
  out.part[0] = {rotation, 0, int(k), unit_of(info, rotation)}, out.parts = 1, out.work = int(k);
  out.slices = slices_of(m, rotation.p % kSlices == 0), out.work /= out.slices;
  Memory decoded(su, m * k), scales(su, m), scratch(su, fits(out.work) ? 0 : m * k);
  d.out = decoded.floats, d.scales = scales.floats;
  out.partial = decoded.floats, out.splits = 1, out.m = int(m), out.stride = int(k);
  out.out.scales = scales.floats, out.out.sv = floats(su, ids, k, "su");  // the offset is off already
  out.out.y = y.mutable_data_ptr(), out.out.type = type_of(y), out.out.n = int(k);
  out.scratch = fits(out.work) ? nullptr : scratch.floats;
  const OnDevice on(ids);
  const device::Stream stream = on.stream;
  std::string problem = entry.rows(d, stream);
  if (problem.empty()) problem = rotate_out(out, stream);
  STD_TORCH_CHECK(problem.empty(), "the kernels for ", code, " at ", bits, " bits did not run: ", problem);
  return y;
}

// Bytes of shared memory of a thread block of decode_gemm, or 0 where no kernel is compiled for it. chunks: of a split,
// if it is the only launch, else 0.
int64_t cuda_shared_bytes(std::string code, int64_t bits, int64_t rows, int64_t warps_n, int64_t depth,
                          int64_t chunks) {
  return entry_of(kernels_of(code), code, bits).shared(int(rows), int(warps_n), int(depth), int(chunks));
}

// The same of wide_gemm, or wgmma_gemm, with thread blocks of `rows` rows.
int64_t cuda_wide_bytes(std::string code, int64_t bits, int64_t rows, bool columns) {
  const WideEntry entry = wide_entry_of(entry_of(kernels_of(code), code, bits), code, bits, columns);
  return entry.run ? entry.shared(int(rows)) : 0;
}

// targets [count][256], values [dim][65536] -> states, int32 [count][256 / dim].
Tensor cuda_encode_trellis(const Tensor& targets, const Tensor& values, int64_t bits) {
  const int64_t count = targets.size(0), dim = searched_components(values, bits), steps = kSequence / dim;
  STD_TORCH_CHECK(count <= INT32_MAX, "targets are ", count, " sequences: give at most ", INT32_MAX);
  Tensor states = torch::stable::new_empty(targets, {count, steps}, ScalarType::Int);
  EncodeTrellis e{};
  e.targets = floats(targets, targets, count * kSequence, "targets");
  e.values = floats(values, targets, dim * kStates, "values");
  if (count == 0) return states;
  e.count = int(count), e.step_bits = int(bits * dim), e.dim = int(dim);
  const SearchMemory sizes = search_memory(e.step_bits, e.dim, count);
  const Memory choices(targets, sizes.choices), costs(targets, sizes.costs);
  e.blocks = sizes.blocks, e.choices = reinterpret_cast<uint32_t*>(choices.floats), e.costs = costs.floats;
  e.states = states.mutable_data_ptr<int32_t>();
  const std::string problem = encode_trellis(e, OnDevice(targets).stream);
  STD_TORCH_CHECK(problem.empty(), "the trellis search did not run: ", problem);
  return states;
}

// x [count][8] -> codes, int16 [count].
Tensor cuda_encode_lattice(const Tensor& x) {
  const int64_t count = x.numel() / 8;
  Tensor codes = torch::stable::new_empty(x, {count}, ScalarType::Short);
  EncodeLattice e{};
  e.x = floats(x, x, count * 8, "x"), e.count = count;
  if (count == 0) return codes;
  e.codes = codes.mutable_data_ptr<int16_t>();
  const std::string problem = encode_lattice(e, OnDevice(x).stream);
  STD_TORCH_CHECK(problem.empty(), "the search of the lattice did not run: ", problem);
  return codes;
}

}  // namespace
}  // namespace quip

STABLE_TORCH_LIBRARY_IMPL(quip_vllm, QUIP_DEVICE, m) {
  m.impl("cuda_embedding", TORCH_BOX(&quip::cuda_embedding));
  m.impl("cuda_encode_trellis", TORCH_BOX(&quip::cuda_encode_trellis));
  m.impl("cuda_encode_lattice", TORCH_BOX(&quip::cuda_encode_lattice));
}
STABLE_TORCH_LIBRARY_IMPL(quip_vllm, CompositeExplicitAutograd, m) {
  m.impl("cuda_shared_bytes", TORCH_BOX(&quip::cuda_shared_bytes));
  m.impl("cuda_wide_bytes", TORCH_BOX(&quip::cuda_wide_bytes));
}
