// SPDX-License-Identifier: Apache-2.0
// A table in shared memory with copies of each word side by side, so that few lanes, or none, meet in a bank.
#pragma once
#include "device.h"
#include "layout.h"

namespace quip {

// Fills [word][copy] from word(i), which reads memory. All threads of a block call it. A warp loads 32 words at once,
// and the next 32 while it writes these. A lane writes 16 bytes of copies.
template <int kWords, int kCopies, class F>
DEVICE void fill_copies(unsigned char* memory, F word) {
  static_assert(kWords % kLanes == 0 && kCopies % 4 == 0);
  constexpr int kTogether = 4 * kLanes / kCopies;  // words of which a warp writes the copies in one go
  const int lane = device::lane_index();
  int first = device::warp_index() * kLanes;
  uint32_t next = first < kWords ? word(first + lane) : 0;
  for (; first < kWords; first += blockDim.x) {
    const uint32_t own = next;
    if (first + int(blockDim.x) < kWords) next = word(first + int(blockDim.x) + lane);
#pragma unroll
    for (int i = 0; i < kLanes; i += kTogether) {
      const uint32_t w = device::shuffle(own, i + lane / (kCopies / 4));
      device::store16(memory + (first + i) * kCopies * 4 + lane * 16, {w, w, w, w});
    }
  }
}

}  // namespace quip
