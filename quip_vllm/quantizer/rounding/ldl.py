# SPDX-License-Identifier: Apache-2.0
"""Block LDL factor of a Hessian: the linear feedback of LDLQ (QuIP#, arXiv 2402.04396, section 4.1)."""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
DAMPING_STEPS = 6


def feedback(hessian: Tensor, block: int) -> tuple[Tensor, float]:
    """Factors H = (L + I) D (L + I)^T, D block diagonal.

    Where the Cholesky factorisation fails, 1 %, then 10 %, ... of the mean diagonal is added, and said.

    Args:
        hessian: float32 [k, k], symmetric.
        block: columns rounded together; divides k.

    Returns:
        (L float32 [k, k], strictly lower block triangular; the damping that was added).

    Raises:
        ValueError: it cannot be factored at any damping.
    """
    k = hessian.shape[0]
    mean = float(hessian.diagonal().mean())
    added = 0.0
    for attempt in range(DAMPING_STEPS):
        damped = hessian.double() + added * torch.eye(k, dtype=torch.float64, device=hessian.device)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
        added = 0.01 * 10**attempt * mean
        logger.warning(
            "the Hessian is not positive definite: damping raised by %.3g of its mean diagonal", added / mean
        )
    else:
        raise ValueError(
            f"a {k} x {k} Hessian has no Cholesky factor at damping {added:.3g}: check the calibration text"
        )
    diagonal = torch.stack([lower[i : i + block, i : i + block] for i in range(0, k, block)])
    identity = torch.eye(block, dtype=torch.float64, device=hessian.device)
    inverse = torch.linalg.solve_triangular(diagonal, identity.expand_as(diagonal), upper=False)
    factor = torch.einsum("nbi,bij->nbj", lower.view(k, k // block, block), inverse).reshape(k, k)
    rows = torch.arange(k, device=hessian.device) // block
    factor[rows[:, None] <= rows[None, :]] = 0.0
    return factor.float(), added
