// SPDX-License-Identifier: Apache-2.0
// Decodes a packed 16x16 trellis tile to 16 rows of floats (QTIP, arXiv 2406.11235, sections 3.1 and 3.2).
//
// The bit stream of a tile has the most significant bit first, in 16-bit words. State s is the 16 bits from bit s*KV
// on, and the stream wraps:
//
//   word   0                1                2
//   bits   [................][................][....     16 states of a run start at a word; of these lane l reads
//   state0 ^---------------^                             word (l*KV)/16, shifted by (l*KV)%16
//   state1   ^KV-------------^
//
// At a half rate every other step is a bit shorter, and so a run of 32 is a word shorter. In the place of that word it has
// the first word of the next run, so that no window ends in another one.
//
// 32 weights in sequence order are row r and row r+8 of the tile, which store_rows puts in column order; in a tile by
// rows they are rows 2r and 2r+1.
#pragma once
#include <algorithm>

#include "../kernels.h"
#include "../vector.h"

namespace quip {
namespace {

// How many states are decoded together: one register of them, or two in the portable tier.
constexpr int kStatesTogether = kRegisterBytes == 64 ? 16 : 8;
typedef uint32_t States __attribute__((vector_size(4 * kStatesTogether)));
typedef int32_t Integers __attribute__((vector_size(4 * kStatesTogether)));
typedef float Values __attribute__((vector_size(4 * kStatesTogether)));
typedef uint16_t ShortStates __attribute__((vector_size(2 * kStatesTogether)));

// 1MAD: the value is (b0 + b1 + b2 + b3 - mean) * unit, where b are the four bytes of y = factor * x + term.
constexpr uint32_t kOneMadFactor = 34038481, kOneMadTerm = 76625530;
constexpr int kOneMadMean = 510;
constexpr float kOneMadUnit = 1.0f / 147.800537109375f;

inline Integers sum_of_bytes(States y) {
  const States pairs = (y & 0x00FF00FFu) + ((y >> 8) & 0x00FF00FFu);
  return (Integers)((pairs & 0xFFFFu) + (pairs >> 16));
}

inline Values one_mad(States x) {
  return __builtin_convertvector(sum_of_bytes(x * kOneMadFactor + kOneMadTerm) - kOneMadMean, Values) * kOneMadUnit;
}

// Rounds floats to half precision. They are normal there, or multiples of its smallest number.
inline Values round_to_half(Values v) {
  const States bits = (States)v;
  return (Values)((bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu);
}

// MUL1: the value is (1024 + b0 + b1 + b2 + b3) * unit - shift in half precision, where b are the bytes of y = factor *
// x. Product and difference are exact in floats. In integers its mean is 510 and a rest.
constexpr uint32_t kMul1Factor = 0x83DCD12D;
constexpr float kMul1Unit = 1774 / 262144.0f, kMul1Shift = 10.3828125f;
constexpr int kMul1Mean = 510;
constexpr float kMul1Rest = float(10.3828125 * 262144 / 1774 - 1024 - kMul1Mean);

inline Values mul1(States x) {
  const Values total = __builtin_convertvector(sum_of_bytes(x * kMul1Factor) + 1024, Values);
  return round_to_half(total * kMul1Unit - kMul1Shift);
}

// 3INST: the value is the sum of both halves of y = factor * x + term, each (half & 0x8FFF) ^ 0x3B60, in half
// precision. MCG: the same of a product.
constexpr uint32_t kThreeInstFactor = 89226354, kThreeInstTerm = 64248484, kMcgFactor = 0xCBAC1FED;
// A half is +-2^e (1 + mantissa) with e = -3 .. 0. To make it a float32 times 2^8, y is shifted by 3 with the half on
// top. That puts its sign, the two bits of e and the mantissa in place. These bits are kept, e is flipped as above, and
// the exponent of 2^(8 - 3) is put around it.
constexpr int kThreeInstKept = int(0x80000000u | 0xFFFu << 13);
constexpr int kThreeInstFlipped = (127 + 8 - 3) << 23 ^ (0x3B60 & 0xFFF) << 13;
constexpr float kThreeInstUnit = 1 / 256.0f;

// Every half has one of the exponents 2^-3 .. 2^0. So widening is a shift and a new bias, the float sum is exact, and
// rounding the sum to half precision is rounding its mantissa to 10 bits.
inline Values widen_half(States h) { return (Values)(((h & 0x8000u) << 16) | (((h & 0x7FFFu) << 13) + (112u << 23))); }

inline Values two_halves(States y) {
  const States z = (y & 0x8FFF8FFFu) ^ 0x3B603B60u;
  return round_to_half(widen_half(z >> 16) + widen_half(z & 0xFFFFu));
}

inline Values look_up(States x, const float* table) {
  Values v;
  for (int i = 0; i < kStatesTogether; ++i) v[i] = table[x[i]];
  return v;
}

// HYB: bit 15 of the hash negates component 0.
inline void hyb(States x, const float* table, Values& first, Values& second) {
  const States h = x * x + x, index = ((h >> 6) & 511u) * 2u;
  first = (Values)((States)look_up(index, table) ^ ((h & 0x8000u) << 16));
  second = look_up(index + 1u, table);
}

// PAIRS: a row of the table for each state.
inline void pair(States x, const float* table, Values& first, Values& second) {
  first = look_up(x * 2u, table);
  second = look_up(x * 2u + 1u, table);
}

// QuIP's grid: the low bits are the number of a level.
template <int bits>
inline Values level(States x) {
  constexpr int kLast = (1 << bits) - 1;
  return __builtin_convertvector((Integers)(x & uint32_t(kLast)) * 2 - kLast, Values);
}

template <Code code, int bits>
inline Values value(States x, const float* table) {
  if constexpr (code == Code::kOneMad) return one_mad(x);
  if constexpr (code == Code::kThreeInst) return two_halves(x * kThreeInstFactor + kThreeInstTerm);
  if constexpr (code == Code::kMcg) return two_halves(x * kMcgFactor);
  if constexpr (code == Code::kMul1 || code == Code::kMul1Half) return mul1(x);
  if constexpr (code == Code::kGrid) return level<bits>(x);
  return look_up(x, table);
}

// Stores a run of 32 weights to rows r (at `out`) and r + 8. The bits of a weight's place in the run are cc C R c. Its
// row is r + 8 R, and its column is C cc c. In a swapped tile C and R change places, so each row has the other's half.
template <int R>
constexpr int place_in_run(int lane) {
  return (lane >> 1 & 3) << 3 | lane >> 3 << 2 | R << 1 | (lane & 1);
}
template <int C>
constexpr int half_of_both(int lane) {
  return lane % 8 + 8 * C + 16 * (lane / 8);
}
template <int R>
constexpr int pair_of_half(int lane) {
  return R + 4 * (lane % 2) + 2 * (lane / 2);
}
template <int C>
constexpr int transposed_pair(int lane) {
  return 2 * C + lane % 2 + 4 * (lane / 2);
}
inline void store_rows(const float* run, float* out, int64_t stride, bool swapped) {
  if constexpr (kStatesTogether == kLanes) {
    const Values a = load<Values>(run), b = load<Values>(run + kLanes);
    const Values above = shuffle<place_in_run<0>>(a, b), below = shuffle<place_in_run<1>>(a, b);
    store(out, swapped ? shuffle<half_of_both<0>>(above, below) : above);
    store(out + 8 * stride, swapped ? shuffle<half_of_both<1>>(above, below) : below);
  } else {
    typedef double Pairs __attribute__((vector_size(32)));  // c = 0, 1
    Pairs cc[4];
    std::memcpy(cc, run, sizeof cc);
    const auto store_half = [&](Pairs first, Pairs second, float* low_half) {
      store(low_half, shuffle<transposed_pair<0>>(first, second));
      store(low_half + (swapped ? 8 * stride : 8), shuffle<transposed_pair<1>>(first, second));
    };  // a transposition: cc[..][C R] to [C R][cc]
    store_half(shuffle<pair_of_half<0>>(cc[0], cc[1]), shuffle<pair_of_half<0>>(cc[2], cc[3]), out);
    store_half(shuffle<pair_of_half<1>>(cc[0], cc[1]), shuffle<pair_of_half<1>>(cc[2], cc[3]),
               swapped ? out + 8 : out + 8 * stride);
  }
}

// Bits from an even state of a run to the one that lies `steps` behind it.
constexpr int bits_of(int steps, int step, bool half_rate) { return steps * step - (half_rate ? steps / 2 : 0); }

// The word that lane i of a vector of states reads, and what two vectors of values become whose lanes alternate.
template <int begin, int step, bool half_rate>
constexpr int word_of(int lane) {
  return (begin + bits_of(lane, step, half_rate)) >> 4;
}
template <int half>
constexpr int alternating(int lane) {
  return (half * kStatesTogether + lane) / 2 + lane % 2 * kStatesTogether;
}

template <Code code, int bits>
void decode_tile(const uint8_t* packed, const float* table, float* out, int64_t stride, TileOrder order) {
  constexpr int kDim = code == Code::kHyb || code == Code::kPairs ? 2 : 1;
  constexpr int kStep = bits * kDim;
  constexpr int kWords = 16 * bits;
  uint16_t words[kWords + 2 * kLanes];
  std::memcpy(words, packed, sizeof(uint16_t) * kWords);
  std::memset(words + kWords, 0, sizeof(uint16_t) * 2 * kLanes);
  words[kWords] = words[0];
  for (int row = 0; row < 8; ++row) {
    alignas(64) float run[2 * kLanes];
    unrolled<2 * kLanes / kDim / kStatesTogether>([&](auto index) __attribute__((always_inline)) {
      constexpr int s = index * kStatesTogether, first = bits_of(s, kStep, is_half(code)), begin = first & 15;
      const uint16_t* at = words + 2 * bits * row + (first >> 4);
      const States high = __builtin_convertvector(load<ShortStates>(at), States);
      const States low = __builtin_convertvector(load<ShortStates>(at + 1), States);
      const States shift_of =
          lanes<States>([&](int lane) { return (begin + bits_of(lane, kStep, is_half(code))) & 15; });
      const States x = shuffle<word_of<begin, kStep, is_half(code)>>(high << 16 | low) << shift_of >> 16;
      if constexpr (kDim == 2) {
        Values first, second;
        (code == Code::kHyb ? hyb : pair)(x, table, first, second);
        store(run + 2 * s, shuffle<alternating<0>>(first, second));
        store(run + 2 * s + kStatesTogether, shuffle<alternating<1>>(first, second));
      } else {
        store(run + s, value<code, bits>(x, table));
      }
    });
    if (order == TileOrder::kByRows) {
      std::copy_n(run, kTile, out + 2 * row * stride);
      std::copy_n(run + kTile, kTile, out + (2 * row + 1) * stride);
    } else {
      store_rows(run, out + row * stride, stride, order == TileOrder::kSwapped);
    }
  }
}

// The tile that holds an element of the weight.
inline const uint8_t* tile_at(const Weight& w, int64_t row, int64_t column) {
  return w.packed + sizeof(int16_t) * w.bits * (row / kTile * w.k + column / kTile * kTile);
}

using TileDecoder = void (*)(const uint8_t*, const float*, float*, int64_t, TileOrder);

template <Code code>
TileDecoder tile_decoder(int bits) {
  TileDecoder found = nullptr;
  with_bits<most_bits(code)>(bits, [&](auto b) { found = decode_tile<code, b>; });
  return found;
}

inline TileDecoder tile_decoder(Code code, int bits) {
  switch (code) {
#define QUIP_CASE(enumerator, name) \
  case Code::enumerator: return tile_decoder<Code::enumerator>(bits);
    QUIP_TRELLIS_CODES(QUIP_CASE)
#undef QUIP_CASE
    case Code::kE8p: break;
  }
  return nullptr;
}

}  // namespace
}  // namespace quip
