# SPDX-License-Identifier: Apache-2.0
"""E8P, the 2-bit lattice codebook of QuIP# (arXiv 2402.04396): 16 bits for eight weights.

The 65,536 entries lie in E8 + 1/4. A code is

    bits 15..8   row of the table of 256 vectors in {1/2, 3/2, 5/2}^8
    bits  7..0   signs s; with an odd number of ones, bit 0 is flipped, which makes the number of sign changes even, and
                 1/4 is subtracted from every component; otherwise 1/4 is added

Component i takes its sign from bit SIGN_BIT[i]. Table rows are in D8 + 1/2: each has an even sum, for which component 7
is negative where needed ("the parity fix").
"""

import functools
import itertools

import torch

SIGN_BIT: tuple[int, ...] = (0, 4, 1, 5, 2, 6, 3, 7)
"""Bit of the code that negates component i."""

NIBBLE_COMPONENT: tuple[int, ...] = (0, 2, 4, 6, 1, 3, 5, 7)
"""Component in nibble j of a packed table row: the order in which sign bit j belongs to nibble j."""

# Of the vectors of squared norm 12 (five 3/2, three 1/2) only 29 fit: these, by the positions of the three 1/2.
_NORM_12_HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 "
    "167 157 147 156 146 045 067 057 047 056 046 014 237"
)


@functools.cache
@torch.inference_mode(False)
def abs_table() -> torch.Tensor:
    """Returns the table of absolute vectors, component 7 negated where the parity fix asks for it.

    Rows 0..226 are all vectors of {1/2, 3/2, 5/2}^8 with squared norm at most 10, ascending, component 0 most
    significant; rows 227..255 have squared norm 12.

    Returns:
        float32 [256, 8] on the CPU, every row with an even sum. Cached and shared: do not write to it.
    """
    rows = [list(v) for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(c * c for c in v) <= 10]
    for halves in _NORM_12_HALVES.split():
        rows.append([0.5 if str(i) in halves else 1.5 for i in range(8)])
    table = torch.tensor(rows, dtype=torch.float32, device="cpu")
    odd = table.sum(dim=1) % 2 == 1
    table[odd, 7] *= -1
    return table


@functools.cache
@torch.inference_mode(False)
def packed_abs_table() -> torch.Tensor:
    """Returns `abs_table` in 32 bits per row, the 1 KiB table that kernels keep at hand.

    Nibble j (bits 4j..4j+3) is 2 v + 8 for component NIBBLE_COMPONENT[j]: 3, 5, 7, 9, 11, 13 for -5/2 .. 5/2. To negate
    a nibble, XOR it with 14.

    Returns:
        int32 [256] on the CPU (a row above 2^31 reads as negative). Cached and shared: do not write to it.
    """
    nibbles = (abs_table()[:, list(NIBBLE_COMPONENT)] * 2 + 8).to(torch.int64)
    words = (nibbles << torch.arange(0, 32, 4, dtype=torch.int64, device="cpu")).sum(dim=1)
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)


@functools.cache
@torch.inference_mode(False)
def codebook() -> torch.Tensor:
    """Returns every entry: float32 [65536, 8] on the CPU, row c the vector of code c. Cached and shared."""
    code = torch.arange(1 << 16, dtype=torch.int64, device="cpu")
    ones = code & 0xFF
    for shift in (4, 2, 1):
        ones = ones ^ (ones >> shift)
    parity = ones & 1
    signs = code & 0xFF ^ parity
    bit = torch.tensor(SIGN_BIT, dtype=torch.int64, device="cpu")
    sign = (1 - 2 * (signs[:, None] >> bit & 1)).to(torch.float32)
    shift_by = 0.25 - 0.5 * parity.to(torch.float32)
    return abs_table()[code >> 8] * sign + shift_by[:, None]


@functools.cache
@torch.inference_mode(False)
def _codebook(device: torch.device) -> torch.Tensor:
    return codebook().to(device)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Decodes E8P codes.

    Args:
        codes: int16 [..., g], each read as unsigned 16 bits.

    Returns:
        float32 [..., 8g]: elements 8j .. 8j+7 are `codebook()` row codes[..., j].

    Raises:
        ValueError: if codes are not int16.
    """
    if codes.dtype is not torch.int16:
        raise ValueError(f"E8P codes of {codes.dtype}: they have to be int16, read as unsigned; convert by bit pattern")
    vectors = _codebook(codes.device)[codes.to(torch.int64) & 0xFFFF]
    return vectors.reshape(*codes.shape[:-1], 8 * codes.shape[-1])


def nearest(x: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """Finds the nearest entry by trying all 65,536: exact and slow, the definition that a fast search must meet.

    Args:
        x: floating [N, 8], in codebook units.
        chunk: vectors compared at a time (memory: half a MiB each).

    Returns:
        int16 [N], codes; among equally near entries the smallest code read as unsigned.

    Raises:
        ValueError: if x is not [N, 8].
    """
    if x.ndim != 2 or x.shape[1] != 8:
        raise ValueError(f"vectors {list(x.shape)} are not [N, 8]: E8P codes eight weights; reshape to (-1, 8)")
    entries = _codebook(x.device).to(torch.float64)
    # argmin |x - c|^2 = argmax 2 <x, c> - |c|^2; entries are multiples of 1/4, so float64 makes ties exact for short x.
    bias = (entries * entries).sum(dim=1)
    found = [(2 * part.to(torch.float64) @ entries.T - bias).argmax(dim=1) for part in x.split(chunk)]
    codes = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=x.device)
    return ((codes ^ 0x8000) - 0x8000).to(torch.int16)
