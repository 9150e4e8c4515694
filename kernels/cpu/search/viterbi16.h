// SPDX-License-Identifier: Apache-2.0
// The search of viterbi.h with 16-bit costs, for AVX2 and AVX-512BW: twice the states in a register, and half the
// memory traffic.
//
// Values and targets are integers, in units of the largest value / kUnit. d = x - v saturates. A branch costs round(d^2
// / 2^15), where d is doubled first from 3 bits on, because errors are small there. Costs saturate at 65535. The
// smallest cost is taken off at each step, except while states may still be forbidden (65535). A tile whose walk does
// not close, since a target is far outside the code's range, is searched again in floats. All tiers compute the same
// integers.
#pragma once
#if defined(__AVX2__)
#define QUIP_COSTS16
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "viterbi.h"

namespace quip {
namespace {

constexpr int kWide = kRegisterBytes / 2;
constexpr float kUnit = 26000.0f;  // of 32767: a target may exceed the largest value by a quarter before it is clipped

#if defined(__AVX512BW__)
using Wide16 = __m512i;
inline Wide16 splat16(int v) { return _mm512_set1_epi16(short(v)); }
inline Wide16 less_saturated(Wide16 a, Wide16 b) { return _mm512_subs_epi16(a, b); }
inline Wide16 twice_saturated(Wide16 a) { return _mm512_adds_epi16(a, a); }
inline Wide16 square(Wide16 a) { return _mm512_mulhrs_epi16(a, a); }
inline Wide16 plus_cost(Wide16 a, Wide16 b) { return _mm512_adds_epu16(a, b); }
inline Wide16 minus_cost(Wide16 a, Wide16 b) { return _mm512_subs_epu16(a, b); }
inline Wide16 least(Wide16 a, Wide16 b) { return _mm512_min_epu16(a, b); }
// Where `cost` is less than `best`: best = cost, chosen = c.
inline void choose(Wide16 cost, int c, Wide16& best, Wide16& chosen) {
  chosen = _mm512_mask_mov_epi16(chosen, _mm512_cmplt_epu16_mask(cost, best), splat16(c));
  best = least(cost, best);
}
inline void store_bytes(uint8_t* out, Wide16 v) { store(out, _mm512_cvtepi16_epi8(v)); }
#else
using Wide16 = __m256i;
inline Wide16 splat16(int v) { return _mm256_set1_epi16(short(v)); }
inline Wide16 less_saturated(Wide16 a, Wide16 b) { return _mm256_subs_epi16(a, b); }
inline Wide16 twice_saturated(Wide16 a) { return _mm256_adds_epi16(a, a); }
inline Wide16 square(Wide16 a) { return _mm256_mulhrs_epi16(a, a); }
inline Wide16 plus_cost(Wide16 a, Wide16 b) { return _mm256_adds_epu16(a, b); }
inline Wide16 minus_cost(Wide16 a, Wide16 b) { return _mm256_subs_epu16(a, b); }
inline Wide16 least(Wide16 a, Wide16 b) { return _mm256_min_epu16(a, b); }
inline void choose(Wide16 cost, int c, Wide16& best, Wide16& chosen) {
  const Wide16 lower = least(cost, best);
  chosen = _mm256_blendv_epi8(splat16(c), chosen, _mm256_cmpeq_epi16(lower, best));
  best = lower;
}
inline void store_bytes(uint8_t* out, Wide16 v) {
  store(out, _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#endif

// Lane j is best[(i * kWide + j) >> KV], the cost that the successors of a group start from.
template <int KV>
struct Spread16 {
  static constexpr int kVectors = 1 << KV < kWide ? 1 << KV : 1;
  Wide16 index[kVectors];
  Spread16() {
    for (int i = 0; i < kVectors; ++i) {
      alignas(64) int16_t lane[kWide];
      for (int j = 0; j < kWide; ++j) {
        const int from = (i * kWide + j) >> KV;
        lane[j] = int16_t(kWide == 32 ? from : from % 8 * 0x0202 + 0x0100);  // of a word, or two bytes of a half
      }
      index[i] = load<Wide16>(lane);
    }
  }
  [[gnu::always_inline]] Wide16 operator()(Wide16 best, int i) const {
#if defined(__AVX512BW__)
    return _mm512_permutexvar_epi16(index[i], best);
#else
    const Wide16 half = (i * kWide >> KV) < 8 ? _mm256_permute2x128_si256(best, best, 0x00)
                                              : _mm256_permute2x128_si256(best, best, 0x11);
    return _mm256_shuffle_epi8(half, index[i]);
#endif
  }
};

struct Search16 {
  const int16_t* values;  // [V][65536]
  uint16_t *cost, *next;
  uint8_t* choice;
};

template <int V, bool kDouble>
[[gnu::always_inline]] inline Wide16 branch16(const int16_t* values, const Wide16* x, int64_t state) {
  Wide16 total;
  for (int v = 0; v < V; ++v) {
    Wide16 d = less_saturated(x[v], load<Wide16>(values + int64_t(v) * kStates + state));
    if constexpr (kDouble) d = twice_saturated(d);
    total = v ? plus_cost(total, square(d)) : square(d);
  }
  return total;
}

inline uint16_t smallest(Wide16 v) {
  uint16_t lane[kWide];
  store(lane, v);
  return *std::min_element(lane, lane + kWide);
}

// A step of kWide groups from g on. cost(c) gives the costs of their predecessors. The best predecessor goes to
// `choice`, its cost loses `taken_off`, and the costs of the successors go to out(state). `lowest` gets their least,
// lane by lane.
template <int KV, int V, bool kDouble, class Cost, class Out>
[[gnu::always_inline]] inline void groups16(const int16_t* values, const Wide16* x, const Spread16<KV>& spread,
                                            int64_t g, Cost cost, Wide16 taken_off, uint8_t* choice, Out out,
                                            Wide16& lowest) {
  constexpr int kBranches = 1 << KV;
  Wide16 best = cost(0), chosen = {};
#pragma GCC unroll 16
  for (int c = 1; c < kBranches; ++c) choose(cost(c), c, best, chosen);
  best = minus_cost(best, taken_off);
  store_bytes(choice + g, chosen);
  int16_t each[kWide];
  if constexpr (kBranches >= kWide) store(each, best);
#pragma GCC unroll 16
  for (int i = 0; i < kBranches; ++i) {
    Wide16 from;
    if constexpr (kBranches < kWide)
      from = spread(best, i);
    else
      from = splat16(each[i * kWide >> KV]);
    const int64_t state = (g << KV) + i * kWide;
    const Wide16 to = plus_cost(from, branch16<V, kDouble>(values, x, state));
    lowest = least(lowest, to);
    store(out(state), to);
  }
}

// Returns the smallest new cost. `taken_off` comes off every old one.
template <int KV, int V, bool kDouble>
uint16_t step16(const Search16& s, const Wide16* x, uint16_t taken_off, uint8_t* choice) {
  constexpr int64_t kGroups = kStates >> KV;
  const Spread16<KV> spread;
  Wide16 lowest = splat16(-1);
  for (int64_t g = 0; g < kGroups; g += kWide)
    groups16<KV, V, kDouble>(
        s.values, x, spread, g, [&](int c) { return load<Wide16>(s.cost + place(c * kGroups + g)); },
        splat16(taken_off), choice, [&](int64_t state) { return s.next + place(state); }, lowest);
  return smallest(lowest);
}

// Two steps, with targets x[0..V) and x[V..2V). The predecessors of a run of groups in the second step are the
// successors of one run for each c in the first, so the costs between the steps stay in the first-level cache.
template <int KV, int V, bool kDouble>
uint16_t two_steps16(const Search16& s, const Wide16* x, uint16_t taken_off, uint8_t* choice) {
  constexpr int kBranches = 1 << KV;
  constexpr int64_t kGroups = kStates >> KV, kRuns = kGroups >> KV;
  const Spread16<KV> spread;
  alignas(64) uint16_t between[kBranches][kBranches * kWide];
  Wide16 lowest = splat16(-1), unused = lowest;
  for (int64_t run = 0; run < kRuns; run += kWide) {
    for (int before = 0; before < kBranches; ++before) {
      const int64_t g = before * kRuns + run;
      groups16<KV, V, kDouble>(
          s.values, x, spread, g, [&](int c) { return load<Wide16>(s.cost + place(c * kGroups + g)); },
          splat16(taken_off), choice, [&](int64_t state) { return between[before] + (state - (g << KV)); }, unused);
    }
    for (int i = 0; i < kBranches; ++i)
      groups16<KV, V, kDouble>(
          s.values, x + V, spread, (run << KV) + i * kWide, [&](int c) { return load<Wide16>(between[c] + i * kWide); },
          splat16(0), choice + kGroups, [&](int64_t state) { return s.next + place(state); }, lowest);
  }
  return smallest(lowest);
}

template <int KV, int V, bool kDouble>
void search16(Search16 s, const int16_t* target, int first, int64_t overlap, int32_t* states) {
  constexpr int64_t kGroups = kStates >> KV;
  constexpr int kSteps = kSequence / V;
  constexpr int kMixing = (16 + KV - 1) / KV;  // steps after which every state can come from every other
  Wide16 x[2 * V];
  const auto set_targets = [&](int i) {  // of steps i and i + 1
    for (int v = 0; v < 2 * V; ++v) x[v] = splat16(target[((i + first) * V + v) % kSequence]);
  };
  set_targets(0);
  for (int64_t t = 0; t < kStates; t += kWide) store(s.cost + place(t), branch16<V, kDouble>(s.values, x, t));
  if (overlap >= 0)
    for (int64_t t = 0; t < kStates; ++t)
      if (t >> KV != overlap) s.cost[place(t)] = 65535;
  uint16_t lowest = 0;
  for (int i = 1, steps; i < kSteps; i += steps) {
    constexpr bool kPairs = KV <= 4;  // beyond, what lies between does not fit that cache
    const bool forbidden = overlap >= 0 && i <= kMixing + 1;
    steps = kPairs && !forbidden && i + 1 < kSteps ? 2 : 1;
    set_targets(i);
    if constexpr (kPairs)
      if (steps == 2) lowest = two_steps16<KV, V, kDouble>(s, x, lowest, s.choice + i * kGroups);
    if (steps == 1) lowest = step16<KV, V, kDouble>(s, x, forbidden ? 0 : lowest, s.choice + i * kGroups);
    std::swap(s.cost, s.next);
  }
  trace_back<KV, kSteps>(s.cost, s.choice, overlap, states);
}

// Rounds values, a multiple of 16, to integers, and returns which integer 1 would be.
inline float to_integers(const float* values, int64_t count, int16_t* out) {
  RegisterFloats most = {};
  for (int64_t i = 0; i < count; i += kRegisterLanes) {
    const RegisterFloats v = load<RegisterFloats>(values + i), size = v < 0 ? -v : v;
    most = size > most ? size : most;
  }
  float largest = 0;
  for (int i = 0; i < kRegisterLanes; ++i) largest = std::max(largest, most[i]);
  const float unit = kUnit / largest;
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i eight = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(unit)));
    store(out + i, _mm_packs_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1)));
  }
  return unit;
}

// Returns whether the walk closes.
template <int KV, int V, bool kDouble>
bool tail_biting16(const Search16& s, const float* target, float unit, int32_t* states) {
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
