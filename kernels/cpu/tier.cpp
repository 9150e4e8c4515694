// SPDX-License-Identifier: Apache-2.0
// One instruction-set tier: compiled once a tier with -DQUIP_TIER=portable|avx2|avx512 and that tier's -m flags.
#include "embedding.h"
#include "encode_trellis.h"
#include "hadamard.h"
#include "kernels.h"
#include "panel.h"

#define QUIP_JOIN(a, b) a##b
#define QUIP_TABLE(tier) QUIP_JOIN(tier, _kernels)
#define QUIP_NAME(tier) #tier
#define QUIP_STRING(tier) QUIP_NAME(tier)

namespace quip {

const Kernels* QUIP_TABLE(QUIP_TIER)() {
  static const Kernels table{QUIP_STRING(QUIP_TIER), hadamard, panel, viterbi, nearest_e8p, embedding_row};
  return &table;
}

}  // namespace quip
