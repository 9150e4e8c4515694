# SPDX-License-Identifier: Apache-2.0
"""Hessians E[x x^T] of the linear layers of one decoder layer, one for each distinct activation."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Linear layers that read the same activation.

    Attributes:
        names: their names inside the decoder layer, in module order.
        hessian: float64 [k, k], sum of x x^T.
        tokens: how many x it holds.
    """

    names: list[str]
    hessian: Tensor
    tokens: int = 0
    _latest: Tensor | None = field(default=None, repr=False)


class HessianCollector:
    """Hooks that accumulate Hessians while the decoder layer runs; remove with ``close``."""

    def __init__(self, linears: dict[str, nn.Linear]):
        self.groups: list[Group] = []
        self._seen: dict[str, Group] = {}
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._record(name, args[0]))
            for name, module in linears.items()
        ]

    def _record(self, name: str, x: Tensor) -> None:
        group = self._seen.get(name)
        if group is None:
            group = next((g for g in self.groups if g._latest is x), None)
            if group is None:
                k = x.shape[-1]
                group = Group([], torch.zeros(k, k, dtype=torch.float64, device=x.device))
                self.groups.append(group)
            group.names.append(name)
            self._seen[name] = group
        if group.names[0] == name:  # one product for all its readers
            rows = x.reshape(-1, x.shape[-1]).float()
            group.hessian += (rows.T @ rows).double()
            group.tokens += rows.shape[0]
            group._latest = x

    def close(self) -> list[Group]:
        """Removes the hooks and returns the groups."""
        for handle in self._handles:
            handle.remove()
        for group in self.groups:
            group._latest = None
        return self.groups


def regularise(hessian: Tensor, tokens: int, damping: float) -> tuple[Tensor, Tensor]:
    """Makes a sum of x x^T fit for a factorisation.

    Args:
        hessian: float64 [k, k].
        tokens: how many x it sums.
        damping: share of the mean diagonal that is added to it.

    Returns:
        (float32 [k, k] with unit mean diagonal plus damping, bool [k]: columns no activation ever touched).

    Raises:
        ValueError: it holds a NaN or an infinity.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(
            "the activations hold a NaN or an infinity: check the model's weights and the calibration text"
        )
    mean = hessian / max(tokens, 1)
    diagonal = mean.diagonal()
    dead = diagonal <= 0
    live_mean = diagonal[~dead].mean() if (~dead).any() else torch.ones((), dtype=mean.dtype)
    mean = mean / live_mean
    mean.diagonal()[dead] = 1.0
    mean.diagonal().add_(damping)
    return mean.float(), dead
