// SPDX-License-Identifier: Apache-2.0
// The search of viterbi.h with 16-bit costs, for AVX-512BW: half the memory traffic, which is what bounds it.
//
// Values and targets are integers of kUnit-th parts of the largest value; d = x - v saturates; a branch costs
// round(d^2 / 2^15), with d doubled first from 3 bits on, where errors are small. Costs saturate at 65535, and the
// smallest cost is taken off at each step, except while states may still be forbidden (65535). A tile whose result does
// not start where it must (a target far outside the code's range) is searched again in floats.
#pragma once
#if defined(__AVX512BW__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "viterbi.h"

namespace quip {
namespace {

constexpr int kWide = 32;
constexpr float kUnit = 26000.0f;  // of 32767: a target may exceed the largest value by a quarter before it is clipped

struct Search16 {
  const int16_t* values;  // [V][65536]
  uint16_t *cost, *next;
  uint8_t* choice;
};

template <int V, bool kDouble>
inline __m512i branch16(const int16_t* values, const __m512i* x, int64_t state) {
  __m512i total = _mm512_setzero_si512();
  for (int v = 0; v < V; ++v) {
    __m512i d = _mm512_subs_epi16(x[v], _mm512_loadu_si512(values + int64_t(v) * kStates + state));
    if constexpr (kDouble) d = _mm512_adds_epi16(d, d);
    total = _mm512_adds_epu16(total, _mm512_mulhrs_epi16(d, d));
  }
  return total;
}

inline uint16_t smallest(__m512i v) {
  alignas(64) uint16_t lane[kWide];
  _mm512_store_si512(lane, v);
  return *std::min_element(lane, lane + kWide);
}

// Returns the smallest new cost. `taken_off` is subtracted from every old one.
template <int KV, int V, bool kDouble>
uint16_t step16(const Search16& s, const __m512i* x, uint16_t taken_off, uint8_t* choice) {
  constexpr int kBranches = 1 << KV;
  constexpr int64_t kGroups = kStates >> KV;
  const __m512i offset = _mm512_set1_epi16(int16_t(taken_off));
  __m512i lane_of[kBranches < kWide ? kBranches : 1];
  for (int i = 0; i < kBranches && kBranches < kWide; ++i) {
    alignas(64) int16_t lane[kWide];
    for (int j = 0; j < kWide; ++j) lane[j] = int16_t((i * kWide + j) >> KV);
    lane_of[i] = _mm512_load_si512(lane);
  }
  __m512i lowest = _mm512_set1_epi16(-1);
  for (int64_t g = 0; g < kGroups; g += kWide) {
    __m512i best = _mm512_loadu_si512(s.cost + search_vectors::place(g));
    __m512i chosen = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int c = 1; c < kBranches; ++c) {
      __m512i cost = _mm512_loadu_si512(s.cost + search_vectors::place(c * kGroups + g));
      chosen = _mm512_mask_mov_epi16(chosen, _mm512_cmplt_epu16_mask(cost, best), _mm512_set1_epi16(int16_t(c)));
      best = _mm512_min_epu16(best, cost);
    }
    best = _mm512_subs_epu16(best, offset);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(choice + g), _mm512_cvtepi16_epi8(chosen));
    alignas(64) int16_t each[kWide];
    if constexpr (kBranches >= kWide) _mm512_store_si512(each, best);
#pragma GCC unroll 16
    for (int i = 0; i < kBranches; ++i) {
      __m512i from;
      if constexpr (kBranches < kWide)
        from = _mm512_permutexvar_epi16(lane_of[i], best);
      else
        from = _mm512_set1_epi16(each[i * kWide >> KV]);
      int64_t state = (g << KV) + i * kWide;
      __m512i cost = _mm512_adds_epu16(from, branch16<V, kDouble>(s.values, x, state));
      lowest = _mm512_min_epu16(lowest, cost);
      _mm512_storeu_si512(s.next + search_vectors::place(state), cost);
    }
  }
  return smallest(lowest);
}

template <int KV, int V, bool kDouble>
void search16(Search16 s, const int16_t* target, int first, int64_t overlap, int32_t* states) {
  constexpr int64_t kGroups = kStates >> KV;
  constexpr int kSteps = kSequence / V;
  constexpr int kMixing = (16 + KV - 1) / KV;  // steps after which every state can come from every other
  __m512i x[V];
  const auto set_target = [&](int i) {
    for (int v = 0; v < V; ++v) x[v] = _mm512_set1_epi16(target[(i + first) % kSteps * V + v]);
  };
  set_target(0);
  for (int64_t t = 0; t < kStates; t += kWide) _mm512_storeu_si512(s.cost + search_vectors::place(t), branch16<V, kDouble>(s.values, x, t));
  if (overlap >= 0)
    for (int64_t t = 0; t < kStates; ++t)
      if (t >> KV != overlap) s.cost[search_vectors::place(t)] = 65535;
  uint16_t lowest = 0;
  for (int i = 1; i < kSteps; ++i) {
    set_target(i);
    lowest = step16<KV, V, kDouble>(s, x, overlap >= 0 && i <= kMixing + 1 ? 0 : lowest, s.choice + i * kGroups);
    std::swap(s.cost, s.next);
  }
  search_vectors::trace_back<KV, kSteps>(s.cost, s.choice, overlap, states);
}

template <int KV, int V, bool kDouble>
bool tail_biting16(const float* target, const float* values, int32_t* states, void* work) {
  uint16_t* cost = static_cast<uint16_t*>(work);
  int16_t* table = reinterpret_cast<int16_t*>(cost + 2 * kCosts);
  Search16 s{table, cost, cost + kCosts, reinterpret_cast<uint8_t*>(table + int64_t(V) * kStates)};
  float largest = 0;
  for (int64_t i = 0; i < int64_t(V) * kStates; ++i) largest = std::max(largest, std::fabs(values[i]));
  const float unit = kUnit / largest;
  for (int64_t i = 0; i < int64_t(V) * kStates; ++i) table[i] = int16_t(std::lrintf(values[i] * unit));
  int16_t x[kSequence];
  for (int i = 0; i < kSequence; ++i) x[i] = int16_t(std::lrintf(std::clamp(target[i] * unit, -32767.0f, 32767.0f)));
  constexpr int kHalf = kSequence / V / 2;
  search16<KV, V, kDouble>(s, x, kHalf, -1, states);
  const int64_t overlap = states[kHalf] >> KV;
  search16<KV, V, kDouble>(s, x, 0, overlap, states);
  return states[0] >> KV == overlap;
}

}  // namespace
}  // namespace quip
#endif
