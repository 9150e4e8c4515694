# SPDX-License-Identifier: Apache-2.0
"""EXL3: the tensors of a layer as published <-> those of the formats here. Bits are permuted, nothing is rounded.

A published layer is transposed: rows are inputs. Its stream has the most significant bit first in 32-bit words, and a
state is the 16 bits that end with a step's own bits, where the states here begin with them:

    published   b0 ............ [state t: 16 bits, of which the last are b[t*bits .. t*bits + bits)]
    here        the stream turned right by 16 - bits: the same state begins at bit t*bits

At a half rate steps take K - 1/2 and K + 1/2 bits in turn, and the stream is turned right by 16 less the first of them.

The order of a tile is TileOrder.MMA_SWAPPED, and both rotations are in blocks of 128 (docs/imports.md).
"""

import torch
from torch import Tensor

from quip_vllm.formats.trellis import STATE_BITS, to_int16
from quip_vllm.formats.trellis_codes import MCG, MCG_MULTIPLIER, MUL1, MUL1_MULTIPLIER

BLOCK = 128
"""The Hadamard block of both sides; stored sizes are multiples of it."""

TRELLIS, SUH, SVH, SU_BITS, SV_BITS = "trellis", "suh", "svh", "su", "sv"
"""Published tensors: the streams, the real vectors, and what older files have in place of these: signs as bits."""

CODE_MARKS = {MCG.name: MCG_MULTIPLIER, MUL1.name: MUL1_MULTIPLIER}
"""Published scalars, of which the presence says the code, and their value, its multiplier; 3inst has none."""


def packed(trellis: Tensor) -> Tensor:
    """The streams of a layer.

    Args:
        trellis: int16 [k/16, n/16, 16 * K], as published.

    Returns:
        int16 [n/16, k/16 * 16 * K]: `packed` of a trellis code.
    """
    first = trellis.shape[-1] // STATE_BITS  # bits of the first step
    stream = trellis.transpose(0, 1).unflatten(-1, (-1, 2)).flip(-1).flatten(-2).to(torch.int32) & 0xFFFF
    turned = stream.roll(1, -1) << first | stream >> (STATE_BITS - first)
    return to_int16(turned).flatten(1)


def published(packed: Tensor, words: int) -> Tensor:
    """The inverse of `packed`: int16 [n/16, k/16 * words], of so many words per tile, to int16 [k/16, n/16, words]."""
    first = words // STATE_BITS
    stream = packed.unflatten(-1, (-1, words)).to(torch.int32) & 0xFFFF
    turned = to_int16(stream << (STATE_BITS - first) | stream.roll(-1, -1) >> first)
    return turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).transpose(0, 1).contiguous()


def signs(words: Tensor) -> Tensor:
    """The vector of an older file: int16 [d/16] to float16 [d] of +-1; bit i of word w negates element 16 w + i."""
    bits = words.to(torch.int32)[:, None] >> torch.arange(16, device=words.device) & 1
    return (1 - 2 * bits).flatten().to(torch.float16)
