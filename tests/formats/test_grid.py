# SPDX-License-Identifier: Apache-2.0
"""The scalar grid: levels, the bits of each weight, and the paper's rounding of a row worked out by hand."""

import numpy
import pytest
import torch

from quip_vllm.formats.grid import GRID
from quip_vllm.formats.spec import FORMATS, TileOrder, methods
from quip_vllm.formats.tile import TILE_COL, TILE_ROW

BITS = [2, 3, 5, 8]


def random_numbers(bits, n=32, k=48):
    return torch.from_numpy(numpy.random.default_rng(bits).integers(0, 1 << bits, (n, k)))


def test_it_is_method_quip():
    assert methods()["quip"] == [GRID] and FORMATS["grid"] is GRID
    assert GRID.bits == (2, 3, 4, 5, 6, 7, 8)


def test_a_row_of_the_paper():
    # 2 bits: levels at +-rho rms and +-rho rms / 3, with rho = 2.4.
    row, bits = torch.tensor([0.1, -0.7, 1.2, 0.35], dtype=torch.float64), 2
    scale = 2.4 * row.square().mean().sqrt() + 1e-16
    numbers = torch.zeros(16, 16, dtype=torch.int64)
    numbers[0, :4] = ((row / scale + 1) / 2 * 3).round()
    assert numbers[0, :4].tolist() == [2, 1, 3, 2]
    tensors = {"packed": GRID.pack(numbers, bits)}
    found = GRID.decode(tensors, bits, TileOrder.MMA)[0, :4].double() * scale / 3
    assert found.tolist() == pytest.approx([0.574456, -0.574456, 1.723369, 0.574456], abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_numbers_and_levels_after_packing(bits):
    numbers = random_numbers(bits)
    packed = GRID.pack(numbers, bits)
    assert packed.dtype is torch.int16 and packed.shape == GRID.tensors(bits)[0].shape(32, 48)
    assert torch.equal(GRID.unpack(packed, bits), numbers.int())
    assert torch.equal(GRID.decode({"packed": packed}, bits, TileOrder.MMA), 2.0 * numbers - (2**bits - 1))


@pytest.mark.parametrize("bits", BITS)
def test_the_bits_of_each_weight(bits):
    numbers = random_numbers(bits)
    words = GRID.pack(numbers, bits)[1, 2 * 16 * bits :].tolist()
    stream = "".join(f"{word % 65536:016b}" for word in words)
    for t, (row, column) in enumerate(zip(TILE_ROW.tolist(), TILE_COL.tolist(), strict=True)):
        end = bits * t + 16  # of the state of step t
        found = "".join(stream[i % len(stream)] for i in range(end - bits, end))
        assert int(found, 2) == numbers[16 + row, 32 + column]


@pytest.mark.parametrize("wrong", [-1, 8, 0.5])
def test_other_numbers_are_refused(wrong):
    numbers = torch.full((16, 16), 7, dtype=torch.int64).to(torch.tensor(wrong).dtype)
    numbers[3, 5] = wrong
    with pytest.raises(ValueError, match=rf" {wrong}[ :].*at 3 bits give integers of 0 to 7"):
        GRID.pack(numbers, 3)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"weight \[16, 24\] cannot be cut in tiles"):
        GRID.pack(torch.zeros(16, 24, dtype=torch.int64), 3)
