# SPDX-License-Identifier: Apache-2.0
"""Trellis codes: how a 16-bit state becomes one or two weights (QTIP, arXiv 2406.11235; MCG and MUL1 are EXL3's).

A code is one function of an int64 tensor of states [S] that returns float32 values [S, vector_dim], and one `register`
at the end of this file. It is told the code's table and the bits per weight, too, which most codes have no use for.
"mod 2^32" is what 32-bit registers do; kernels compute the same in fewer instructions.
"""

import functools
from collections.abc import Callable
from fractions import Fraction

import torch

from quip_vllm.formats import tile, trellis
from quip_vllm.formats.spec import Format, TileOrder, register
from quip_vllm.formats.tensors import FLOATS, Follows, TensorSpec
from quip_vllm.formats.trellis import STATE_BITS

PACKED, TABLE = "packed", "table"
"""Names of the tensors: the words of all tiles, and a stored table of the code."""

HYB_TABLE_BITS = 9
"""log2 of the rows of HYB's stored table."""

# Of each bit width: a unit, and the points and lines of the grid (hyb_table) in that unit, for weights of N(0, 1).
# scripts/research/train_hyb_table.py found them. They are at most 63: exact in integer kernels, and four products with
# int8 fit 16 bits.
_HYB_GRIDS = {
    1: (
        0.034778,
        [1, 0, 0, 16, 6, 0, 16, 10, 15, 22, 27, 20, 28, 32, 35, 54],
        [11, 2, 13, 13, 21, 22, 13, 22, 18, 14, 13, 31, 35, 34, 44, 63],
        [4, 11, 6, 11, 20, 25, 27, 38, 1, 5, 8, 20, 21, 30, 38, 57],
    ),
    2: (
        0.041255,
        [3, 5, 6, 7, 7, 8, 16, 12, 20, 25, 25, 23, 35, 30, 36, 47],
        [1, 2, 6, 9, 12, 10, 9, 14, 17, 20, 20, 28, 29, 39, 46, 63],
        [2, 4, 9, 14, 18, 24, 30, 41, 4, 7, 10, 14, 22, 25, 38, 57],
    ),
    3: (
        0.046676,
        [2, 3, 2, 3, 6, 8, 11, 15, 15, 18, 19, 22, 27, 30, 36, 50],
        [3, 3, 9, 8, 11, 10, 16, 13, 21, 22, 25, 27, 33, 39, 44, 63],
        [0, 5, 8, 13, 18, 24, 31, 45, 3, 6, 11, 15, 20, 26, 36, 59],
    ),
    4: (
        0.060849,
        [0, 2, 2, 4, 6, 8, 10, 12, 14, 17, 19, 22, 26, 32, 39, 50],
        [1, 3, 6, 8, 9, 12, 14, 16, 18, 21, 24, 27, 30, 35, 44, 63],
        [1, 4, 8, 12, 17, 22, 30, 41, 2, 6, 10, 14, 19, 25, 34, 51],
    ),
}

MCG_MULTIPLIER, MUL1_MULTIPLIER = 0xCBAC1FED, 0x83DCD12D
"""EXL3's, which its files hold as well."""

_STATES = 1 << STATE_BITS
_WORD = 0xFFFFFFFF


