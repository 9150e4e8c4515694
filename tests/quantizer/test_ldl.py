# SPDX-License-Identifier: Apache-2.0
"""The feedback factor: H = (L + I) D (L + I)^T with D block diagonal, and the damping of a Hessian that has none."""

import logging

import numerics
import pytest
import torch

from quip_vllm.quantizer.rounding.ldl import feedback


def hessian(k, samples, seed=0):
    x = torch.randn(samples, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x.T @ x / samples).float()


@pytest.mark.parametrize("block", [8, 16])
def test_reconstructs_the_hessian(block):
    h = hessian(64, 400)
    factor, added = feedback(h, block)
    assert added == 0.0
    rows = torch.arange(64) // block
    assert not factor[rows[:, None] <= rows[None, :]].any()
    unit = factor.double() + torch.eye(64, dtype=torch.float64)
    inverse = torch.linalg.inv(unit)
    diagonal = inverse @ h.double() @ inverse.T
    diagonal[rows[:, None] != rows[None, :]] = 0.0  # what is left of D when only its blocks are kept
    again = unit @ diagonal @ unit.T
    assert torch.linalg.norm(again - h) / torch.linalg.norm(h.double()) < numerics.FACTOR


def test_white_hessian_has_no_feedback():
    factor, _ = feedback(torch.eye(32), 8)
    assert not factor.any()


def test_a_hessian_without_a_factor_is_damped_aloud(caplog):
    h = hessian(64, 400)
    values, vectors = torch.linalg.eigh(h)
    values[0] = -0.05
    broken = vectors @ torch.diag(values) @ vectors.T
    with caplog.at_level(logging.WARNING):
        factor, added = feedback(broken, 8)
    mean = float(broken.diagonal().mean())
    assert added == pytest.approx(0.1 * mean)  # 1 % is not enough, 10 % is
    assert torch.isfinite(factor).all()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "damping raised by 0.01 of its mean diagonal" in caplog.messages[0]
    assert "damping raised by 0.1 of its mean diagonal" in caplog.messages[1]


def test_hopeless_hessian():
    with pytest.raises(ValueError, match="32 x 32 Hessian has no Cholesky factor"):
        feedback(torch.full((32, 32), float("nan")), 8)
