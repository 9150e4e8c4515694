# SPDX-License-Identifier: Apache-2.0
"""The tile order against its picture, its definition and the tensor-core fragment it was made for."""

import re

import pytest
import torch

from quip_vllm.formats import tile
from quip_vllm.formats.tile import TILE, TILE_COL, TILE_ROW, sequences_to_weight, weight_to_sequences


def test_positions_by_definition():
    expected = {}
    for r0 in range(8):
        for c1 in range(4):
            for c2 in range(2):
                for r1 in range(2):
                    for c0 in range(2):
                        expected[r0 * 32 + c1 * 8 + c2 * 4 + r1 * 2 + c0] = (8 * r1 + r0, 8 * c2 + 2 * c1 + c0)
    assert TILE == 16 and TILE_ROW.dtype is torch.int64 and TILE_COL.dtype is torch.int64
    found = dict(enumerate(zip(TILE_ROW.tolist(), TILE_COL.tolist(), strict=True)))
    assert found == expected


def test_picture_in_the_docstring():
    rows = [line.split("|") for line in tile.__doc__.splitlines() if re.match(r"\s+\d+ \|", line)]
    picture = {(int(row), col): int(t) for row, cells in rows for col, t in enumerate(cells.split())}
    assert len(picture) == 256
    for t in range(256):
        assert picture[TILE_ROW[t].item(), TILE_COL[t].item()] == t


def test_lane_holds_its_mma_fragment():
    # mma.m16n8k16, operand A: register j of a lane holds row lane // 4 (+ 8 if j odd), columns 2 (lane % 4) + 0, 1
    # (+ 8 if j >= 2).
    for lane in range(32):
        for j in range(4):
            for half in range(2):
                t = 8 * lane + 2 * j + half
                assert TILE_ROW[t] == lane // 4 + 8 * (j % 2)
                assert TILE_COL[t] == 2 * (lane % 4) + half + 8 * (j // 2)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 32)])
def test_round_trip_and_place_of_tiles(shape):
    w = torch.arange(shape[0] * shape[1]).reshape(shape)
    sequences = weight_to_sequences(w)
    assert sequences.shape == (shape[0] // 16, shape[1] // 16, 256)
    i, j, t = shape[0] // 16 - 1, shape[1] // 16 - 1, 77
    assert sequences[i, j, t] == w[16 * i + TILE_ROW[t], 16 * j + TILE_COL[t]]
    assert torch.equal(sequences_to_weight(sequences), w)


@pytest.mark.parametrize("shape", [(8, 16), (16, 17), (16,), (1, 16, 16)])
def test_not_tileable(shape):
    with pytest.raises(ValueError, match="multiples of 16.*unquantized"):
        weight_to_sequences(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 256), (1, 1, 255)])
def test_not_sequences(shape):
    with pytest.raises(ValueError, match=r"not \[n/16, k/16, 256\].*reshape"):
        sequences_to_weight(torch.zeros(shape))
