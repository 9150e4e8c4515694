# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ against its definition with a rounding that is easy to follow."""

import torch

from quip_vllm.quantizer.rounding import BUFFER, block_ldlq, proxy_loss


class Nearest:
    """Rounds to integers, 8 columns at a time."""

    columns = 8
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


def test_proxy_loss():
    weight = torch.tensor([[3.0, 4.0]])
    hessian = torch.diag(torch.tensor([1.0, 0.25]))
    assert proxy_loss(weight, weight, hessian) == 0.0
    assert proxy_loss(weight, torch.zeros(1, 2), hessian) == 1.0
    assert proxy_loss(weight, torch.tensor([[3.0, 2.0]]), hessian) == 1.0 / 13.0
    assert proxy_loss(torch.zeros(1, 2), torch.zeros(1, 2), hessian) == 0.0
