# SPDX-License-Identifier: Apache-2.0
"""Published QuIP# and QTIP layers: their words as the codes and streams of the formats here (docs/imports.md).

Bits are permuted, nothing is rounded.
"""

import torch
from torch import Tensor

from quip_vllm.formats.trellis import STATE_BITS, to_int16

TWO_MAD_SCALE = 147.800537109375
"""What the numbers of 2mad's `state_table` are divided by."""


def lattice_codes(words: Tensor) -> Tensor:
    """E8P codes.

    A word holds the codes of rows 2 r and 2 r + 1 of 16 and of columns 16 c .. 16 c + 15 of 64, vector i of its four in
    row i & 1 and columns 8 (i >> 1) ..: byte i is the vector's row of the table, bit 32 + 4 j + i its bit j of signs.

    Args:
        words: int64 [n, k/32], of which the order in memory is [n/16, k/64, 8, 4].

    Returns:
        int16 [n, k/8].
    """
    n, columns = words.shape
    blocks = words.reshape(n // 16, columns // 2, 8, 4)
    codes = []
    for i in range(4):
        code = (blocks >> 8 * i & 0xFF) << 8
        for j in range(8):
            code |= (blocks >> (32 + 4 * j + i) & 1) << j
        codes.append(to_int16(code))
    halves = torch.stack(codes, -1).unflatten(-1, (2, 2))  # [n/16, k/64, 8, 4, column, row]
    return halves.permute(0, 2, 5, 1, 3, 4).reshape(n, 4 * columns)


def residual_bytes(words: Tensor) -> Tensor:
    """E81B codes: int64 [n, k/64], a byte for each vector in order, to uint8 [n, k/8]."""
    return words.contiguous().view(torch.uint8)


def streams(trellis: Tensor, n: int, k: int, kernel_order: bool) -> Tensor:
    """The streams of all tiles.

    In the order of a GPU kernel, lane l of a 2 x 2 block of tiles has `bits` bytes of each tile, a little-endian number
    of its 8 * bits bits; the tiles of a block are in the order top left, bottom left, top right, bottom right.

    Args:
        trellis: int16 [n/16 * k/16, 16 * bits], as published.
        n: outputs.
        k: inputs. With `kernel_order` both are multiples of 32.
        kernel_order: whether it is in that order, or has the words of each tile as the formats here.

    Returns:
        int16 [n/16, k/16 * 16 * bits]: `packed` of a trellis code.
    """
    if not kernel_order:
        return trellis.reshape(n // 16, -1)
    bits = trellis.shape[-1] // STATE_BITS
    lanes = trellis.contiguous().view(torch.uint8).reshape(n // 32, k // 32, 32, 2, 2, bits).flip(-1)
    stream = lanes.permute(0, 4, 1, 3, 2, 5).reshape(n // 16, -1, 2).to(torch.int32)
    return to_int16(stream[..., 0] << 8 | stream[..., 1])


def state_table(mode: str, tlut: Tensor | None) -> Tensor:
    """What every state decodes to, for the codes `table` and `pairs`.

    Args:
        mode: lut: row x >> (16 - L) of [2^L, V], a row for each state of L bits, with which a state of 16 bits begins;
            quantlut: the upper bits of the lower 16 of x^2 + x are a row of [2^Q, V]; 2mad: the sum of the four bytes
            of a number that two multiplications make, less 510, in units of 1 / TWO_MAD_SCALE.
        tlut: as published; None for 2mad.

    Returns:
        fp16 [65536, V].
    """
    x = torch.arange(1 << STATE_BITS, dtype=torch.int64, device="cpu")
    if tlut is None:
        y = x * 264435761 + 1013904223 & 0xFFFFFFFF
        y = y + (y * 1664525 >> 32) & 0xFFFFFFFF
        total = (y & 0xFF) + (y >> 8 & 0xFF) + (y >> 16 & 0xFF) + (y >> 24)
        return (total - 510).half()[:, None]
    dropped = STATE_BITS - (tlut.shape[0].bit_length() - 1)
    row = x if mode == "lut" else x * x + x & 0xFFFF
    return tlut.half().cpu()[row >> dropped]
