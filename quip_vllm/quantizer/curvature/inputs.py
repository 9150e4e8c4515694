# SPDX-License-Identifier: Apache-2.0
"""Hessians E[x x^T]: one per activation, shared by the linear layers that read it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quip_vllm.quantizer.curvature.drift import Drift
from quip_vllm.quantizer.source.mixture import Mixture


@dataclass
class Inputs:
    """What is known of the activation x that a group of linear layers reads.

    Attributes:
        names: full module names of the layers, in module order.
        hessian: float64 [k, k], sum of x x^T, x as the layers quantized so far make it, times the token's weight.
        tokens: number of x in the sum.
        drift: how x differs from the same activation in the original model; empty if that was not recorded.
        borrowed: for how many tokens more the mean over all experts of the layer is in the sum; see `fill_up`.
    """

    names: list[str]
    hessian: Tensor
    tokens: int = 0
    drift: Drift = field(default_factory=Drift)
    borrowed: int = 0

    @classmethod
    def of(cls, name: str, k: int, device: torch.device | None = None) -> "Inputs":
        """Of one layer with k inputs, before the first x, which will be on the device."""
        return cls([name], torch.zeros(k, k, dtype=torch.float64, device=device))

    def on(self, device: torch.device) -> "Inputs":
        """The same with its sums on a device."""
        return replace(self, hessian=self.hessian.to(device), drift=self.drift.on(device))

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch, [..., k]: the product in float32, the sum in float64.

        Args:
            x: the batch.
            weights: float32 [tokens], 1 in the mean of all batches. None counts each token once.
        """
        rows = x.reshape(-1, x.shape[-1])
        self.hessian += gram(rows.float() if weights is None else rows.float() * weights.sqrt()[:, None])
        self.tokens += rows.shape[0]

    def unit(self) -> Tensor:
        """What the Hessian is divided by for a mean diagonal of 1 over the inputs that were ever different from 0."""
        live = self.hessian.diagonal()[self.hessian.diagonal() > 0]
        return live.mean() if len(live) else torch.tensor(float(max(self.tokens, 1)), dtype=self.hessian.dtype)

    def regularised(self, damping: float) -> tuple[Tensor, Tensor]:
        """The Hessian made fit for a factorisation.

        Args:
            damping: share of the mean diagonal that is added to the diagonal.

        Returns:
            (float32 [k, k] with unit mean diagonal, damping added; bool [k]: the inputs that were always 0).

        Raises:
            ValueError: an activation was a NaN or an infinity.
        """
        if not torch.isfinite(self.hessian).all():
            raise ValueError(
                "the activations hold a NaN or an infinity: check the model's weights and the calibration text"
            )
        mean = self.hessian / self.unit()
        dead = mean.diagonal() <= 0
        mean.diagonal()[dead] = 1.0
        mean.diagonal().add_(damping)
        return mean.float(), dead


def gram(x: Tensor, block: int = 256) -> Tensor:
    """x^T x of float32 [tokens, k]. Blocks above the diagonal are copied, which saves up to half of the time."""
    product = torch.empty(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for begin in range(0, x.shape[1], block):
        end = begin + block
        torch.mm(x[:, begin:end].T, x[:, :end], out=product[begin:end, :end])
        product[:begin, begin:end] = product[begin:end, :begin].T
    return product


def fill_up(groups: list[Inputs], mixtures: Iterable[Mixture]) -> list[Inputs]:
    """Gives each expert that saw fewer tokens than it has inputs, so many more of the mean over all experts.

    Its own Hessian would be singular.

    Args:
        groups: of a decoder layer.
        mixtures: of the same layer.

    Returns:
        The groups, and behind them those of the experts that saw no token at all.
    """
    known = {group.names[0]: group for group in groups}
    for readers in (readers for mixture in mixtures for readers in mixture.readers):
        seen = [known[names[0]] for names in readers if names[0] in known]
        if seen:  # else the experts keep their weights
            mean = sum((group.hessian for group in seen[1:]), seen[0].hessian) / sum(group.tokens for group in seen)
            missing = [Inputs([*names], torch.zeros_like(mean)) for names in readers if names[0] not in known]
            for group in (*seen, *missing):
                group.borrowed = max(0, len(mean) - group.tokens)
                group.hessian += group.borrowed * mean
            groups = groups + missing
    return groups
