# SPDX-License-Identifier: Apache-2.0
"""The scalar grid of QuIP (arXiv 2307.13304): every weight is one of 2^bits equally spaced levels.

It is the simplest code of the trellis: a step's weight depends on its own new bits only. So any levels are a walk, an
encoder rounds each weight by itself, and tiles, slices and kernels are the trellis codes'.
"""

import torch
from torch import Tensor

from quip_vllm.formats import tile, trellis
from quip_vllm.formats.spec import register
from quip_vllm.formats.trellis_codes import TrellisCode


def _level(state: Tensor, table: Tensor | None, bits: int) -> Tensor:
    """The odd integer 2 k - (2^bits - 1) of the number k in the low bits of the state: in units of half a step."""
    last = (1 << bits) - 1
    return (2 * (state & last) - last).to(torch.float32)[:, None]


class Grid(TrellisCode):
    """QuIP's grid. A weight is stored as the number k of its level, counted from the lowest, 0 .. 2^bits - 1."""

    method = "quip"

    def pack(self, numbers: Tensor, bits: int) -> Tensor:
        """Packs the numbers of levels losslessly.

        Args:
            numbers: integer [n, k], each 0 .. 2^bits - 1; n and k are multiples of 16.
            bits: per weight.

        Returns:
            int16 [n/16, k * bits]: the tensor `packed`.

        Raises:
            ValueError: if the sizes or the numbers are others.
        """
        last = (1 << bits) - 1
        if numbers.is_floating_point() or bool(((numbers < 0) | (numbers > last)).any()):
            lowest, highest = numbers.min().item(), numbers.max().item()
            raise ValueError(
                f"levels are {numbers.dtype} from {lowest} to {highest}: at {bits} bits give integers of 0 to {last}"
            )
        sequences = tile.weight_to_sequences(numbers.to(torch.int32))
        states = torch.zeros_like(sequences)
        for step in range(-(-trellis.STATE_BITS // bits)):  # above a step's own bits are those of the steps before
            states |= sequences.roll(step, -1) << step * bits
        return trellis.pack(states & 0xFFFF, bits, 1).flatten(1)

    def unpack(self, packed: Tensor, bits: int) -> Tensor:
        """Inverse of `pack`: int16 [n/16, k * bits] to int32 [n, k]."""
        return (self.decode_weight(packed, bits).to(torch.int32) + (1 << bits) - 1) // 2


GRID = Grid("grid", _level, bits=(2, 3, 4, 5, 6, 7, 8))
register(GRID)
