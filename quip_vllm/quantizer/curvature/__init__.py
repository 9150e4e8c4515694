# SPDX-License-Identifier: Apache-2.0
"""What rounding errors of a weight cost, measured while the model runs over the calibration text."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curvature:
    """The cost of an error E [n, k] of a weight: tr(E inputs E^T), or tr(outputs E inputs E^T) with an output side.

    Attributes:
        inputs: float32 [k, k], positive definite.
        outputs: float32 [n, n]; None where all outputs count the same.
    """

    inputs: Tensor
    outputs: Tensor | None = None

    def energies(self, matrix: Tensor) -> Tensor:
        """The cost of float32 [n, k], by rows: float64 [n], which add up to it."""
        weighed = matrix @ self.inputs if self.outputs is None else self.outputs @ matrix @ self.inputs
        return (weighed * matrix).sum(1, dtype=torch.float64)
