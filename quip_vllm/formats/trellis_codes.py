# SPDX-License-Identifier: Apache-2.0
"""Trellis codes: how a 16-bit state becomes one or two weights (QTIP, arXiv 2406.11235).

A code is one function of an int64 tensor of states [S] that returns float32 values [S, vector_dim], and one row in
`_CODES`. "mod 2^32" is what 32-bit registers do; kernels compute the same in fewer instructions.
"""

import functools
from collections.abc import Callable

import torch

from quip_vllm.formats import tile, trellis
from quip_vllm.formats.methods import STATE_BITS, Code, vector_dim

HYB_LUT_BITS = 9
"""log2 of the rows of HYB's default table."""

# Of each bit width: a unit, and the points and lines of the grid (hyb_table) in that unit, for weights of N(0, 1).
# scripts/train_hyb_table.py found them. They are at most 63: exact in integer kernels, and four products with int8 fit
# 16 bits.
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

_STATES = 1 << STATE_BITS
_WORD = 0xFFFFFFFF


def _one_mad(state: torch.Tensor, lut: torch.Tensor | None) -> torch.Tensor:
    """1MAD: the sum of the four bytes of one multiply-add, centred and scaled to about N(0, 1)."""
    y = state * 34038481 + 76625530 & _WORD
    total = (y & 0xFF) + (y >> 8 & 0xFF) + (y >> 16 & 0xFF) + (y >> 24)
    return ((total - 510).to(torch.float32) / 147.800537109375)[:, None]


def _three_inst(state: torch.Tensor, lut: torch.Tensor | None) -> torch.Tensor:
    """3INST: a multiply-add, a masked XOR, and the sum of the two fp16 numbers in the halves of the result.

    The sum is rounded to fp16, as a half-precision adder does. Its standard deviation is 1.2437, not 1.
    """
    y = state * 89226354 + 64248484 & _WORD
    z = y & 0x8FFF8FFF ^ 0x3B603B60
    return (_as_half(z >> 16) + _as_half(z & 0xFFFF)).to(torch.float32)[:, None]


def _hyb(state: torch.Tensor, lut: torch.Tensor | None) -> torch.Tensor:
    """HYB: bits 14.. of x^2 + x choose a row of the table (9 bits: 14..6), bit 15 negates its component 0."""
    if lut is None:
        raise ValueError(
            "code hyb without a table: it needs lut [2^b, 2]; pass the stored lut, or default_lut(Code.HYB)"
        )
    lut_bits = lut.shape[0].bit_length() - 1
    if lut.ndim != 2 or lut.shape[1] != 2 or lut.shape[0] != 1 << lut_bits or not 1 <= lut_bits <= 15:
        raise ValueError(
            f"lut {list(lut.shape)}: code hyb needs [2^b, 2] with b in 1..15; pass the table stored with the weight"
        )
    h = state * state + state
    vector = lut.to(torch.float32)[h >> (15 - lut_bits) & ((1 << lut_bits) - 1)]
    sign = 1 - 2 * (h >> 15 & 1)
    return torch.stack([vector[:, 0] * sign, vector[:, 1]], dim=1)


def _lut(state: torch.Tensor, lut: torch.Tensor | None) -> torch.Tensor:
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


_CODES: dict[Code, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    Code.ONE_MAD: _one_mad,
    Code.THREE_INST: _three_inst,
    Code.HYB: _hyb,
    Code.LUT: _lut,
}


def state_values(code: Code, lut: torch.Tensor | None = None) -> torch.Tensor:
    """Returns what every state decodes to.

    Args:
        code: the trellis code.
        lut: for HYB, floating [2^b, 2], or None for `default_lut(Code.HYB)`, that of 2 bits; None for the other codes.

    Returns:
        float32 [65536, vector_dim], on lut's device, or the CPU. Without lut it is cached and shared: do not
        write to it.

    Raises:
        ValueError: if the code takes no table, or the table has the wrong shape.
    """
    if lut is None:
        return _default_values(code)
    if code is not Code.HYB:
        raise ValueError(f"code {code.value} with a lut: only hyb has a table; leave lut out")
    return _CODES[code](torch.arange(_STATES, dtype=torch.int64, device=lut.device), lut)


@functools.cache
@torch.inference_mode(False)
def _default_values(code: Code) -> torch.Tensor:
    return _CODES[code](torch.arange(_STATES, dtype=torch.int64, device="cpu"), default_lut(code))


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


@functools.cache
@torch.inference_mode(False)
def default_lut(code: Code, bits: int = 2) -> torch.Tensor | None:
    """Returns the table that the quantizer stores, or None for codes without a table.

    HYB: a grid trained for Gaussian weights at this bit width. At 2 bits it loses no more than K-means centroids do
    (the paper's choice); at each width it is decoded by look-ups of 16 entries.

    Args:
        code: the trellis code.
        bits: stored bits per weight, 1 to 4.

    Returns:
        fp16 [512, 2] on the CPU, cached and shared (do not write to it), or None.
    """
    if code is not Code.HYB:
        return None
    unit, *numbers = _HYB_GRIDS[bits]
    first, second, lines = (torch.tensor(row, dtype=torch.float32, device="cpu") * unit for row in numbers)
    return hyb_table(torch.stack([first, second]), lines)


def decode_sequences(packed: torch.Tensor, bits: int, code: Code, lut: torch.Tensor | None = None) -> torch.Tensor:
    """Decodes packed sequences to values in sequence order.

    Args:
        packed: int16 [..., 16*bits].
        bits: stored bits per weight.
        code: the trellis code.
        lut: see `state_values`.

    Returns:
        float32 [..., 256] on packed's device.

    Raises:
        ValueError: as `trellis.unpack` and `state_values`.
    """
    states = trellis.unpack(packed, bits, vector_dim(code))
    return state_values(code, lut).to(packed.device)[states].reshape(*packed.shape[:-1], trellis.SEQUENCE)


def decode_weight(packed: torch.Tensor, bits: int, code: Code, lut: torch.Tensor | None = None) -> torch.Tensor:
    """Decodes a stored weight.

    Args:
        packed: int16 [n/16, k/16 * 16*bits]; tile (i, j) is words 16*bits*j .. of row i.
        bits: stored bits per weight.
        code: the trellis code.
        lut: see `state_values`.

    Returns:
        float32 [n, k] on packed's device.

    Raises:
        ValueError: if packed is not a matrix of whole tiles, or as `decode_sequences`.
    """
    words = STATE_BITS * bits
    if packed.ndim != 2 or bits < 1 or packed.shape[1] % words:
        raise ValueError(
            f"packed {list(packed.shape)} with bits={bits}: need [n/16, tiles * {words}], 16 * bits words a tile; "
            "check bits against the checkpoint's config"
        )
    tiles = packed.reshape(packed.shape[0], packed.shape[1] // words, words)
    return tile.sequences_to_weight(decode_sequences(tiles, bits, code, lut))


def _as_half(bits: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers with these bit patterns 0..65535."""
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(torch.float16)
