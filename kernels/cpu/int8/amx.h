// SPDX-License-Identifier: Apache-2.0
// Tiles of AMX-INT8, 16 rows x 64 bytes each, and their products. With QUIP_AMX_EMULATED they are plain C++, so that
// any machine can test what is built on them (tier amx_emulated).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quip {
namespace {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

#if defined(QUIP_AMX_EMULATED)

thread_local uint8_t emulated_tiles[kTiles][kTileRows][kTileBytes];

struct [[maybe_unused]] TileUnit {};
inline void finish_stores(const void*) {}

inline void tile_load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r)
    std::memcpy(emulated_tiles[t][r], static_cast<const char*>(from) + r * stride, kTileBytes);
}
inline void tile_store(int t, void* to, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated_tiles[t][r], kTileBytes);
}
// c[m][n] += sum over k, i < 4 of a[m][4 k + i] (signed) * b[k][4 n + i] (unsigned), 32-bit sums.
inline void tile_multiply(int c, int a, int b) {
  for (int m = 0; m < kTileRows; ++m)
    for (int n = 0; n < kTileBytes / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, emulated_tiles[c][m] + 4 * n, 4);
      for (int k = 0; k < kTileRows; ++k)
        for (int i = 0; i < 4; ++i) sum += int8_t(emulated_tiles[a][m][4 * k + i]) * emulated_tiles[b][k][4 * n + i];
      std::memcpy(emulated_tiles[c][m] + 4 * n, &sum, 4);
    }
}
inline void tile_zero(int t) { std::memset(emulated_tiles[t], 0, sizeof emulated_tiles[t]); }
#define QUIP_TILE_ZERO(t) tile_zero(t)
#define QUIP_TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define QUIP_TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define QUIP_TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)

#else

// GCC's tile instructions do not tell the compiler what memory they read, so it must be written before.
inline void finish_stores(const void* of) { asm volatile("" ::"r"(of) : "memory"); }

// Claims the tile registers of this thread for as long as it lives: all eight of full size.
struct TileUnit {
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < kTiles; ++t) config.bytes[t] = kTileBytes, config.rows[t] = kTileRows;
    finish_stores(&config);
    _tile_loadconfig(&config);
  }
  ~TileUnit() { _tile_release(); }
};

#define QUIP_TILE_ZERO(t) _tile_zero(t)
#define QUIP_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define QUIP_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define QUIP_TILE_MULTIPLY(c, a, b) _tile_dpbsud(c, a, b)

#endif

// Tiles 0..3 are the sums of 32 rows of x and two vectors of a panel, 4 and 5 are rows of x, 6 and 7 are the panel.
// Without `two` there are 16 rows of x.
inline void clear_sums(bool two) {
  QUIP_TILE_ZERO(0);
  QUIP_TILE_ZERO(1);
  if (!two) return;
  QUIP_TILE_ZERO(2);
  QUIP_TILE_ZERO(3);
}

inline void load_sums(const __m512i (*sums)[2], bool two) {
  QUIP_TILE_LOAD(0, &sums[0][0], sizeof *sums);
  QUIP_TILE_LOAD(1, &sums[0][1], sizeof *sums);
  if (!two) return;
  QUIP_TILE_LOAD(2, &sums[kTileRows][0], sizeof *sums);
  QUIP_TILE_LOAD(3, &sums[kTileRows][1], sizeof *sums);
}

inline void store_sums(__m512i (*sums)[2], bool two) {
  QUIP_TILE_STORE(0, &sums[0][0], sizeof *sums);
  QUIP_TILE_STORE(1, &sums[0][1], sizeof *sums);
  if (!two) return;
  QUIP_TILE_STORE(2, &sums[kTileRows][0], sizeof *sums);
  QUIP_TILE_STORE(3, &sums[kTileRows][1], sizeof *sums);
}

// Adds 16 quads of the panel, whose vectors are `depth` quads apart, times a tile of x and another.
inline void multiply_tiles(const __m512i* panel, int64_t depth, const int32_t* upper, const int32_t* lower, bool two) {
  QUIP_TILE_LOAD(6, panel, kTileBytes);
  QUIP_TILE_LOAD(7, panel + depth, kTileBytes);
  QUIP_TILE_LOAD(4, upper, kTileBytes);
  QUIP_TILE_MULTIPLY(0, 4, 6);
  QUIP_TILE_MULTIPLY(1, 4, 7);
  if (!two) return;
  QUIP_TILE_LOAD(5, lower, kTileBytes);
  QUIP_TILE_MULTIPLY(2, 5, 6);
  QUIP_TILE_MULTIPLY(3, 5, 7);
}

}  // namespace
}  // namespace quip
