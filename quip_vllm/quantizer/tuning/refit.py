# SPDX-License-Identifier: Apache-2.0
"""su and sv in closed form: least squares under the Hessian under which the codes were found.

A layer is diag(sv) A diag(su), with A = U_n What U_k^T of its codes. With H the Hessian of its input, D that of its
outputs (or 1) and V the weight that was wanted, tr(D E H E^T), E = V - diag(sv) A diag(su), is quadratic in sv and in
su. So each of the two has an optimum given the other, and alternating between them can only lower it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quip_vllm.formats.tensors import SU

ROUNDS = 2
"""How often su is solved for. A third round changed the loss of no layer of SmolLM2-135M by a thousandth."""
TINY = 1e-30
"""An energy is taken to be at least that where it divides."""


@dataclass
class Fit:
    """One layer of a group that shares su.

    Attributes:
        turned: float32 [n, k], U_n What U_k^T of the codes.
        wanted: float32 [n, k], the weight in whose place it stands.
        sv: float32 [n], of the layer so far; `refit` changes it.
        outputs: float32 [n, n], positive definite, the Hessian of the outputs; None where all count the same.
    """

    turned: Tensor
    wanted: Tensor
    sv: Tensor
    outputs: Tensor | None = None

    def weighed(self, matrix: Tensor) -> Tensor:
        """D times a matrix [n, k]."""
        return matrix if self.outputs is None else self.outputs @ matrix


def refit(hessian: Tensor, layers: Sequence[Fit], su: Tensor, dtype: torch.dtype = SU.dtypes[0]) -> Tensor:
    """Fits the vectors of the layers that read one activation, of which each has an equal say in su.

    A layer's say is its proxy loss, the share of its output's energy that is lost. Rows and columns whose codes are all
    zero keep their element.

    Args:
        hessian: float32 [k, k] of the activation, positive definite.
        layers: of the group; their `sv` is replaced.
        su: float32 [k], which all share.
        dtype: of the vectors as they are stored; the results are rounded to it.

    Returns:
        su, float32 [k].
    """
    products = [layer.weighed(layer.wanted @ hessian) for layer in layers]
    for _ in range(ROUNDS):
        for layer, product in zip(layers, products, strict=True):
            layer.sv = _best_sv(hessian, layer, product, su)
        su = _rounded(_best_su(hessian, layers, products, su), dtype)
    for layer, product in zip(layers, products, strict=True):
        layer.sv = _rounded(_best_sv(hessian, layer, product, su), dtype)
    return su


def refit_rows(hessian: Tensor, wanted: Tensor, values: Tensor, sv: Tensor, dtype: torch.dtype) -> Tensor:
    """Fits sv of rows that are not mixed to their codes, each by itself.

    Args:
        hessian: float32 [k, k] of the inputs, rotated.
        wanted: float32 [n, k], the rows in units of the code.
        values: float32 [n, k], what their codes stand for.
        sv: float32 [n], the rows' scales as they are stored; changed, but where it is 0 or all values are.
        dtype: in which it is stored.

    Returns:
        The values in the old units, float32 [n, k].
    """
    weighed = values @ hessian
    share = (weighed * wanted).sum(1) / (weighed * values).sum(1)
    fitted = _rounded(sv * share, dtype)
    share = fitted / sv
    kept = share.isfinite()
    sv.copy_(torch.where(kept, fitted, sv))
    return values * torch.where(kept, share, 1.0)[:, None]


def lost(hessian: Tensor, layer: Fit, su: Tensor) -> float:
    """What the layer loses: tr(D E H E^T), E the difference of what is wanted and what is served."""
    error = layer.wanted - layer.sv[:, None] * layer.turned * su
    return _total(layer.weighed(error @ hessian) * error)


def _best_sv(hessian: Tensor, layer: Fit, product: Tensor, su: Tensor) -> Tensor:
    """The optimum given su, of (D o B H B^T) sv = diag(D V H B^T), B = A diag(su); `product` is D V H."""
    served = layer.turned * su
    right = (product * served).sum(1, dtype=torch.float64)
    if layer.outputs is not None:
        return _solved((served @ hessian @ served.T).double() * layer.outputs, right, layer.sv).float()
    diagonal = (served @ hessian * served).sum(1, dtype=torch.float64)
    return torch.where(diagonal > 0, right / diagonal, layer.sv.double()).float()


def _best_su(hessian: Tensor, layers: Sequence[Fit], products: Sequence[Tensor], su: Tensor) -> Tensor:
    """The optimum given every sv, of (C^T D C o H) su = diag(C^T D V H), summed over the layers, C = diag(sv) A."""
    matrix = torch.zeros_like(hessian, dtype=torch.float64)
    right = torch.zeros_like(su, dtype=torch.float64)
    for layer, product in zip(layers, products, strict=True):
        energy = max(_total(product * layer.wanted), TINY)
        scaled = layer.sv[:, None] * layer.turned
        matrix += (scaled.T @ layer.weighed(scaled)) / energy
        right += (scaled * product).sum(0, dtype=torch.float64) / energy
    return _solved(matrix.mul_(hessian), right, su)


def _solved(matrix: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """The solution of a system, float64; where it has a row of zeros, the old one."""
    zero = matrix.diagonal() == 0
    matrix.diagonal()[zero] = 1.0
    return torch.linalg.solve(matrix, torch.where(zero, old.double(), right))


def _rounded(vector: Tensor, dtype: torch.dtype = SU.dtypes[0]) -> Tensor:
    return vector.to(dtype).float()


def _total(matrix: Tensor) -> float:
    return float(matrix.sum(dtype=torch.float64))
