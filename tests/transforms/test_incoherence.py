# SPDX-License-Identifier: Apache-2.0
"""Rotation of weights and Hessians against dense matrix products, and against what serving computes."""

import pytest
import torch
from numerics import FLOAT64_TRANSFORM, relative

from quip_vllm.transforms.hadamard import hadamard
from quip_vllm.transforms.incoherence import random_signs, rotate_hessian, rotate_weight, unrotate_weight

# (n, k, block): both base matrices asymmetric, one size a power of two, and blocks that differ between the sides.
CASES = [(40, 48, None), (12, 64, None), (40, 48, 8), (24, 20, 128)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def dense(n, block, chunks=1):
    """U: its columns are the images of the unit vectors, and of each chunk it has one of these."""
    one = hadamard(torch.eye(n // chunks, dtype=torch.float64), block).T
    return torch.block_diag(*[one] * chunks)


@pytest.mark.parametrize(
    ("n", "k", "block", "chunks"), [*((*case, (1, 1)) for case in CASES), (40, 48, None, (2, 4)), (36, 40, 8, (3, 1))]
)
def test_rotations_equal_dense_products(n, k, block, chunks):
    w, su, sv = random(n, k), random_signs(k, generator(1)), random_signs(n, generator(2))
    h = random(k, k)
    u_out, u_in = dense(n, block, chunks[0]), dense(k, block, chunks[1])
    d_out, d_in = torch.diag(sv.double()), torch.diag(su.double())
    assert (
        relative(rotate_weight(w, su, sv, block, chunks=chunks), u_out.T @ d_out @ w @ d_in @ u_in) < FLOAT64_TRANSFORM
    )
    assert (
        relative(unrotate_weight(w, su, sv, block, chunks=chunks), d_out @ u_out @ w @ u_in.T @ d_in)
        < FLOAT64_TRANSFORM
    )
    assert relative(rotate_hessian(h, su, block, chunks[1]), u_in.T @ d_in @ h @ d_in @ u_in) < FLOAT64_TRANSFORM


@pytest.mark.parametrize(("n", "k", "block"), [(13, 48, None), (1, 64, 16)])
def test_the_input_side_alone(n, k, block):
    w, su, sv = random(n, k), random_signs(k, generator(1)), random(n, seed=2)
    u_in, d_in = dense(k, block), torch.diag(su.double())
    rotated = rotate_weight(w, su, sv, block, rotate_output=False)
    assert relative(rotated, torch.diag(sv) @ w @ d_in @ u_in) < FLOAT64_TRANSFORM
    assert relative(unrotate_weight(rotated, su, 1 / sv, block, rotate_output=False), w) < FLOAT64_TRANSFORM


@pytest.mark.parametrize(("n", "k", "block"), CASES)
def test_round_trip_with_signs(n, k, block):
    w, su, sv = random(n, k), random_signs(k, generator(1)), random_signs(n, generator(2))
    wr = rotate_weight(w, su, sv, block)
    assert wr.dtype is torch.float64 and wr.is_contiguous()
    assert relative(unrotate_weight(wr, su, sv, block), w) < FLOAT64_TRANSFORM


@pytest.mark.parametrize(("n", "k", "block"), CASES)
def test_serving_formula_with_real_vectors(n, k, block):
    wr, su, sv, x = random(n, k), random(k, seed=1), random(n, seed=2), random(7, k, seed=3)
    served = sv * hadamard(hadamard(su * x, block, transpose=True) @ wr.T, block)
    assert relative(served, x @ unrotate_weight(wr, su, sv, block).T) < FLOAT64_TRANSFORM


@pytest.mark.parametrize("block", [None, 8])
def test_proxy_loss_is_invariant(block):
    n, k = 40, 48
    w, x = random(n, k), random(100, k, seed=3)
    h = x.T @ x
    su, sv = random_signs(k, generator(1)), random_signs(n, generator(2))
    wr, hr = rotate_weight(w, su, sv, block), rotate_hessian(h, su, block)
    loss, rotated = torch.trace(w @ h @ w.T), torch.trace(wr @ hr @ wr.T)
    assert abs(rotated / loss - 1).item() < FLOAT64_TRANSFORM


def test_spike_is_spread():
    w = torch.zeros(64, 64)
    w[3, 5] = 1
    signs = torch.ones(64)
    assert torch.equal(rotate_weight(w, signs, signs).abs(), torch.full((64, 64), 1 / 64))


def test_random_signs():
    signs = random_signs(4096, generator(5))
    assert signs.dtype is torch.float32 and set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 0.1
    assert torch.equal(signs, random_signs(4096, generator(5)))
    assert not torch.equal(signs, random_signs(4096, generator(6)))


def test_mismatched_vectors():
    w = torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r"\[8, 16\] with su \[8\] and sv \[16\].*which side"):
        rotate_weight(w, torch.ones(8), torch.ones(16))
    with pytest.raises(ValueError, match="which side"):
        unrotate_weight(w, torch.ones(16), torch.ones(1))
    with pytest.raises(ValueError, match="which side"):
        rotate_hessian(w, torch.ones(16))
