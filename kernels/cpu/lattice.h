// SPDX-License-Identifier: Apache-2.0
// The E8P codebook: codes to floats.
#pragma once
#include "../lattice_tables.h"
#include "kernels.h"
#include "vector.h"

namespace quip {
namespace {

typedef float Octet __attribute__((vector_size(32)));

// The compiler builds them: a tier's code must not run where the CPU lacks it, so it must not run at load either.
constexpr LatticeTables kLattice;

inline Octet decode_e8p(uint8_t row, uint8_t s) {
  typedef uint32_t Masks __attribute__((vector_size(32)));
  Masks bits = load<Masks>(kLattice.rows[row]) ^ load<Masks>(kLattice.signs[s]);
  return (Octet)bits + kLattice.shift[s];
}

}  // namespace
}  // namespace quip
