# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's codes in the order of the CUDA kernels, and their tables (drawn in kernels/cuda/layout.h)."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm.formats import e8p, e8p_residual
from quip_vllm.formats.e8p_residual import CODES, RESIDUAL_CODES, Lattice
from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.tensors import SV
from quip_vllm.formats.tile import TILE
from quip_vllm.formats.trellis import runs_of_half_rate, words_per_tile
from quip_vllm.formats.trellis_codes import HYB, LUT, MCG, PACKED, PAIRS, STORED, TABLE, THREE_INST, TrellisCode

CHUNK = 64
"""Columns of the weight that a warp decodes at a time."""

LANES = 32
SPARE_CHUNKS = 8
"""Chunks behind the last, which the kernel's last stage may copy and does not use."""

THREE_INST_FLIPS = 0x3B603B60
"""What 3INST's and MCG's masked product is exclusive-ored with (formats/trellis_codes.py)."""

TILES_AT_A_TIME = 256
"""Rows of tiles that are packed together: packing takes 20 times the memory of what it packs."""


def packed_words(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The weight's codes for the kernels.

    Args:
        spec: the layer.
        tensors: as in the checkpoint, fused along dimension 0.

    Returns:
        int32 [(tiles * chunks + SPARE_CHUNKS) * 32 * bits]: tiles of 16 rows, chunks of 64 columns.
    """
    tiles, lattice = -(-sum(spec.stored_outputs) // TILE), isinstance(spec.format, Lattice)
    codes = {name: tensors[name] for name in (CODES, RESIDUAL_CODES, PACKED) if name in tensors}
    parts = []
    for tile in range(0, tiles, TILES_AT_A_TIME):
        begin, end = tile, min(tile + TILES_AT_A_TIME, tiles)
        if lattice:
            begin, end = begin * TILE, end * TILE
        part = {name: rows[begin:end] for name, rows in codes.items()}
        words = _lattice_words(spec.bits, part) if lattice else _trellis_words(spec, part[PACKED])
        parts.append(_to_int32(_in_parts(words)).flatten())
    return torch.cat([*parts, parts[0].new_zeros(SPARE_CHUNKS * LANES * spec.bits)])


def _trellis_words(spec: LinearSpec, packed: Tensor) -> Tensor:
    """int64 [tiles, chunks, 32, bits] (kernels/cuda/trellis_stream.h)."""
    bits = spec.bits
    assert isinstance(spec.format, TrellisCode)
    words = packed.view(packed.shape[0], -1, words_per_tile(bits, spec.format.half)).to(torch.int64) & 0xFFFF
    step = bits * spec.format.vector_dim - spec.format.half
    # The stream of a tile, its first step later: word w of the rolled stream ends `step` bits before word w does.
    words = ((words.roll(1, -1) << 16 | words) >> step) & 0xFFFF
    if spec.format.half:  # two runs are a word less than two runs of `bits` units: the second begins within a word
        pairs = runs_of_half_rate(words, bits)
        second = (pairs[..., bits - 1 : -1] << 8 | pairs[..., bits:] >> 8) & 0xFFFF
        words = torch.stack([pairs[..., :bits], second], dim=-2).flatten(2)
    words = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[1] % (CHUNK // TILE)))
    # A run of 16 positions, of `bits` units: to lane 4 g + t, half, unit.
    if spec.tile_order is TileOrder.ROW_MAJOR:  # tile t, run 8 half + g
        runs = words.view(packed.shape[0], -1, 4, 2, 8, bits).permute(0, 1, 4, 2, 3, 5).flatten(2, 3)
    else:  # tile 2 half + t / 2, run 2 g + t % 2
        runs = words.view(packed.shape[0], -1, 2, 2, 8, 2, bits).permute(0, 1, 4, 3, 5, 2, 6).flatten(2, 4)
    pairs = runs[..., bits % 2 :].unflatten(-1, (bits // 2, 2))
    parts = (pairs[..., 0] << 16 | pairs[..., 1]).flatten(-2)
    if bits % 2:
        parts = torch.cat([parts, runs[..., 1:, 0] << 16 | runs[..., :1, 0]], dim=-1)
    return parts


def _in_parts(words: Tensor) -> Tensor:
    """[..., 32, bits] to [..., 32 * bits]: four words of each lane, again where there are more, then two, then one."""
    bits = words.shape[-1]
    sizes = [4] * (bits // 4) + [2] * (bits % 4 // 2) + [1] * (bits % 2)
    return torch.cat([part.flatten(-2) for part in words.split(sizes, dim=-1)], dim=-1)


def _lattice_words(bits: int, tensors: dict[str, Tensor]) -> Tensor:
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

    parts = stage(tensors[CODES])
    if bits == 3:
        rest = by_lane(tensors[RESIDUAL_CODES], 0xFF).flatten(-2)
        parts.append(rotated((rest << torch.arange(0, 32, 8, device=rest.device)).sum(-1)))
    if bits == 4:
        parts += stage(tensors[RESIDUAL_CODES])
    return torch.stack(parts, dim=-1)


def table(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor | None:
    """The code's table, int32, or None.

    HYB: 512 rows a projection. TABLE and PAIRS: 65,536. LUT: two numbers a word. The lattice: its three tables. 3INST
    and MCG: their constant, four times.
    LUT's and the lattice's are one copy a device, shared by all layers: do not write to them.
    """
    if spec.format in (HYB, STORED, PAIRS):
        return tensors[TABLE].half().flatten().view(torch.int32)
    device = tensors[SV.name].device
    if spec.format is LUT:
        return _lut_table(device)
    if spec.format in (THREE_INST, MCG):
        return torch.full((4,), THREE_INST_FLIPS, dtype=torch.int32, device=device)
    return _lattice_tables(device) if isinstance(spec.format, Lattice) else None


@cache
@torch.inference_mode(False)
def _lut_table(device: torch.device) -> Tensor:
    return LUT.values().half().flatten().view(torch.int32).to(device)


@cache
@torch.inference_mode(False)
def _lattice_tables(device: torch.device) -> Tensor:
    return lattice_tables().to(device)


@cache
@torch.inference_mode(False)
def lattice_tables() -> Tensor:
    """int32 [3 * 256 + 4]: absolute values, signs, E81B, and the number that the kernel adds (code_e8p.h)."""
    absolute = e8p.packed_abs_table().to(torch.int64) & 0xEEEEEEEE
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    bits = torch.arange(8, dtype=torch.int64, device="cpu")
    parity = (byte[:, None] >> bits & 1).sum(dim=1) & 1
    flipped = byte ^ parity
    signs = ((14 * (flipped[:, None] >> bits & 1) | 1 - parity[:, None]) << (4 * bits)).sum(dim=1)
    nibbles = (e8p_residual.e81b_table()[:, list(e8p.NIBBLE_COMPONENT)] * 2 + 8).to(torch.int64)
    fine = (nibbles << torch.arange(0, 32, 4, dtype=torch.int64, device="cpu")).sum(dim=1)
    number = torch.full((4,), 0x50085008, dtype=torch.int64, device="cpu")
    return _to_int32(torch.cat([absolute, signs, fine, number]))


def _to_int32(words: Tensor) -> Tensor:
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)
