// SPDX-License-Identifier: Apache-2.0
// The tail-biting Viterbi search of cpu/search/viterbi.h: the same sums, and of equal ones the same choice, so the same
// walks, bit for bit.
//
// States share 16 - kv bits with the ones before and behind them: one of G = 65536 >> kv overlaps. State g + c G
// (c < 2^kv) leads from overlap (g >> kv) + c (G >> kv) to overlap g. Between two steps a thread block keeps the least
// cost of each overlap, and nothing of the states:
//
//   next[g] = least over c of cost[(g >> kv) + c (G >> kv)] + |x - value of g + c G|^2
//
// A thread makes fours of neighbouring overlaps, which read neighbouring values. It holds the next costs in registers
// until all threads have read the old ones, so one array is enough: 64 KiB at two bits per step, which every GPU lends a
// block. One bit would take twice the registers and the memory: two arrays lie in global memory then, and take turns. The
// thread's choices of a step are one word.
#include <algorithm>

#include "kernels.h"

namespace quip {
namespace {

constexpr int kMostThreads = 1024;
constexpr float kForbidden = INFINITY;

// Fours of overlaps of a thread.
constexpr int fours_of(int kv) { return kv == 1 ? 8 : kv == 2 ? 4 : kv == 3 ? 2 : 1; }
constexpr int threads_of(int kv) { return kStates / 4 / fours_of(kv) >> kv; }

struct Walk {
  const float* values;  // [dim][65536]
  float *cost, *next;   // [G]: the same array, but at one bit per step
  uint32_t* choices;    // [steps][threads]: c of each overlap, kv bits each, the thread's first one lowest
  int kv;
};

DEVICE void store(float* to, const float (&e)[4]) {
  device::store16(to, {device::bits_of(e[0]), device::bits_of(e[1]), device::bits_of(e[2]), device::bits_of(e[3])});
}

// One step, whose targets are x.
template <int kFours, int V>
DEVICE void step(const Walk& w, const float* x, uint32_t* choices) {
  const int kv = kFours == 8 ? 1 : kFours == 4 ? 2 : kFours == 2 ? 3 : w.kv;  // constants, for loops without ends
  const int overlaps = kStates >> kv, before = overlaps >> kv, branches = 1 << kv;
  float held[kFours == 8 ? 1 : kFours][4];
  uint32_t word = 0;
#pragma unroll(kFours == 8 ? 1 : kFours)
  for (int i = 0; i < kFours; ++i) {
    const int first = 4 * (int(threadIdx.x) + i * int(blockDim.x));
    const float* from = w.cost + (first >> kv);
    const float* values = w.values + first;
    float (&best)[4] = held[kFours == 8 ? 0 : i];
    int chosen[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) best[j] = kForbidden;
#pragma unroll(kFours > 2 ? 1 : 4)
    for (int c = 0; c < branches; ++c, from += before, values += overlaps) {
      float branch[4];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const auto four = device::load16(values + v * kStates);
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float d = device::float_of(words[j]) - x[v], square = device::product(d, d);
          branch[j] = v ? branch[j] + square : square;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float cost = from[kFours == 8 ? j / 2 : 0] + branch[j];
        if (cost < best[j]) best[j] = cost, chosen[j] = c;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) word |= uint32_t(chosen[j]) << kv * (4 * i + j);
    if (kFours == 8) store(w.next + first, best);
  }
  choices[threadIdx.x] = word;
  device::sync_block();
  if constexpr (kFours < 8) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) store(w.next + 4 * (threadIdx.x + i * blockDim.x), held[i]);
    device::sync_block();
  }
}

// The state of step s that leads to overlap g.
DEVICE int state_of(const Walk& w, int s, int g) {
  const int four = g / 4, threads = blockDim.x;
  const uint32_t word = w.choices[s * threads + four % threads];
  const uint32_t c = word >> w.kv * (four / threads * 4 + g % 4) & ((1u << w.kv) - 1);
  return g + int(c) * (kStates >> w.kv);
}

// Goes through the sequence rotated by `first` steps, from overlap `only`, or from any if that is -1.
template <int kFours, int V>
DEVICE void forward(Walk& w, const float* target, int first, int only) {
  constexpr int kSteps = kSequence / V;
  for (int g = threadIdx.x; g < kStates >> w.kv; g += blockDim.x) w.cost[g] = only < 0 || g == only ? 0 : kForbidden;
  device::sync_block();
#pragma unroll 1
  for (int s = 0; s < kSteps; ++s) {
    step<kFours, V>(w, target + (s + first) % kSteps * V, w.choices + s * int(blockDim.x));
    if (kFours == 8) {
      float* const costs = w.cost;
      w.cost = w.next, w.next = costs;
    }
  }
}

