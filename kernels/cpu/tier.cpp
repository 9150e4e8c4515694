// SPDX-License-Identifier: Apache-2.0
// One instruction-set tier: compiled once a tier with -DQUIP_TIER=portable|avx2|avx512|avx512_vnni|amx|amx_emulated and that tier's -m flags.
#include "embedding.h"
#include "encode_trellis.h"
#include "hadamard.h"
#include "int8.h"
#include "kernels.h"
#include "panel.h"

#define QUIP_JOIN(a, b) a##b
#define QUIP_TABLE(tier) QUIP_JOIN(tier, _kernels)
#define QUIP_NAME(tier) #tier
#define QUIP_STRING(tier) QUIP_NAME(tier)

namespace quip {

const Kernels* QUIP_TABLE(QUIP_TIER)() {
#if defined(QUIP_INT8)
  static const Kernels table{QUIP_STRING(QUIP_TIER), rotate_in,  rotate_out, panel,       int8_takes, int8_bytes,
                             int8_quantize,          int8_panel, viterbi,    nearest_e8p, decode_row, lattice_bytes, put_rows};
#else
  static const Kernels table{QUIP_STRING(QUIP_TIER), rotate_in, rotate_out, panel,       nullptr, nullptr,
                             nullptr,                nullptr,   viterbi,    nearest_e8p, decode_row, lattice_bytes, put_rows};
#endif
  return &table;
}

}  // namespace quip
