# SPDX-License-Identifier: Apache-2.0
r"""The 16x16 tile: in which order its 256 weights form one trellis sequence.

The order is that of QTIP (arXiv 2406.11235), made for the tensor-core instruction mma.m16n8k16: lane t // 8 of a warp
holds positions 8 * (t // 8) .. + 7, and its four pairs are the A-fragment registers a0 (top left), a1 (bottom left),
a2 (top right), a3 (bottom right quarter of the tile). In bits, t = rrrccCRc, most significant first, with

    row = 8 R + rrr        rrr: bits 7..5     R: bit 1
    col = 8 C + 2 cc + c   cc: bits 4..3      C: bit 2     c: bit 0

Position t in the sequence of the weight at (row, col):

    row\col  0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15
     0 |   0   1   8   9  16  17  24  25   4   5  12  13  20  21  28  29
     1 |  32  33  40  41  48  49  56  57  36  37  44  45  52  53  60  61
     2 |  64  65  72  73  80  81  88  89  68  69  76  77  84  85  92  93
     3 |  96  97 104 105 112 113 120 121 100 101 108 109 116 117 124 125
     4 | 128 129 136 137 144 145 152 153 132 133 140 141 148 149 156 157
     5 | 160 161 168 169 176 177 184 185 164 165 172 173 180 181 188 189
     6 | 192 193 200 201 208 209 216 217 196 197 204 205 212 213 220 221
     7 | 224 225 232 233 240 241 248 249 228 229 236 237 244 245 252 253
     8 |   2   3  10  11  18  19  26  27   6   7  14  15  22  23  30  31
     9 |  34  35  42  43  50  51  58  59  38  39  46  47  54  55  62  63
    10 |  66  67  74  75  82  83  90  91  70  71  78  79  86  87  94  95
    11 |  98  99 106 107 114 115 122 123 102 103 110 111 118 119 126 127
    12 | 130 131 138 139 146 147 154 155 134 135 142 143 150 151 158 159
    13 | 162 163 170 171 178 179 186 187 166 167 174 175 182 183 190 191
    14 | 194 195 202 203 210 211 218 219 198 199 206 207 214 215 222 223
    15 | 226 227 234 235 242 243 250 251 230 231 238 239 246 247 254 255
"""

import torch

from quip_vllm.formats.spec import TileOrder

TILE = 16
"""Rows and columns of a tile, in weights."""

_POSITION = torch.arange(TILE * TILE, dtype=torch.int64, device="cpu")

TILE_ROW = 8 * ((_POSITION >> 1) & 1) + (_POSITION >> 5)
"""Row in the tile of each sequence position, int64 [256]."""

TILE_COL = 8 * ((_POSITION >> 2) & 1) + 2 * ((_POSITION >> 3) & 3) + (_POSITION & 1)
"""Column in the tile of each sequence position, int64 [256]."""

_TO_SEQUENCE = {
    TileOrder.MMA: TILE_ROW * TILE + TILE_COL,
    TileOrder.MMA_SWAPPED: (TILE_ROW % 8 + 8 * (TILE_COL // 8)) * TILE + TILE_COL % 8 + 8 * (TILE_ROW // 8),
    TileOrder.ROW_MAJOR: _POSITION,
}
_TO_TILE = {order: torch.argsort(positions) for order, positions in _TO_SEQUENCE.items()}


def weight_to_sequences(w: torch.Tensor, order: TileOrder = TileOrder.MMA) -> torch.Tensor:
    """Cuts a weight in tiles and each tile in sequence order.

    Args:
        w: any dtype [n, k], n and k multiples of 16.
        order: of the sequence; see the module's docstring for MMA. MMA_SWAPPED exchanges C and R in t, ROW_MAJOR has
            t = 16 row + col.

    Returns:
        [n/16, k/16, 256]; with MMA, element [i, j, t] is w[16 i + TILE_ROW[t], 16 j + TILE_COL[t]].

    Raises:
        ValueError: if w is not such a matrix.
    """
    if w.ndim != 2 or w.shape[0] % TILE or w.shape[1] % TILE:
        raise ValueError(
            f"weight {list(w.shape)} cannot be cut in tiles: its two dimensions have to be multiples of {TILE}; "
            "leave such a layer unquantized"
        )
    rows, columns = w.shape[0] // TILE, w.shape[1] // TILE
    tiles = w.reshape(rows, TILE, columns, TILE).permute(0, 2, 1, 3).reshape(rows, columns, TILE * TILE)
    return tiles[..., _TO_SEQUENCE[order].to(w.device)]


def sequences_to_weight(sequences: torch.Tensor, order: TileOrder = TileOrder.MMA) -> torch.Tensor:
    """Inverse of `weight_to_sequences`.

    Args:
        sequences: any dtype [n/16, k/16, 256].
        order: see `weight_to_sequences`.

    Returns:
        [n, k].

    Raises:
        ValueError: if the shape is not [rows of tiles, columns of tiles, 256].
    """
    if sequences.ndim != 3 or sequences.shape[-1] != TILE * TILE:
        raise ValueError(
            f"sequences {list(sequences.shape)} are not [n/16, k/16, {TILE * TILE}]: one sequence is one "
            f"{TILE}x{TILE} tile; reshape to tile rows, tile columns, positions"
        )
    rows, columns, _ = sequences.shape
    tiles = sequences[..., _TO_TILE[order].to(sequences.device)].reshape(rows, columns, TILE, TILE)
    return tiles.permute(0, 2, 1, 3).reshape(rows * TILE, columns * TILE)