// Whether a cost and its state come before others.
DEVICE bool before(float cost, int state, float other, int its) {
  return cost < other || (cost == other && state < its);
}

// kFours is fours_of the bits of a step; 1 is that of several.
template <int kFours, int V>
KERNEL(kMostThreads) encode_trellis_kernel(const EncodeTrellis e) {
  SHARED(memory);
  constexpr int kSteps = kSequence / V, kHalf = kSteps / 2;
  const int thread = threadIdx.x, threads = blockDim.x, overlaps = kStates >> e.step_bits;
  float* const target = reinterpret_cast<float*>(memory);
  float* const lowest = target + kSequence;  // [threads]: the least costs, and the last states of their walks
  int* const last = reinterpret_cast<int*>(lowest + threads);
  float* const costs = kFours == 8 ? e.costs + int64_t(blockIdx.x) * kStates : lowest + 2 * threads;
  Walk w{e.values, costs, kFours == 8 ? costs + overlaps : costs, e.choices + int64_t(blockIdx.x) * kSteps * threads,
         e.step_bits};
  device::wait_for_writes();
#pragma unroll 1
  for (int tile = blockIdx.x; tile < e.count; tile += gridDim.x) {
    for (int i = thread; i < kSequence; i += threads) target[i] = e.targets[int64_t(tile) * kSequence + i];
    device::sync_block();
    forward<kFours, V>(w, target, kHalf, -1);
    lowest[thread] = kForbidden, last[thread] = kStates;
    for (int g = thread; g < overlaps; g += threads) {
      const int state = state_of(w, kSteps - 1, g);
      if (before(w.cost[g], state, lowest[thread], last[thread])) lowest[thread] = w.cost[g], last[thread] = state;
    }
#pragma unroll 1
    for (int half = threads / 2; half; half /= 2) {
      device::sync_block();
      const int other = thread + half;
      if (thread < half && before(lowest[other], last[other], lowest[thread], last[thread]))
        lowest[thread] = lowest[other], last[thread] = last[other];
    }
    if (thread == 0) {  // back to the middle, which is the start of the sequence
      int state = last[0] & (kStates - 1);
#pragma unroll 1
      for (int s = kSteps - 2; s >= kHalf; --s) state = state_of(w, s, state >> w.kv);
      last[0] = state;
    }
    device::sync_block();
    const int overlap = last[0] >> w.kv;
    forward<kFours, V>(w, target, 0, overlap);
    if (thread == 0) {
      int32_t* const states = e.states + int64_t(tile) * kSteps;
      int g = overlap;
#pragma unroll 1
      for (int s = kSteps - 1; s >= 0; --s, g >>= w.kv) states[s] = g = state_of(w, s, g);
    }
    device::sync_block();
  }
}

template <int kFours, int V>
std::string run(const EncodeTrellis& e, device::Stream stream) {
  const int threads = threads_of(e.step_bits);
  const int floats = kSequence + 2 * threads + (kFours == 8 ? 0 : kStates >> e.step_bits);
  const auto kernel = encode_trellis_kernel<kFours, V>;
  return LAUNCH(kernel, dim3(e.blocks), threads, floats * int(sizeof(float)), stream, e);
}

}  // namespace

SearchMemory search_memory(int step_bits, int dim, int64_t count) {
  const int threads = threads_of(step_bits);
  const int64_t most = int64_t(device::multiprocessors()) * (kMostThreads / threads);
  const int blocks = int(std::clamp<int64_t>(count, 1, most));
  return {blocks, int64_t(blocks) * (kSequence / dim) * threads, step_bits == 1 ? int64_t(blocks) * kStates : 0};
}

std::string encode_trellis(const EncodeTrellis& e, device::Stream stream) {
  const int fours = fours_of(e.step_bits);
  if (e.dim == 2) return fours == 4 ? run<4, 2>(e, stream) : run<1, 2>(e, stream);
  return fours == 8   ? run<8, 1>(e, stream)
         : fours == 4 ? run<4, 1>(e, stream)
         : fours == 2 ? run<2, 1>(e, stream)
                      : run<1, 1>(e, stream);
}

}  // namespace quip
