# SPDX-License-Identifier: Apache-2.0
"""Drift: how a layer's input x differs from x0, the same activation in the original model, and weights that mend it.

The weights that come nearest to W x0 on x are argmin_V E|W x0 - V x|^2 = W + W E[(x0 - x) x^T] H^-1, with H = E[x x^T]
(GPTAQ, arXiv 2504.02692): where a layer can, it mends the error that the quantized layers before it left.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Drift:
    """Sums over the calibration text, times the tokens' weights if they have some, in one of two forms.

    Attributes:
        difference: float64 [k, k], sum of (x0 - x) x^T; None without a batch in this form.
        crossed: replaces `difference` if the group has fewer outputs than inputs: module name -> float64 [n, k], sum
            of (W x0) x^T, which is smaller and sufficient.
    """

    difference: Tensor | None = None
    crossed: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether a batch was recorded."""
        return self.difference is not None or bool(self.crossed)

    def on(self, device: torch.device) -> "Drift":
        """The same with its sums on a device."""
        difference = None if self.difference is None else self.difference.to(device)
        return Drift(difference, {name: crossed.to(device) for name, crossed in self.crossed.items()})

    def add(
        self, original: Tensor, x: Tensor, products: Mapping[str, Tensor] | None, weights: Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            original: x0, [tokens, k].
            x: [tokens, k].
            products: module name -> W x0 [..., n] of every layer of the group; None where one is not known.
            weights: float32 [tokens]; None counts each token once.
        """
        k = x.shape[-1]
        weighted = x if weights is None else x * weights[:, None].to(x.dtype)
        if products and sum(y.shape[-1] for y in products.values()) < k:
            for name, y in products.items():
                if name not in self.crossed:
                    self.crossed[name] = torch.zeros(y.shape[-1], k, dtype=torch.float64, device=x.device)
                self.crossed[name] += y.reshape(-1, y.shape[-1]).T @ weighted
            return
        if self.difference is None:
            self.difference = torch.zeros(k, k, dtype=torch.float64, device=x.device)
        # The difference is a few percent of x: the activations' own dtype is precise enough.
        self.difference += (original - x).T @ weighted

    def correction(self, total: Tensor, unit: Tensor, hessian: Tensor) -> Callable[[str, Tensor], Tensor]:
        """f(name, W), float32 [n, k], such that W + f(name, W) on x comes nearest to W on x0.

        Args:
            total: float64 [k, k], sum of x x^T.
            unit: what `hessian` was divided by.
            hessian: float32 [k, k], damped, which keeps the correction small where little is known.
        """

        def solve(right: Tensor) -> Tensor:
            return torch.linalg.solve(hessian.double(), right.T / unit).T.float()

        if self.crossed:
            return lambda name, weight: solve(self.crossed[name] - weight.double() @ total)
        assert self.difference is not None
        share = solve(self.difference)
        return lambda _, weight: weight @ share