def _one_mad(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """1MAD: the sum of the four bytes of one multiply-add, centred and scaled to about N(0, 1)."""
    y = state * 34038481 + 76625530 & _WORD
    total = (y & 0xFF) + (y >> 8 & 0xFF) + (y >> 16 & 0xFF) + (y >> 24)
    return ((total - 510).to(torch.float32) / 147.800537109375)[:, None]


def _three_inst(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """3INST: a multiply-add, a masked XOR, and the sum of the two fp16 numbers in the halves of the result.

    The sum is rounded to fp16, as a half-precision adder does. Its standard deviation is 1.2437, not 1.
    """
    return _two_halves(state * 89226354 + 64248484 & _WORD)


def _mcg(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """MCG (EXL3): 3INST with a product in place of the multiply-add. Its standard deviation is 1.2441."""
    return _two_halves(state * MCG_MULTIPLIER & _WORD)


def _mul1(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """MUL1 (EXL3): the sum s of the four bytes of a product, scaled and centred to about N(0, 1) in half precision.

    The value is fp16(a (1024 + s) - b) with a = 1774 * 2^-18 and b = 10.3828125: a fused multiply-add, rounded once. In
    float32 the product and the difference are exact.
    """
    y = state * MUL1_MULTIPLIER & _WORD
    total = (y & 0xFF) + (y >> 8 & 0xFF) + (y >> 16 & 0xFF) + (y >> 24)
    exact = (1024 + total).to(torch.float32) * (1774 * 2.0**-18) - 10.3828125
    return exact.to(torch.float16).to(torch.float32)[:, None]


def _hyb(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """HYB: bits 14.. of x^2 + x choose a row of the table (9 bits: 14..6), bit 15 negates its component 0."""
    if table is None:
        raise ValueError("code hyb without a table: it needs [2^b, 2]; pass the stored table, or HYB.table(bits)")
    table_bits = table.shape[0].bit_length() - 1
    if table.ndim != 2 or table.shape[1] != 2 or table.shape[0] != 1 << table_bits or not 1 <= table_bits <= 15:
        raise ValueError(
            f"table {list(table.shape)}: code hyb needs [2^b, 2] with b in 1..15; pass the table stored with the weight"
        )
    h = state * state + state
    vector = table.to(torch.float32)[h >> (15 - table_bits) & ((1 << table_bits) - 1)]
    sign = 1 - 2 * (h >> 15 & 1)
    return torch.stack([vector[:, 0] * sign, vector[:, 1]], dim=1)


def _lut(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """LUT: a Gaussian quantile for every state, fp16(ndtri((mix(x) + 1/2) / 65536)), in shuffled order.

    mix is a fixed bijection of 16 bits (xor-shifts and odd multipliers) in place of the paper's random table, so that
    nothing has to be stored. The quantile is rounded to fp32, then to fp16.
    """
    x = state
    x = x ^ x >> 8
    x = x * 42969 & 0xFFFF
    x = x ^ x >> 8
    x = x * 22117 & 0xFFFF
    x = x ^ x >> 8
    quantile = torch.special.ndtri((x.to(torch.float64) + 0.5) / _STATES)
    return quantile.to(torch.float32).to(torch.float16).to(torch.float32)[:, None]


def _stored(state: torch.Tensor, table: torch.Tensor | None, bits: int) -> torch.Tensor:
    """TABLE and PAIRS: the state is the row of the table."""
    if table is None:
        raise ValueError("a code whose values are stored, without its table: pass the one stored with the weight")
    if table.ndim != 2 or table.shape[0] != _STATES:
        raise ValueError(
            f"table {list(table.shape)}: it needs a row for each of {_STATES} states; pass that stored with the weight"
        )
    return table.to(torch.float32)[state]


def hyb_table(points: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """A table of HYB that is a grid, which kernels look up in 16 entries at a time.

    Row 16 j + i (j, i in 0..15) is (points[j // 8, i], lines[j]), and row 256 + r is row r with component 1 negated.
    With the code's own negation of component 0 these are 1024 points on 32 lines; those of half the lines may be
    staggered.

    Args:
        points: component 0, [2, 16], of lines 0..7 and 8..15.
        lines: component 1, [16].

    Returns:
        fp16 [512, 2].
    """
    half = torch.stack([points.repeat_interleave(8, 0).flatten(), lines.repeat_interleave(16)], 1)
    return torch.cat([half, half * torch.tensor([1.0, -1.0], device=half.device)]).to(torch.float16)


def _two_halves(y: torch.Tensor) -> torch.Tensor:
    """The sum of the two fp16 numbers in the halves of a masked word: int64 [S] to float32 [S, 1]."""
    z = y & 0x8FFF8FFF ^ 0x3B603B60
    return (_as_half(z >> 16) + _as_half(z & 0xFFFF)).to(torch.float32)[:, None]


def _as_half(bits: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers with these bit patterns 0..65535."""
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(torch.float16)


def _hyb_default_table(bits: int) -> torch.Tensor:
    """The grid trained for Gaussian weights at this bit width.

    At 2 bits it loses no more than K-means centroids do (the paper's choice); at each width it is decoded by look-ups
    of 16 entries.
    """
    unit, *numbers = _HYB_GRIDS[bits]
    first, second, lines = (torch.tensor(row, dtype=torch.float32, device="cpu") * unit for row in numbers)
    return hyb_table(torch.stack([first, second]), lines)


class TrellisCode(Format):
    """QTIP with one code.

    Args:
        name: of the code.
        function: int64 states [S], the table of a code that stores one, bits per weight -> float32 values [S,
            vector_dim].
        vector_dim: weights per trellis step.
        bits: allowed code bits per weight.
        table_rows: of the table that is stored with a weight; 0 for a code without.
        default_table: bits -> the table that the quantizer stores, float16 [table_rows, vector_dim]; None for a code
            that has no table, or whose tables other programs make.
        kernel_orders: see Format.
        half: whether half a bit less per weight is stored (formats/trellis.py). The quantizer does not write that.
    """

    method = "qtip"
    multiple_in = multiple_out = tile.TILE

    def __init__(
        self,
        name: str,
        function: Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor],
        vector_dim: int = 1,
        bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
        table_rows: int = 0,
        default_table: Callable[[int], torch.Tensor] | None = None,
        kernel_orders: tuple[TileOrder, ...] = (TileOrder.MMA,),
        half: bool = False,
    ) -> None:
        self.name, self.vector_dim, self.bits, self.half = name, vector_dim, bits, half
        self.kernel_orders = kernel_orders
        self._function, self._table_rows, self._default_table = function, table_rows, default_table
        self.quantized = not half and (not table_rows or default_table is not None)

    def tensors(self, bits: int) -> tuple[TensorSpec, ...]:
        """See Format."""
        words = Fraction(trellis.words_per_tile(bits, self.half), tile.TILE)
        packed = TensorSpec(PACKED, Follows.BOTH, (torch.int16,), outputs_per_row=tile.TILE, columns_per_input=words)
        if not self._table_rows:
            return (packed,)
        shape = (self._table_rows, self.vector_dim)
        return (packed, TensorSpec(TABLE, Follows.PART, FLOATS, part_shape=shape))

    def decode(self, tensors: dict[str, torch.Tensor], bits: int, tile_order: TileOrder) -> torch.Tensor:
        """See Format."""
        return self.decode_weight(tensors[PACKED], bits, tensors.get(TABLE), tile_order)

    @functools.cache  # noqa: B019  # formats live as long as the process
    def table(self, bits: int) -> torch.Tensor | None:
        """Returns the table that the quantizer stores, on the CPU, or None. Cached and shared: do not write to it."""
        return None if self._default_table is None else self._default_table(bits)

    def values(self, table: torch.Tensor | None = None, bits: int = 2) -> torch.Tensor:
        """Returns what every state decodes to.

        Args:
            table: floating [rows, vector_dim] for a code that stores a table, or None for that of `bits`; None for
                other codes.
            bits: per weight; the values of most codes do not depend on them.

        Returns:
            float32 [65536, vector_dim], on the table's device, or the CPU. Without a table it is cached and shared: do
            not write to it.

        Raises:
            ValueError: if the code stores no table, it is missing, or it has the wrong shape.
        """
        if table is None:
            return self._default_values(bits)
        if not self._table_rows:
            raise ValueError(f"code {self.name} with a table: it stores none; leave the table out")
        return self._function(torch.arange(_STATES, dtype=torch.int64, device=table.device), table, bits)

    @functools.cache  # noqa: B019
    def _default_values(self, bits: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return self._function(torch.arange(_STATES, dtype=torch.int64, device="cpu"), self.table(bits), bits)

    def decode_sequences(self, packed: torch.Tensor, bits: int, table: torch.Tensor | None = None) -> torch.Tensor:
        """Decodes packed sequences to values in sequence order.

        Args:
            packed: int16 [..., words_per_tile].
            bits: stored bits per weight.
            table: see `values`.

        Returns:
            float32 [..., 256] on packed's device.

        Raises:
            ValueError: as `trellis.unpack` and `values`.
        """
        states = trellis.unpack(packed, bits, self.vector_dim, self.half)
        return self.values(table, bits).to(packed.device)[states].reshape(*packed.shape[:-1], trellis.SEQUENCE)

    def decode_weight(
        self,
        packed: torch.Tensor,
        bits: int,
        table: torch.Tensor | None = None,
        tile_order: TileOrder = TileOrder.MMA,
    ) -> torch.Tensor:
        """Decodes a stored weight.

        Args:
            packed: int16 [n/16, k/16 * words_per_tile]; tile (i, j) is words words_per_tile * j .. of row i.
            bits: stored bits per weight.
            table: see `values`.
            tile_order: of the sequences.

        Returns:
            float32 [n, k] on packed's device.

        Raises:
            ValueError: if packed is not a matrix of whole tiles, or as `decode_sequences`.
        """
        words = trellis.words_per_tile(bits, self.half)
        if packed.ndim != 2 or bits < 1 or packed.shape[1] % words:
            raise ValueError(
                f"packed {list(packed.shape)} with bits={bits}: need [n/16, tiles * {words}], 16 * bits"
                f"{' - 8' if self.half else ''} words per tile; check bits against the checkpoint's config"
            )
        tiles = packed.reshape(packed.shape[0], packed.shape[1] // words, words)
        return tile.sequences_to_weight(self.decode_sequences(tiles, bits, table), tile_order)


EXL3_ORDERS = (TileOrder.MMA, TileOrder.MMA_SWAPPED)
"""The quantizer's order and that of EXL3, which has the codes 3inst, mcg and mul1."""

ONE_MAD = TrellisCode("1mad", _one_mad, kernel_orders=(TileOrder.MMA, TileOrder.ROW_MAJOR))
THREE_INST = TrellisCode("3inst", _three_inst, kernel_orders=(*EXL3_ORDERS, TileOrder.ROW_MAJOR))
# HYB stops at 4 bits: its 1024 distinct vectors of two weights carry at most 5 bits per weight.
HYB = TrellisCode(
    "hyb", _hyb, vector_dim=2, bits=(1, 2, 3, 4), table_rows=1 << HYB_TABLE_BITS, default_table=_hyb_default_table
)
LUT = TrellisCode("lut", _lut)
MCG = TrellisCode("mcg", _mcg, kernel_orders=EXL3_ORDERS)
MUL1 = TrellisCode("mul1", _mul1, kernel_orders=EXL3_ORDERS)
MUL1_HALF = TrellisCode("mul1_half", _mul1, bits=(2, 3, 4), kernel_orders=(TileOrder.MMA_SWAPPED,), half=True)
# Only checkpoints of other programs have these, with tiles in row-major order.
STORED = TrellisCode("table", _stored, table_rows=_STATES, kernel_orders=(TileOrder.ROW_MAJOR,))
PAIRS = TrellisCode("pairs", _stored, vector_dim=2, table_rows=_STATES, kernel_orders=(TileOrder.ROW_MAJOR,))
for _code in (ONE_MAD, THREE_INST, HYB, LUT, MCG, MUL1, MUL1_HALF, STORED, PAIRS):
    register(_code)
