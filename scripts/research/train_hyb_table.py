# SPDX-License-Identifier: Apache-2.0
"""Train HYB's grids (formats/trellis_codes.py) on Gaussian weights: Lloyd's rounds around the trellis search.

Usage: python scripts/research/train_hyb_table.py [BITS ...]      (1 2 3 4; about 4 minutes each on 2 cores)

A round encodes the same tiles with the table as it is, then moves each number of the grid past the mean of what it
stood for. Prints the distortion of every tenth round, the grid in 63rds of its largest number, and its distortion on
other tiles.
"""

import sys

import torch
from torch import Tensor

from quip_vllm.formats.trellis_codes import HYB, hyb_table
from quip_vllm.ops import encode_trellis

TILES, ROUNDS = 512, 40
LEVELS = 63  # four products with int8 then add up to 16 bits
STEP = 1.6  # of the way to the mean, in all rounds but the last: fewer rounds are needed
FIRST_STD = {1: 0.95, 2: 1.05, 3: 1.25, 4: 1.55}  # of the quantiles to begin with


def search(tiles: Tensor, table: Tensor, bits: int) -> tuple[Tensor, float]:
    """The states of tiles [T, 256] and their mean squared error."""
    values = HYB.values(table)
    states = encode_trellis(tiles, values, bits).long()
    return states, float((values[states].flatten(1) - tiles).square().mean())


def means(tiles: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """For points [2, 16] and lines [16], the mean of the magnitudes that each stood for."""
    h = states * states + states
    target = tiles.unflatten(1, (-1, 2))
    values = [target[..., 0] * (1 - 2 * (h >> 15 & 1)), target[..., 1] * (1 - 2 * (h >> 14 & 1))]
    index = [(h >> 13 & 1) * 16 + (h >> 6 & 15), h >> 10 & 15]
    found = []
    for value, where, size in zip(values, index, (32, 16), strict=True):
        total = torch.bincount(where.flatten(), value.flatten(), size)
        found.append((total / torch.bincount(where.flatten(), minlength=size).clamp(min=1)).float())
    return found[0].view(2, 16), found[1]


def train(bits: int) -> None:
    """Trains and prints the grid of one bit width."""
    generator = torch.Generator().manual_seed(bits)
    tiles = torch.randn(TILES, 256, generator=generator)
    levels = torch.special.ndtri(0.5 + (torch.arange(16) + 0.5) / 32) * FIRST_STD[bits]
    apart = torch.cat([levels.diff(), levels.diff()[-1:]])
    points = torch.stack([levels - apart / 5, levels + apart / 5])
    lines = torch.cat([levels[0::2], levels[1::2]])  # every other one has the other points
    for i in range(ROUNDS):
        states, error = search(tiles, hyb_table(points, lines), bits)
        if i % 10 == 0 or i + 1 == ROUNDS:
            print(f"{bits} bits, round {i}: {error:.5f}", flush=True)
        step = STEP if i + 1 < ROUNDS else 1.0
        points, lines = (
            old + (new - old) * step for old, new in zip((points, lines), means(tiles, states), strict=True)
        )
    unit = max(points.max(), lines.max()).item() / LEVELS
    points, lines = (points / unit).round().abs(), (lines / unit).round().abs()  # the code has both signs
    print(f"unit {unit:.6f}", points.int().tolist(), lines.int().tolist())
    fresh = torch.randn(TILES, 256, generator=generator)
    print(f"{bits} bits, other tiles: {search(fresh, hyb_table(points * unit, lines * unit), bits)[1]:.5f}", flush=True)


if __name__ == "__main__":
    for bits in map(int, sys.argv[1:] or "1234"):
        train(bits)
