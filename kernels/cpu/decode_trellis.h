// SPDX-License-Identifier: Apache-2.0
// A packed 16x16 trellis tile to 16 rows of floats (QTIP, arXiv 2406.11235, sections 3.1 and 3.2).
//
// Bit stream of a tile, most significant bit first, in 16-bit words; state s is the 16 bits from bit s*KV, wrapping:
//
//   word   0                1                2
//   bits   [................][................][....     16 states of a run start at word run*KV exactly,
//   state0 ^---------------^                             so lane l always reads word (l*KV)/16 shifted by (l*KV)%16
//   state1   ^KV-------------^
//
// 32 weights in sequence order are row r and row r+8 of the tile; kRowOf/kRowLane below put them in column order.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace quip {
namespace {

// 1MAD: the value is (b0 + b1 + b2 + b3 - mean) * unit of the four bytes of y = factor * x + term.
constexpr uint32_t kOneMadFactor = 34038481, kOneMadTerm = 76625530;
constexpr int kOneMadMean = 510;
constexpr float kOneMadUnit = 1.0f / 147.800537109375f;

inline Floats one_mad(Words x) {
  Words y = x * kOneMadFactor + kOneMadTerm;
  Words pairs = (y & 0x00FF00FFu) + ((y >> 8) & 0x00FF00FFu);
  Ints total = (Ints)((pairs & 0xFFFFu) + (pairs >> 16)) - kOneMadMean;
  return __builtin_convertvector(total, Floats) * kOneMadUnit;
}

// 3INST: the sum of the halves (y & 0x8FFF) ^ 0x3B60 of y = factor * x + term, in half precision.
constexpr uint32_t kThreeInstFactor = 89226354, kThreeInstTerm = 64248484;
// A half is +-2^e (1 + mantissa), e = -3 .. 0. As a float32 times 2^8: y with the half on top, shifted by 3, has its sign, the
// two bits of e and the mantissa in place; these are kept, e flipped as above, and the exponent of 2^(8 - 3) put around it.
constexpr int kThreeInstKept = int(0x80000000u | 0xFFFu << 13);
constexpr int kThreeInstFlipped = (127 + 8 - 3) << 23 ^ (0x3B60 & 0xFFF) << 13;
constexpr float kThreeInstUnit = 1 / 256.0f;

// Every half has one of the exponents 2^-3 .. 2^0, so widening is a shift and a new bias, the float sum is exact, and
// rounding it to half precision is rounding the mantissa to 10 bits.
inline Floats widen_half(Words h) { return to_floats(((h & 0x8000u) << 16) | (((h & 0x7FFFu) << 13) + (112u << 23))); }

inline Floats three_inst(Words x) {
  Words z = ((x * kThreeInstFactor + kThreeInstTerm) & 0x8FFF8FFFu) ^ 0x3B603B60u;
  Words total = (Words)(widen_half(z >> 16) + widen_half(z & 0xFFFFu));
  return to_floats((total + 0xFFFu + ((total >> 13) & 1u)) & ~0x1FFFu);
}

inline Floats look_up(Words x, const float* table) {
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[x[i]];
  return v;
}

// Component 0 carries the sign of hash bit 15.
inline void hyb(Words x, const float* lut, Floats& first, Floats& second) {
  Words h = x * x + x;
  Words index = ((h >> 6) & 511u) * 2u;
  first = to_floats((Words)look_up(index, lut) ^ ((h & 0x8000u) << 16));
  second = look_up(index + 1u, lut);
}

template <Code code>
inline Floats value(Words x, const float* lut) {
  if constexpr (code == Code::kOneMad) return one_mad(x);
  if constexpr (code == Code::kThreeInst) return three_inst(x);
  return look_up(x, lut);
}

// Sequence index (0..31) of column `lane` of row r (second = 0) or r + 8 (second = 1) of a run of 32 weights.
inline int sequence_index(int lane, int second) {
  return ((lane >> 1) & 3) << 3 | (lane >> 3) << 2 | second << 1 | (lane & 1);
}

template <Code code, int bits>
void decode_tile(const int16_t* packed, const float* lut, float* out, int64_t stride) {
  constexpr int kDim = code == Code::kHyb ? 2 : 1;
  constexpr int kStep = bits * kDim;
  constexpr int kWords = 16 * bits;
  uint16_t words[kWords + 2 * kLanes];
  std::memcpy(words, packed, sizeof(uint16_t) * kWords);
  std::memset(words + kWords, 0, sizeof(uint16_t) * 2 * kLanes);
  words[kWords] = words[0];
  const Ints word_of = lanes<Ints>([](int lane) { return lane * kStep >> 4; });
  const Words shift_of = lanes<Words>([](int lane) { return lane * kStep & 15; });
  auto states = [&](int run) {
    Words high = __builtin_convertvector(load<Halves>(words + run * kStep), Words);
    Words low = __builtin_convertvector(load<Halves>(words + run * kStep + 1), Words);
    return __builtin_shuffle(high << 16 | low, word_of) << shift_of >> 16;
  };
  const auto pick = [](int lane, int second) {
    int t = sequence_index(lane, second);
    return kDim == 1 ? t : (t >> 1) + kLanes * (t & 1);
  };
  const Ints upper = lanes<Ints>([&](int lane) { return pick(lane, 0); });
  const Ints lower = lanes<Ints>([&](int lane) { return pick(lane, 1); });
  for (int row = 0; row < 8; ++row) {
    Floats a, b;
    if constexpr (kDim == 2) {
      hyb(states(row), lut, a, b);
    } else {
      a = value<code>(states(2 * row), lut);
      b = value<code>(states(2 * row + 1), lut);
    }
    store(out + row * stride, __builtin_shuffle(a, b, upper));
    store(out + (row + 8) * stride, __builtin_shuffle(a, b, lower));
  }
}

using TileDecoder = void (*)(const int16_t*, const float*, float*, int64_t);

template <Code code>
TileDecoder tile_decoder(int bits) {
  switch (bits) {
    case 1: return decode_tile<code, 1>;
    case 2: return decode_tile<code, 2>;
    case 3: return decode_tile<code, 3>;
    case 4: return decode_tile<code, 4>;
  }
  if constexpr (code != Code::kHyb) {
    switch (bits) {
      case 5: return decode_tile<code, 5>;
      case 6: return decode_tile<code, 6>;
      case 7: return decode_tile<code, 7>;
      case 8: return decode_tile<code, 8>;
    }
  }
  return nullptr;
}

inline TileDecoder tile_decoder(Code code, int bits) {
  switch (code) {
    case Code::kOneMad: return tile_decoder<Code::kOneMad>(bits);
    case Code::kThreeInst: return tile_decoder<Code::kThreeInst>(bits);
    case Code::kHyb: return tile_decoder<Code::kHyb>(bits);
    case Code::kLut: return tile_decoder<Code::kLut>(bits);
  }
  return nullptr;
}

}  // namespace
}  // namespace quip
