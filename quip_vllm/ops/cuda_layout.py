# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's codes in the order of the CUDA kernels, and their tables (drawn in kernels/cuda/layout.h)."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm.formats import e8p, e8p_residual
from quip_vllm.formats.methods import Code, Method, vector_dim
from quip_vllm.formats.tile import TILE
from quip_vllm.formats.trellis_codes import state_values
from quip_vllm.ops.spec import LinearSpec

CHUNK = 64
"""Columns of the weight that a warp decodes at a time."""

LANES = 32
SPARE_CHUNKS = 8
"""Chunks behind the last, which the kernel's last stage may copy and does not use."""


def packed_words(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The weight's codes for the kernels.

    Args:
        spec: the layer.
        tensors: as in the checkpoint, fused along dimension 0.

    Returns:
        int32 [(tiles * chunks + SPARE_CHUNKS) * 32 * bits]: tiles of 16 rows, chunks of 64 columns.
    """
    words = _lattice_words(spec, tensors) if spec.method is Method.QUIP_SHARP else _trellis_words(spec, tensors)
    spare = words.new_zeros(SPARE_CHUNKS * LANES * spec.bits)
    return torch.cat([_to_int32(words).flatten(), _to_int32(spare)])


def _trellis_words(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """int64 [tiles, chunks, 32, bits] (kernels/cuda/trellis_stream.h)."""
    bits, packed = spec.bits, tensors["packed"]
    assert spec.code is not None
    words = packed.view(packed.shape[0], -1, 16 * bits).to(torch.int64) & 0xFFFF
    step = bits * vector_dim(spec.code)
    # The stream of a tile, one step later: word w of the rolled stream ends `step` bits before word w does.
    words = ((words.roll(1, -1) << 16 | words) >> step) & 0xFFFF
    words = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[1] % (CHUNK // TILE)))
    streams = torch.stack([words >> 8, words & 0xFF], dim=-1).view(packed.shape[0], -1, 4, LANES, bits)
    own = streams.permute(0, 1, 3, 2, 4)  # [tiles, chunks, lane, tile of the chunk, byte]
    parts = []
    for pair in range(bits // 2):
        numbers = own[..., 2 * pair] << 8 | own[..., 2 * pair + 1]
        parts += [numbers[..., 2 * half + 1] << 16 | numbers[..., 2 * half] for half in range(2)]
    if bits % 2:
        parts.append(sum(own[..., tile, bits - 1] << (8 * tile) for tile in range(4)))
    return torch.stack(parts, dim=-1)


def _lattice_words(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """int64 [tiles, chunks, 32, bits] (kernels/cuda/code_e8p.h)."""

    def by_lane(codes: Tensor, mask: int) -> Tensor:
        """[n, k/8] to [tiles, chunks, lane 4 g + t, half, row g or g + 8]."""
        n, groups = codes.shape
        padded = torch.nn.functional.pad(codes.to(torch.int64) & mask, (0, -groups % 8, 0, -n % TILE))
        blocks = padded.view(padded.shape[0] // TILE, 2, 8, -1, 2, 4)  # tile, row / 8, g, chunk, half, t
        return blocks.permute(0, 3, 2, 5, 4, 1).flatten(2, 3)

    def rotated(word: Tensor) -> Tensor:
        return (word << 7 | word >> 25) & 0xFFFFFFFF

    def stage(codes: Tensor) -> list[Tensor]:
        pairs = by_lane(codes, 0xFFFF)
        return [rotated(pairs[..., half, 1] << 16 | pairs[..., half, 0]) for half in range(2)]

    parts = stage(tensors["codes"])
    if spec.bits == 3:
        rest = by_lane(tensors["residual_codes"], 0xFF).flatten(-2)
        parts.append(rotated(sum(rest[..., i] << (8 * i) for i in range(4))))
    if spec.bits == 4:
        parts += stage(tensors["residual_codes"])
    return torch.stack(parts, dim=-1)


def table(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor | None:
    """The code's table, int32, or None: HYB's rows a projection, LUT's numbers two a word, or the lattice's tables."""
    if spec.code is Code.HYB:
        return tensors["lut"].half().contiguous().view(torch.int32).flatten()
    if spec.code is Code.LUT:
        return state_values(Code.LUT).half().flatten().view(torch.int32)
    return lattice_tables() if spec.code is None else None


@cache
@torch.inference_mode(False)
def lattice_tables() -> Tensor:
    """int32 [3 * 256 + 4]: absolute values, signs, E81B, and the number that the kernel adds (code_e8p.h)."""
    absolute = e8p.packed_abs_table().to(torch.int64) & 0xEEEEEEEE
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    parity = sum(byte >> bit & 1 for bit in range(8)) & 1
    flipped = byte ^ parity
    signs = sum((14 * (flipped >> bit & 1) | 1 - parity) << (4 * bit) for bit in range(8))
    nibbles = (e8p_residual.e81b_table()[:, list(e8p.NIBBLE_COMPONENT)] * 2 + 8).to(torch.int64)
    fine = (nibbles << torch.arange(0, 32, 4, dtype=torch.int64, device="cpu")).sum(dim=1)
    number = torch.full((4,), 0x50085008, dtype=torch.int64, device="cpu")
    return _to_int32(torch.cat([absolute, signs, fine, number]))


def _to_int32(words: Tensor) -> Tensor:
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)
