# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ, on one side and on both, against its definition with a rounding that is easy to follow."""

import pytest
import torch

from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.rounding.ldl import feedback
from quip_vllm.quantizer.rounding.ldlq import BUFFER, Ldlq, block_ldlq, two_sided_ldlq


class Nearest:
    """Rounds to integers, some rows and columns at a time."""

    rms = 1.0

    def __init__(self, columns=8, rows=1):
        self.columns, self.rows = columns, rows

    def encode(self, block):
        values = (block + 0.5).floor()
        tiles = values.view(-1, self.rows, self.columns)
        return values, {"codes": tiles.flatten(1).to(torch.int16)}

    def constants(self):
        return {}


def test_block_ldlq_is_its_definition():
    k = BUFFER + 40  # two buffers, the last one short
    draw = torch.Generator().manual_seed(0)
    weight = 4 * torch.randn(5, k, generator=draw, dtype=torch.float64)
    blocks = torch.arange(k) // 8
    factor = 0.05 * torch.randn(k, k, generator=draw, dtype=torch.float64)
    factor[blocks[:, None] <= blocks[None, :]] = 0.0
    rounded = block_ldlq(weight, factor, Nearest())
    expected = torch.zeros_like(weight)
    for start in range(k - 8, -1, -8):
        here = slice(start, start + 8)
        seen = weight[:, here] + (weight - expected)[:, start + 8 :] @ factor[start + 8 :, here]
        expected[:, here] = (seen + 0.5).floor()
    assert torch.equal(rounded.values, expected)
    assert torch.equal(rounded.codes["codes"], expected.to(torch.int16))
    assert not torch.equal(expected, weight.round())


def test_a_curvature_is_factored_once_per_number_of_columns(monkeypatch):
    asked = []

    def recording(hessian, columns):
        asked.append(columns)
        return torch.zeros_like(hessian), 0.5

    monkeypatch.setattr("quip_vllm.quantizer.rounding.ldlq.feedback", recording)
    rounding = Ldlq(torch.eye(16))
    for _ in range(2):
        assert torch.equal(rounding.round(torch.full((3, 16), 1.2), Nearest()).values, torch.ones(3, 16))
    assert asked == [8] and rounding.damping_added == 0.5


def test_two_sides_of_the_published_example():
    """Proxy losses of W, and the rounded weights: nearest 1.411, one side 1.451, two sides .811."""
    weight = torch.tensor([[0.4, 1.6, -0.3], [0.7, -0.45, 2.2]])
    inputs = torch.tensor([[2, 1, 0.5], [1, 2, 1], [0.5, 1, 2]])
    outputs = torch.tensor([[1, 0.6], [0.6, 1]])
    rounding = Ldlq(inputs)
    one = rounding.round(weight, Nearest(1)).values
    both = rounding.round(weight, Nearest(1), outputs).values
    assert one.tolist() == [[1, 1, 0], [1, 0, 2]] and both.tolist() == [[0, 1, 0], [1, 0, 2]]
    losses = [Curvature(inputs, outputs).energies(weight - found).sum() for found in (weight.round(), one, both)]
    assert [round(float(loss), 3) for loss in losses] == [1.411, 1.451, 0.811]


def exact(*shape, seed, largest=64):
    """Multiples of 1/64, of which sums of products are exact in float32."""
    return torch.randint(-largest, largest, shape, generator=torch.Generator().manual_seed(seed)) / 64


def strictly_lower(size, block, seed):
    blocks = torch.arange(size) // block
    return exact(size, size, seed=seed, largest=8).masked_fill(blocks[:, None] <= blocks[None, :], 0.0)


@pytest.mark.parametrize("tile", [(1, 8), (4, 4), (2, 1)])
def test_two_sides_are_their_definition(tile):
    """Tile by tile from the bottom right corner, in another order than by diagonals."""
    (r, g), (n, k) = tile, (12, 24)
    weight, inputs, outputs = 3 * exact(n, k, seed=0), strictly_lower(k, g, 1), strictly_lower(n, r, 2)
    expected = torch.zeros_like(weight)
    error = torch.zeros_like(weight)
    for right in range(k - g, -1, -g):
        for top in range(n - r, -1, -r):
            target = weight + outputs.T @ error @ inputs + outputs.T @ error + error @ inputs
            here = slice(top, top + r), slice(right, right + g)
            expected[here] = (target[here] + 0.5).floor()
            error[here] = weight[here] - expected[here]
    found = two_sided_ldlq(weight, inputs, outputs, Nearest(g, r))
    assert torch.equal(found.values, expected)
    tiles = expected.view(n // r, r, k // g, g).permute(0, 2, 1, 3)
    assert torch.equal(found.codes["codes"], tiles.reshape(n // r, -1).to(torch.int16))
    alone = block_ldlq(weight, inputs, Nearest(g, r))
    assert not torch.equal(expected, alone.values)
    without = two_sided_ldlq(weight, inputs, torch.zeros(n, n), Nearest(g, r))
    assert torch.equal(without.values, alone.values)
    if r == 1:  # else the codes of `block_ldlq` are of all rows
        assert torch.equal(without.codes["codes"], alone.codes["codes"])


def test_two_sides_of_a_transposed_weight():
    weight, inputs, outputs = 3 * exact(12, 24, seed=3), strictly_lower(24, 4, 4), strictly_lower(12, 3, 5)
    found = two_sided_ldlq(weight, inputs, outputs, Nearest(4, 3)).values
    assert torch.equal(two_sided_ldlq(weight.T.contiguous(), outputs, inputs, Nearest(3, 4)).values, found.T)
    columns_alone = two_sided_ldlq(weight, torch.zeros(24, 24), outputs, Nearest(4, 3)).values
    assert torch.equal(columns_alone, block_ldlq(weight.T.contiguous(), outputs, Nearest(3)).values.T)


@pytest.mark.parametrize(("block", "gain"), [(1, 0.5), (8, 0.93)])
def test_two_sides_beat_one(block, gain):
    """On correlated inputs and outputs; 0.41 and 0.88 are seen."""

    def correlated(share, size):
        index = torch.arange(size)
        return share ** (index[:, None] - index).abs().float()

    inputs, outputs = correlated(0.9, 48), correlated(0.8, 32)
    factors = feedback(inputs, block)[0], feedback(outputs, block)[0]
    losses = torch.zeros(2)
    for seed in range(4):
        weight = 3 * torch.randn(32, 48, generator=torch.Generator().manual_seed(seed))
        one = block_ldlq(weight, factors[0], Nearest(block, block)).values
        both = two_sided_ldlq(weight, *factors, Nearest(block, block)).values
        losses += torch.stack([Curvature(inputs, outputs).energies(weight - found).sum() for found in (one, both)])
    assert losses[1] < gain * losses[0]
