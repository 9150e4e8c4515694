# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ against its definition with a rounding that is easy to follow."""

import pytest
import torch

from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.rounding.ldlq import BUFFER, Ldlq, block_ldlq


class Nearest:
    """Rounds to integers, 8 columns at a time."""

    columns, rows = 8, 1
    rms = 1.0

    def encode(self, block):
        return block.round(), {"codes": block.round().to(torch.int16)}

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
        expected[:, here] = seen.round()
    assert torch.equal(rounded.values, expected)
    assert torch.equal(rounded.codes["codes"], expected.to(torch.int16))
    assert not torch.equal(expected, weight.round())


def test_a_curvature_is_factored_once_per_number_of_columns(monkeypatch):
    asked = []

    def recording(hessian, columns):
        asked.append(columns)
        return torch.zeros_like(hessian), 0.5

    monkeypatch.setattr("quip_vllm.quantizer.rounding.ldlq.feedback", recording)
    rounding = Ldlq(Curvature(torch.eye(16)))
    for _ in range(2):
        assert torch.equal(rounding.round(torch.full((3, 16), 1.2), Nearest()).values, torch.ones(3, 16))
    assert asked == [8] and rounding.damping_added == 0.5


def test_an_output_side_is_refused():
    with pytest.raises(ValueError, match="LDLQ rounds under that of the inputs alone"):
        Ldlq(Curvature(torch.eye(8), torch.eye(4)))
