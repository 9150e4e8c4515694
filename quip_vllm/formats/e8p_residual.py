# SPDX-License-Identifier: Apache-2.0
"""QuIP# at 2, 3 and 4 bits (arXiv 2402.04396): E8P, alone or followed by a second, finer stage.

    2 bits  value = e8p(code)
    3 bits  value = e8p(code) + e81b(residual) / RESIDUAL_SCALE[3]     8-bit residual
    4 bits  value = e8p(code) + e8p(residual)  / RESIDUAL_SCALE[4]     16-bit residual

Values are in codebook units: the rotated weight divided by one scalar, which is folded in sv.
"""

import functools
import itertools
from fractions import Fraction

import torch

from quip_vllm.formats import e8p
from quip_vllm.formats.spec import Format, TileOrder, register
from quip_vllm.formats.tensors import Follows, TensorSpec

RESIDUAL_SCALE: dict[int, float] = {3: 2.04, 4: 3.45}
"""By bits: codebook units of the second stage per codebook unit of the first (what the residual is multiplied by before
its own rounding, and divided by after)."""

CODES, RESIDUAL_CODES = "codes", "residual_codes"
"""Names of the tensors: both have one code per eight weights of a row."""


@functools.cache
@torch.inference_mode(False)
def e81b_table() -> torch.Tensor:
    """Returns the 8-bit lattice codebook E81B: E8 vectors of squared norm at most 2, and 15 of squared norm 4.

    Rows 0..112 are the integer ones (row 56 is zero) and rows 113..240 the half-integer ones, both ascending with
    component 0 most significant; rows 241..248 are 2 e_0 .. 2 e_7, rows 249..255 are -2 e_0 .. -2 e_6.

    Returns:
        float32 [256, 8] on the CPU. Cached and shared: do not write to it.
    """
    integers = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, v)) in (0, 2)]
    halves = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(c < 0 for c in v) % 2 == 0]
    short = torch.tensor(integers + halves, dtype=torch.float32, device="cpu")
    long = 2 * torch.eye(8, dtype=torch.float32, device="cpu")
    return torch.cat([short, long, -long[:7]])


def decode(codes: torch.Tensor, residual_codes: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Decodes both stages.

    Args:
        codes: int16 [..., g], E8P codes read as unsigned.
        residual_codes: None for 2 bits, uint8 [..., g] (E81B) for 3, int16 [..., g] (E8P) for 4.
        bits: 2, 3 or 4.

    Returns:
        float32 [..., 8g], in codebook units.

    Raises:
        ValueError: if bits is none of these, or the residual codes do not belong to it.
    """
    _check_residual(codes, residual_codes, bits)
    first = e8p.decode(codes)
    if residual_codes is None:
        return first
    if bits == 3:
        table = e81b_table().to(codes.device)
        second = table[residual_codes.to(torch.int64)].reshape(first.shape)
    else:
        second = e8p.decode(residual_codes)
    return first + second / RESIDUAL_SCALE[bits]


class Lattice(Format):
    """QuIP#: E8P, with a second stage at 3 and 4 bits."""

    name, method = "e8p", "quip_sharp"
    bits = (2, 3, 4)
    multiple_in, multiple_out = 8, 1

    def tensors(self, bits: int) -> tuple[TensorSpec, ...]:
        """See Format."""
        eighth = Fraction(1, 8)
        codes = TensorSpec(CODES, Follows.BOTH, (torch.int16,), columns_per_input=eighth)
        if bits == 2:
            return (codes,)
        dtype = torch.uint8 if bits == 3 else torch.int16
        return (codes, TensorSpec(RESIDUAL_CODES, Follows.BOTH, (dtype,), columns_per_input=eighth))

    def decode(self, tensors: dict[str, torch.Tensor], bits: int, tile_order: TileOrder) -> torch.Tensor:
        """See Format; the order of tiles means nothing here."""
        return decode(tensors[CODES], tensors.get(RESIDUAL_CODES), bits)


register(Lattice())


def _check_residual(codes: torch.Tensor, residual_codes: torch.Tensor | None, bits: int) -> None:
    expected = {2: None, 3: torch.uint8, 4: torch.int16}
    if bits not in expected:
        raise ValueError(f"bits={bits}: QuIP# has 2, 3 and 4 bits per weight; choose one of these")
    found = None if residual_codes is None else residual_codes.dtype
    if found is not expected[bits]:
        raise ValueError(
            f"residual codes {found} with bits={bits}: they have to be {expected[bits]} (absent for 2 bits, "
            "uint8 for 3, int16 for 4); pass the residual_codes tensor stored with these codes"
        )
    if residual_codes is not None and residual_codes.shape != codes.shape:
        raise ValueError(
            f"residual codes {list(residual_codes.shape)} beside codes {list(codes.shape)}: both have one code per "
            "eight weights, so their shapes have to be equal; check that both come from the same layer"
        )
