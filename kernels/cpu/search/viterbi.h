// SPDX-License-Identifier: Apache-2.0
// Tail-biting Viterbi search over the bitshift trellis (QTIP, arXiv 2406.11235, section 3.1 and algorithm 4).
//
// With KV bits per step, the 2^KV predecessors of state t are (t >> KV) + c * G, where G = 65536 >> KV and c < 2^KV.
// The 2^KV states t of a group, which share t >> KV = g, share the best predecessor. So a step takes one minimum per
// group, and then 2^KV new costs. Of equal ones the lowest state is taken: a GPU finds the same walks
// (cuda/encode_trellis.cu).
#pragma once
#include <cmath>
#include <utility>

#include "../kernels.h"
#include "../vector.h"

namespace quip {
namespace {

typedef uint8_t LaneBytes __attribute__((vector_size(kRegisterLanes)));  // one byte per lane

constexpr float kForbidden = INFINITY;

// Where the cost of a state lies. The predecessors of a group lie G apart. With 16 of them that is a multiple of 4 KiB,
// which would put them all in one set of the first-level cache, so a gap after each 4096 states spreads them.
inline int64_t place(int64_t state) { return state + (state >> 12) * 32; }

struct Search {
  const float* values;  // [V][65536]
  float *cost, *next;   // [kCosts] each, see place()
  uint8_t* choice;      // [steps][G]: the c of the best predecessor
};

template <int V>
inline RegisterFloats branch(const float* values, const float* x, int64_t state) {
  RegisterFloats total;
  for (int v = 0; v < V; ++v) {
    const RegisterFloats d = load<RegisterFloats>(values + int64_t(v) * kStates + state) - x[v];
    total = v ? total + rounded(d * d) : rounded(d * d);
  }
  return total;
}

// Lane i of vector `part` of a group's new costs starts from this lane of the group's best ones.
template <int KV, int part>
constexpr int group_of(int lane) {
  return (part * kRegisterLanes + lane) >> KV;
}

template <int KV, int V>
void step(const Search& s, const float* x, uint8_t* choice) {
  constexpr int kBranches = 1 << KV;
  constexpr int64_t kGroups = kStates >> KV;
  for (int64_t g = 0; g < kGroups; g += kRegisterLanes) {
    RegisterFloats best = load<RegisterFloats>(s.cost + place(g));
    RegisterInts chosen = {};
#pragma GCC unroll 16
    for (int c = 1; c < kBranches; ++c) {
      RegisterFloats cost = load<RegisterFloats>(s.cost + place(c * kGroups + g));
      RegisterInts less = cost < best;
      best = less ? cost : best;
      chosen = less ? c - RegisterInts{} : chosen;
    }
    store(choice + g, __builtin_convertvector(chosen, LaneBytes));
    const auto store_next = [&](int i, RegisterFloats from) {
      const int64_t state = (g << KV) + i * kRegisterLanes;
      store(s.next + place(state), from + branch<V>(s.values, x, state));
    };
    if constexpr (kBranches < kRegisterLanes) {
      unrolled<kBranches>([&](auto part) { store_next(part, shuffle<group_of<KV, part>>(best)); });
    } else {
      alignas(64) float each[kRegisterLanes];
      store(each, best);
#pragma GCC unroll 16
      for (int i = 0; i < kBranches; ++i) store_next(i, each[i * kRegisterLanes >> KV] - RegisterFloats{});
    }
  }
}

// Finds the best last state, of those that agree with the overlap if there is one, and the way back from it.
template <int KV, int kSteps, class Cost>
void trace_back(const Cost* cost, const uint8_t* choice, int64_t overlap, int32_t* states) {
  constexpr int64_t kGroups = kStates >> KV;
  int64_t last = overlap >= 0 ? overlap : 0;
  for (int64_t t = last; t < kStates; t += overlap >= 0 ? kGroups : 1)
    if (cost[place(t)] < cost[place(last)]) last = t;
  for (int i = kSteps - 1; i >= 0; --i) {
    states[i] = int32_t(last);
    int64_t group = last >> KV;
    if (i > 0) last = group + choice[i * kGroups + group] * kGroups;
  }
}

// Searches `target`, rotated by `first` steps, and writes the states in that order. overlap >= 0 forces the state
// before the first step and the last state to agree in the 16 - KV bits that they share.
template <int KV, int V>
void search(Search s, const float* target, int first, int64_t overlap, int32_t* states) {
  constexpr int64_t kGroups = kStates >> KV;
  constexpr int kSteps = kSequence / V;
  const auto at = [&](int i) { return target + (i + first) % kSteps * V; };
  for (int64_t t = 0; t < kStates; t += kRegisterLanes) store(s.cost + place(t), branch<V>(s.values, at(0), t));
  if (overlap >= 0)
    for (int64_t t = 0; t < kStates; ++t)
      if (t >> KV != overlap) s.cost[place(t)] = kForbidden;
  for (int i = 1; i < kSteps; ++i) {
    step<KV, V>(s, at(i), s.choice + i * kGroups);
    std::swap(s.cost, s.next);
  }
  trace_back<KV, kSteps>(s.cost, s.choice, overlap, states);
}

template <int KV, int V>
void tail_biting(const Search& s, const float* target, int32_t* states) {
  constexpr int kHalf = kSequence / V / 2;
  search<KV, V>(s, target, kHalf, -1, states);
  search<KV, V>(s, target, 0, states[kHalf] >> KV, states);
}

}  // namespace
}  // namespace quip
