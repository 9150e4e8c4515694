# SPDX-License-Identifier: Apache-2.0
"""Curvature: one Hessian per activation, the drift between two runs, what is regularised and what it costs."""

import numerics
import pytest
import torch
from torch import nn

from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.curvature.drift import Drift
from quip_vllm.quantizer.curvature.inputs import Inputs, gram


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q", "k", "gate", "up", "unused"):
            setattr(self, name, nn.Linear(8, 8, bias=False))
        self.down = nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.q(x) * self.k(x)
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


@torch.no_grad()
def test_groups_are_the_readers_of_one_activation():
    block = Block()
    collector = Collector({name: module for name, module in block.named_modules() if name})
    batches = [torch.randn(3, 5, 8), torch.randn(1, 5, 8)]
    for x in batches:
        block(x)
    groups = collector.close()
    assert [group.names for group in groups] == [["q", "k"], ["gate", "up"], ["down"]]
    assert [group.tokens for group in groups] == [20, 20, 20]
    rows = torch.cat([x.reshape(-1, 8) for x in batches]).double()
    torch.testing.assert_close(groups[0].hessian, rows.T @ rows, rtol=numerics.FLOAT32_SUMS, atol=numerics.FLOAT32_SUMS)
    before = groups[0].hessian.clone()
    block(batches[0])  # the hooks are gone
    assert torch.equal(groups[0].hessian, before) and groups[0].tokens == 20


@pytest.mark.parametrize("k", [1, 256, 700])
def test_gram(k):
    x = torch.randn(20, k)
    found = gram(x)
    torch.testing.assert_close(
        found.double(), x.double().T @ x.double(), rtol=numerics.FLOAT32_SUMS, atol=numerics.FLOAT32_SUMS
    )
    assert torch.equal(found[:, -1], found[-1])


@torch.no_grad()
def test_drift_is_between_the_two_runs():
    block = Block()
    collector = Collector({"down": block.down, "q": block.q})
    pairs = [(torch.randn(2, 5, 8), torch.randn(2, 5, 8)) for _ in range(2)]
    for x0, x in pairs:
        with collector.original():
            block(x0)
        with collector.inputs():
            block(x)
    q = next(group for group in collector.close() if group.names == ["q"])
    x0, x = (torch.cat(side).reshape(-1, 8).double() for side in zip(*pairs, strict=True))
    torch.testing.assert_close(
        q.drift.difference, (x0 - x).T @ x, rtol=numerics.FLOAT32_SUMS, atol=numerics.FLOAT32_SUMS
    )
    assert q.tokens == 20


@torch.no_grad()
@pytest.mark.parametrize("twice", [False, True])
def test_a_pass_ends_with_the_last_input_unless_a_linear_reads_twice(twice):
    block, x = Block(), torch.randn(2, 5, 8)
    collector = Collector({"down": block.down, "q": block.q})
    outputs = []
    block.down.register_forward_hook(lambda *_: outputs.append(True))

    def run():
        block(x)
        if twice:
            block.q(x)

    with collector.original():
        run()
    with collector.inputs():
        run()
    assert len(outputs) == 1 + twice
    assert {group.names[0]: group.tokens for group in collector.close()} == {"q": 10 + 10 * twice, "down": 10}


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_layers_of_few_outputs_are_crossed(biased):
    """Both readers of x have fewer outputs together than x has inputs; with a third they have not."""
    layers = nn.ModuleDict({name: nn.Linear(8, n, bias=biased) for name, n in (("a", 3), ("b", 4), ("c", 2))})
    pairs = [(torch.randn(2, 5, 8), torch.randn(2, 5, 8)) for _ in range(2)]
    x0, x = (torch.cat(side).reshape(-1, 8).double() for side in zip(*pairs, strict=True))
    for names in (["a", "b"], ["a", "b", "c"]):
        collector = Collector({name: layers[name] for name in names})
        for original, own in pairs:
            with collector.original():
                [layers[name](original) for name in names]
            with collector.inputs():
                [layers[name](own) for name in names]
        (group,) = collector.close()
        assert group.names == names and group.tokens == 20
        few = len(names) == 2
        assert (group.drift.difference is None) == few and set(group.drift.crossed) == set(names if few else [])
        for name, crossed in group.drift.crossed.items():
            want = (x0 @ layers[name].weight.T.double()).T @ x
            torch.testing.assert_close(crossed, want, rtol=numerics.FLOAT32_SUMS, atol=numerics.FLOAT32_SUMS)


def test_drift_correction_is_the_least_squares_answer():
    x0 = torch.randn(500, 6, dtype=torch.float64)
    x = x0 @ torch.randn(6, 6, dtype=torch.float64) + 0.1 * torch.randn(500, 6, dtype=torch.float64)
    weight = torch.randn(3, 6)
    group = Inputs(["a"], x.T @ x, 500)
    hessian, _ = group.regularised(damping=0.0)
    best = torch.linalg.lstsq(x, x0 @ weight.T.double()).solution.T
    for drift in (Drift((x0 - x).T @ x), Drift(None, {"a": (x0 @ weight.T.double()).T @ x})):
        found = weight + drift.correction(group.hessian, group.unit(), hessian)("a", weight)
        torch.testing.assert_close(found.double(), best, rtol=numerics.LEAST_SQUARES, atol=numerics.LEAST_SQUARES)


def test_regularised():
    total = torch.diag(torch.tensor([2.0, 0.0, 6.0], dtype=torch.float64))
    total[0, 2] = total[2, 0] = 1.0
    fit, dead = Inputs(["a"], total, tokens=2).regularised(damping=0.01)
    assert dead.tolist() == [False, True, False]
    expected = torch.tensor([[0.51, 0.0, 0.25], [0.0, 1.01, 0.0], [0.25, 0.0, 1.51]])
    torch.testing.assert_close(fit, expected, rtol=0, atol=numerics.FLOAT32_STEP)


def test_regularised_without_a_token():
    fit, dead = Inputs.of("a", 4).regularised(damping=0.01)
    assert dead.all()
    torch.testing.assert_close(fit, 1.01 * torch.eye(4))


def test_nan_activations():
    with pytest.raises(ValueError, match="activations hold a NaN or an infinity"):
        Inputs(["a"], torch.full((4, 4), float("nan"), dtype=torch.float64), 4).regularised(0.01)


def test_energies_are_the_trace_by_rows():
    inputs, outputs, error = torch.diag(torch.tensor([1.0, 0.25])), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2)
    assert Curvature(inputs).energies(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist() == [13.0, 1.0]
    assert Curvature(inputs, outputs).energies(error).sum() == torch.trace(outputs @ error @ inputs @ error.T)
