// SPDX-License-Identifier: Apache-2.0
// One instruction-set tier. CMakeLists.txt compiles this once per tier, with -DQUIP_TIER=<its name> and its -m flags.
#include "float/decode_row.h"
#include "float/panel.h"
#include "hadamard.h"
#include "int8/panel.h"
#include "int8/quantize.h"
#include "kernels.h"
#include "search/encode_lattice.h"
#include "search/encode_trellis.h"

#define QUIP_JOIN(a, b) a##b
#define QUIP_TABLE(tier) QUIP_JOIN(tier, _kernels)
#define QUIP_NAME(tier) #tier
#define QUIP_STRING(tier) QUIP_NAME(tier)

namespace quip {

const Kernels* QUIP_TABLE(QUIP_TIER)() {
  static const Kernels table{
      .name = QUIP_STRING(QUIP_TIER),
      .rotate_in = rotate_in,
      .rotate_out = rotate_out,
      .panel = panel,
#if defined(QUIP_INT8)
      .int8_takes = int8_takes,
      .int8_bytes = int8_bytes,
      .int8_quantize = int8_quantize,
      .int8_panel = int8_panel,
#endif
      .encode_trellis = encode_trellis,
      .encode_lattice = encode_lattice,
      .decode_row = decode_row,
      .lattice_bytes = lattice_bytes,
      .put_rows = put_rows,
  };
  return &table;
}

}  // namespace quip
