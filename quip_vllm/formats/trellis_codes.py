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

HYB_LUT_STD = 0.9682458365518543
"""Standard deviation of HYB's default table over all its numbers, sqrt(15/16)."""

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
        lut: for HYB, floating [2^b, 2], or None for `default_lut(Code.HYB)`; None for the other codes.

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


@functools.cache
@torch.inference_mode(False)
def default_lut(code: Code) -> torch.Tensor | None:
    """Returns the table that a checkpoint stores when none was trained, or None for codes without a table.

    HYB: K-means centroids of 2-D N(0, 1), rescaled to root mean square HYB_LUT_STD over all 1,024 numbers. Like the
    Gaussian, the table is symmetric: rows 0..127 are centroids of the octant 0 <= y <= x, the next 128 rows are the
    same with x and y exchanged, and the other half is the first half with y negated. It costs no distortion, and a
    kernel that sees the symmetry looks up 128 rows in place of 512. The centroids are computed (Lloyd, float64, fixed
    seed, about a second); another machine may differ in the last bit, so a checkpoint stores its table.

    Args:
        code: the trellis code.

    Returns:
        fp16 [512, 2] on the CPU, cached and shared (do not write to it), or None.
    """
    if code is not Code.HYB:
        return None
    generator = torch.Generator(device="cpu").manual_seed(0)
    samples = torch.randn(1 << 17, 2, dtype=torch.float64, generator=generator, device="cpu").abs()
    samples = samples.sort(dim=1, descending=True).values
    centroids = samples[: 1 << (HYB_LUT_BITS - 2)].clone()
    # Many rounds on few samples bring the centroids close, a few rounds on all of them settle the rest.
    for count, rounds in ((1 << 14, 40), (1 << 17, 10)):
        for _ in range(rounds):
            centroids = _lloyd_step(samples[:count], centroids)
    half = torch.cat([centroids, centroids.flip(1)])
    table = torch.cat([half, half * torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")])
    return (table * (HYB_LUT_STD / table.square().mean().sqrt())).to(torch.float16)


def _lloyd_step(samples: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Moves each centroid to the mean of its nearest samples; one that has none stays. [S, 2], [C, 2] -> [C, 2]."""
    bias = (centroids * centroids).sum(dim=1) / 2
    owner = torch.cat([torch.addmm(bias, part, centroids.T, alpha=-1).argmin(dim=1) for part in samples.split(1024)])
    count = torch.bincount(owner, minlength=centroids.shape[0])
    total = torch.zeros_like(centroids).index_add_(0, owner, samples)
    return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centroids)


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
