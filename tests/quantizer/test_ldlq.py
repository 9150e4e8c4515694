# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ, on one side and on both, against its definition with a rounding that is easy to follow."""

import pytest
import torch

from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.rounding import ldlq
from quip_vllm.quantizer.rounding.encoders import make_encoder
from quip_vllm.quantizer.rounding.ldl import feedback
from quip_vllm.quantizer.rounding.ldlq import BUFFER, Ldlq, block_ldlq, greedy, two_sided_ldlq
from quip_vllm.quantizer.settings import GREEDY, LDLQ, NEAREST


class Nearest:
    """Rounds to integers, some rows and columns at a time."""

    rms = 1.0

    def __init__(self, columns=8, rows=1):
        self.columns, self.rows = columns, rows

    def encode(self, block):
        values = (block + 0.5).floor()
        tiles = values.view(-1, self.rows, self.columns)
        return values, {"codes": tiles.flatten(1).to(torch.int16)}

    def stored(self, codes):
        return codes


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


@pytest.mark.parametrize(
    ("tile", "block"), [((1, 8), (64, 128)), ((1, 8), (5, 16)), ((1, 1), (4, 8)), ((4, 4), (4, 8)), ((2, 1), (64, 128))]
)
def test_two_sides_are_their_definition(tile, block, monkeypatch):
    """Tile by tile from the bottom right corner, in another order than by diagonals; blocks of rows and columns."""
    monkeypatch.setattr(ldlq, "LARGE", 0)
    monkeypatch.setattr(ldlq, "BLOCK_ROWS", block[0])
    monkeypatch.setattr(ldlq, "BUFFER", block[1])
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


TOY = torch.tensor([[0.1, -0.7, 1.2, 0.35]])
TOY_HESSIAN = torch.tensor([[2, 1, 0.5, 0], [1, 2, 1, 0.5], [0.5, 1, 2, 1], [0, 0.5, 1, 2]])
TOY_END = 2.4 * float(TOY.square().mean().sqrt())  # the last level of 2 bits


@pytest.mark.parametrize(
    ("rounding", "numbers", "error"),
    [(NEAREST, [2, 1, 3, 2], 1.433571), (LDLQ, [2, 1, 2, 2], 0.589202), (GREEDY, [2, 1, 2, 2], 0.589202)],
)
def test_a_row_on_the_grid(rounding, numbers, error):
    encoder = make_encoder("grid", 2)
    units = TOY / TOY_END * 3
    rounded = Ldlq(TOY_HESSIAN, rounding).round(units, encoder)
    assert rounded.codes["numbers"].tolist() == [numbers]
    assert rounded.values.tolist() == [[2 * number - 3 for number in numbers]]
    found = Curvature(TOY_HESSIAN).energies((units - rounded.values) / 2)
    assert float(found) == pytest.approx(error, abs=2e-6)


def correlated(k, seed=3):
    x = torch.randn(3 * k, k, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x) + x[:k].mean(0).outer(x[:k].mean(0)) * k


@pytest.mark.parametrize("bits", [2, 5])
def test_columns_of_the_grid_one_by_one(bits):
    """Against the definition: floats of double precision, one row at a time, with its ends."""
    k, last = BUFFER + 24, (1 << bits) - 1
    hessian, encoder = correlated(k), make_encoder("grid", bits)
    units = 1.5 * encoder.rms * torch.randn(3, k, generator=torch.Generator().manual_seed(4))
    found = Ldlq(hessian).round(units, encoder).codes["numbers"]
    lower = torch.linalg.cholesky(hessian.double())
    factor = lower / lower.diagonal()
    wanted = (units.double() + last) / 2
    expected = torch.zeros_like(wanted)
    for j in range(k - 1, -1, -1):
        fed = (wanted[:, j + 1 :] - expected[:, j + 1 :]) @ factor[j + 1 :, j]
        expected[:, j] = (wanted[:, j] + fed + 0.5).floor().clamp(0, last)
    assert (expected == 0).any() and (expected == last).any()
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("start", [NEAREST, LDLQ])
def test_greedy_passes_end_where_no_weight_alone_can_do_better(start, monkeypatch):
    monkeypatch.setattr(ldlq, "PASSES", 100)
    k, last = BUFFER + 24, 7
    hessian, encoder = correlated(k), make_encoder("grid", 3)
    units = encoder.rms * torch.randn(3, k, generator=torch.Generator().manual_seed(5))
    begun = Ldlq(hessian, start).round(units, encoder)
    before = Curvature(hessian).energies(units - begun.values)
    found = greedy(units, hessian, begun, encoder)
    after = Curvature(hessian).energies(units - found.values)
    assert (after < before).all()
    numbers = found.codes["numbers"].int()
    assert torch.equal(found.values, 2.0 * numbers - last)
    for step in (-1, 1):
        for j in range(k):
            other = numbers.clone()
            other[:, j] = (other[:, j] + step).clamp(0, last)
            energies = Curvature(hessian).energies(units - (2.0 * other - last))
            assert (energies >= after * (1 - 1e-6)).all()


def test_one_greedy_pass_is_its_definition(monkeypatch):
    monkeypatch.setattr(ldlq, "PASSES", 1)
    k, last = 40, 3
    hessian, encoder = correlated(k), make_encoder("grid", 2)
    units = encoder.rms * torch.randn(2, k, generator=torch.Generator().manual_seed(6))
    begun = Ldlq(hessian, NEAREST).round(units, encoder)
    wanted, expected = (units.double() + last) / 2, begun.codes["numbers"].double()
    for j in range(k - 1, -1, -1):
        moved = expected[:, j] - (expected - wanted) @ hessian[:, j].double() / float(hessian[j, j])
        expected[:, j] = moved.round().clamp(0, last)
    assert torch.equal(greedy(units, hessian, begun, encoder).codes["numbers"].double(), expected)


def test_two_sides_on_the_grid():
    """Every tile is one weight: with O^T E I + O^T E + E I against the definition, element by element."""
    n, k, last = 12, 20, 7
    encoder, inputs, outputs = make_encoder("grid", 3), correlated(k), correlated(n, seed=8)
    units = encoder.rms * torch.randn(n, k, generator=torch.Generator().manual_seed(7))
    found = Ldlq(inputs).round(units, encoder, outputs)
    right, below = (feedback(hessian, 1)[0].double() for hessian in (inputs, outputs))
    error = torch.zeros(n, k, dtype=torch.float64)
    expected = torch.zeros(n, k, dtype=torch.float64)
    for i in range(n - 1, -1, -1):
        for j in range(k - 1, -1, -1):
            fed = below[:, i] @ error @ right[:, j] + below[:, i] @ error[:, j] + error[i] @ right[:, j]
            expected[i, j] = ((units[i, j] + fed + last) / 2).round().clamp(0, last)
            error[i, j] = units[i, j] - (2 * expected[i, j] - last)
    assert torch.equal(found.codes["numbers"].double(), expected)
    assert not torch.equal(found.values, Ldlq(inputs).round(units, encoder).values)
