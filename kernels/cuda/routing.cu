// SPDX-License-Identifier: Apache-2.0
// Puts the rows that experts share in the order of the experts, in one launch of one thread block: a count of each
// expert's rows, and then a place for each row. The order among the rows of one expert is any: no result depends on it.
// Rows that name no expert are the last, and in no block.
#include "kernels.h"

namespace quip {
namespace {

constexpr int kThreads = 1024;

KERNEL(kThreads) route_kernel(const Route r) {
  SHARED(memory);
  // Of each expert, of the rows whose expert does not exist, and of those that name none: rows, the first, and the next
  // that is free.
  int* const rows = reinterpret_cast<int*>(memory);
  const int none = r.experts + 1;
  int* const first = rows + none + 1;
  int* const next = first + none + 1;
  const auto expert_of = [&](int i) {
    const int64_t id = r.ids[i];
    return id < 0 ? none : id < r.experts ? int(id) : r.experts;
  };
  for (int e = threadIdx.x; e <= none; e += blockDim.x) rows[e] = 0;
  device::wait_for_writes();
  device::start_next();
  device::sync_block();
  for (int i = threadIdx.x; i < r.count; i += blockDim.x) device::add(rows + expert_of(i), 1);
  for (int b = threadIdx.x; b < r.block_count; b += blockDim.x) r.blocks[b] = -1;
  device::sync_block();
  int* const blocks = next;  // of each expert, until its place is known
  for (int e = threadIdx.x; e < none; e += blockDim.x) blocks[e] = (rows[e] + r.row_block - 1) / r.row_block;
  device::sync_block();
  for (int e = threadIdx.x; e <= none; e += blockDim.x) {
    int row = 0, block = 0;
    for (int before = 0; before < e; ++before) row += rows[before], block += blocks[before];
    first[e] = row;
    for (int end = row + (e < none ? rows[e] : 0); row < end; row += r.row_block) r.blocks[block++] = row;
  }
  device::sync_block();
  for (int e = threadIdx.x; e <= none; e += blockDim.x) next[e] = first[e];
  device::sync_block();
  for (int i = threadIdx.x; i < r.count; i += blockDim.x) {
    const int e = expert_of(i), row = device::add(next + e, 1), begin = row - (row - first[e]) % r.row_block;
    r.rows[row] = {i, e < r.experts ? e : -1, begin, e < none ? min(r.row_block, first[e] + rows[e] - begin) : 0};
  }
}

}  // namespace

std::string route(const Route& r, device::Stream stream) {
  return LAUNCH(route_kernel, dim3(1), kThreads, 3 * (r.experts + 2) * int(sizeof(int)), stream, r);
}

}  // namespace quip
