# SPDX-License-Identifier: Apache-2.0
"""The orthonormal Hadamard transform of any size n = q * 2^p, whole or in power-of-two blocks.

Full width (the transform of QuIP#, arXiv 2402.04396): U_n = (H_q kron S_p) / sqrt(n), where S_p is the Sylvester matrix
of size p, a power of two, and H_q the matrix of `hadamard_matrices`. Element a * p + b has slow index a in 0..q-1 and
fast index b in 0..p-1. H_q is not symmetric, hence neither is U_n: inputs are rotated by U^T, outputs by U.

Blockwise: S_b / sqrt(b) on each contiguous run of b elements; symmetric, and no block crosses a tensor-parallel shard.
"""

import functools
import itertools
import math
from collections.abc import Iterable

import torch

from quip_vllm.transforms.hadamard_matrices import EXTRA_ORDERS, PUBLISHED_ORDERS, hadamard_matrix

ORDERS = (1, *PUBLISHED_ORDERS, *EXTRA_ORDERS)
"""Those of the matrices H_q, in the order in which they are tried."""
LARGEST = 180
"""Rows of the matrices H_q that a size may be filled up for."""


def factor(n: int) -> tuple[int, int]:
    """Splits a size into the two factors of the full-width transform.

    Args:
        n: number of elements, at least 1.

    Returns:
        (q, p) with n = q * p, p a power of two, and q = 1 or the first of PUBLISHED_ORDERS, then EXTRA_ORDERS, whose
        quotient is a power of two.

    Raises:
        ValueError: if there is no such pair.
    """
    if n < 1:
        raise ValueError(f"Hadamard size {n} is not positive: give the length of the dimension to transform")
    order = _order(n, ORDERS)
    if order is not None:
        return order, n // order
    power = _power_of_two_part(n)
    if power == 1:
        remedy = "no power of two divides it either, so leave the layer unquantized"
    else:
        remedy = f"use --hadamard-block {power}, the largest power of two that divides it, or a smaller one"
    raise ValueError(
        f"size {n} has no full-width Hadamard transform: it has to be a power of two, or that times one of "
        f"{ORDERS[1:]}; {remedy}"
    )


def filled(n: int) -> int:
    """A size that has a full-width transform: n itself, or else the next multiple of 16 that has one.

    Matrices H_q of more than LARGEST rows, which take too long, are not used for it.
    """
    if _order(n, ORDERS):
        return n
    orders = [order for order in ORDERS if order <= LARGEST]
    return next(size for size in itertools.count(n + -n % 16, 16) if _order(size, orders))


def _order(n: int, orders: Iterable[int]) -> int | None:
    """The first of some orders that divides a size with a power of two as quotient."""
    return next((order for order in orders if n % order == 0 and _is_power_of_two(n // order)), None)


def block_size(n: int, block: int | None) -> int:
    """Returns how many consecutive elements are transformed together.

    Args:
        n: number of elements in the dimension.
        block: None for the full width, or a power of two >= 2.

    Returns:
        n for the full width, else the largest power of two that is <= block and divides n.

    Raises:
        ValueError: if block is not a power of two >= 2, or n is odd or not positive.
    """
    if block is None:
        return n
    if block < 2 or not _is_power_of_two(block):
        raise ValueError(
            f"hadamard block {block} is not a power of two of at least 2: choose for instance --hadamard-block 128, "
            "or none for the full width"
        )
    if n < 1:
        raise ValueError(f"Hadamard size {n} is not positive: give the length of the dimension to transform")
    size = min(block, _power_of_two_part(n))
    if size == 1:
        raise ValueError(
            f"size {n} cannot be cut in Hadamard blocks of {block} or less: it has to be even; use the full-width "
            "transform (no --hadamard-block) or leave the layer unquantized"
        )
    return size


def hadamard(x: torch.Tensor, block: int | None = None, transpose: bool = False, chunks: int = 1) -> torch.Tensor:
    """Applies U (or U^T) along the last dimension.

    Equivalent to `x @ U.T` (`x @ U` if transpose) with U the dense orthonormal matrix of the module docstring, in
    O(n (log p + q)) operations. Differentiable.

    Args:
        x: float32 or float64 [..., n].
        block: None for the full width, or the largest block, a power of two (see `block_size`).
        transpose: apply U^T, the inverse of U. Makes no difference where U is symmetric, as it is blockwise.
        chunks: how many equal runs of the dimension are transformed one by one; they divide n.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: if n has no such transform, or x is neither float32 nor float64.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"hadamard of {x.dtype}: the input has to be float32 or float64; convert it with .float()")
    n = x.shape[-1]
    size = block_size(n // chunks, block)
    q, p = factor(size)
    y = _butterfly(x.reshape(x.numel() // size, q, p))
    if q > 1:
        matrix = _matrix(q, x.dtype, x.device)
        y = torch.matmul(matrix.T if transpose else matrix, y)
    return (y * (1.0 / math.sqrt(size))).reshape(x.shape)


def _butterfly(x: torch.Tensor) -> torch.Tensor:
    """Unnormalised Sylvester-Hadamard transform along the last dimension, a power of two: [..., p] -> [..., p]."""
    shape = x.shape
    half = 1
    while half < shape[-1]:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([left + right, left - right], dim=-2)
        half *= 2
    return x.reshape(shape)


@functools.cache
@torch.inference_mode(False)
def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return hadamard_matrix(order).to(device=device, dtype=dtype)


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _power_of_two_part(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n
