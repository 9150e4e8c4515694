# SPDX-License-Identifier: Apache-2.0
"""Hessians E[x x^T] of the linear layers of one decoder layer, one for each distinct activation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Linear layers that read the same activation.

    Attributes:
        names: their names inside the decoder layer, in module order.
        hessian: float64 [k, k], sum of x x^T, x as the layers quantized so far make it.
        tokens: how many x it holds.
        drift: float64 [k, k], sum of (x0 - x) x^T, x0 the same activation in the original model; None if not recorded.
        crossed: in its place, where the layers have fewer outputs than inputs: name -> float64 [n, k], sum of
            (W x0) x^T, which tells as much of W and takes less.
    """

    names: list[str]
    hessian: Tensor
    tokens: int = 0
    drift: Tensor | None = None
    crossed: dict[str, Tensor] = field(default_factory=dict)
    _latest: Tensor | None = field(default=None, repr=False)


class _AllRead(Exception):
    """Ends a pass through a decoder layer whose output nobody wants."""


class HessianCollector:
    """Hooks that accumulate Hessians while the decoder layer runs; remove with ``close``.

    For the drift the layer runs twice a batch: first, inside ``with collector.original():``, on the hidden states of
    the original model, then, inside ``with collector.inputs():``, on those of the quantized layers before it.
    """

    def __init__(self, linears: dict[str, nn.Linear]):
        self.groups: list[Group] = []
        self._seen: dict[str, Group] = {}
        self._originals: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}  # W x0, of layers of few outputs
        self._count = len(linears)
        self._in_original = False
        self._calls: list[str] = []  # of a pass
        self._each_once = self._may_end = False
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._record(name, args[0]))
            for name, module in linears.items()
        ]
        self._handles += [
            module.register_forward_hook(lambda module, _, out, name=name: self._keep(name, module, out))
            for name, module in linears.items()
            if module.out_features < module.in_features
        ]

    @contextmanager
    def original(self) -> Iterator[None]:
        """What the layer reads inside this block is x0."""
        self._in_original, self._calls, self._originals, self._products = True, [], {}, {}
        try:
            yield
        finally:
            self._in_original = False
            self._each_once = len(self._calls) == len(set(self._calls)) == self._count

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """A pass for the Hessians alone: it ends with the last linear's input, if the original read each once."""
        self._calls, self._may_end = [], self._each_once
        with suppress(_AllRead):
            yield
        self._may_end = False

    def _keep(self, name: str, module: nn.Linear, out: Tensor) -> None:
        # Its difference from W x is a few percent of it: half precision would not leave enough of that.
        if self._in_original and out.dtype == torch.float32:
            self._products[name] = out if module.bias is None else out - module.bias

    def _record(self, name: str, x: Tensor) -> None:
        self._calls.append(name)
        if self._in_original:
            self._originals[name] = x
            return
        original = self._originals.pop(name, None)
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
            own = x.reshape(-1, x.shape[-1])
            group.hessian += gram(own.float())
            if original is not None:
                readers = [name, *(other for other, x0 in self._originals.items() if x0 is original)]
                self._compare(group, readers, original.reshape(own.shape), own)
            group.tokens += own.shape[0]
            group._latest = x
        if self._may_end and len(set(self._calls)) == self._count:
            raise _AllRead

    def _compare(self, group: Group, readers: list[str], original: Tensor, own: Tensor) -> None:
        """Adds a batch to the group's ``drift`` or ``crossed``."""
        k = own.shape[-1]
        products = {name: self._products[name] for name in readers if name in self._products}
        if len(products) == len(readers) and sum(y.shape[-1] for y in products.values()) < k:
            for name, y in products.items():
                if name not in group.crossed:
                    group.crossed[name] = torch.zeros(y.shape[-1], k, dtype=torch.float64, device=own.device)
                group.crossed[name] += y.reshape(-1, y.shape[-1]).T @ own
            return
        if group.drift is None:
            group.drift = torch.zeros_like(group.hessian)
        group.drift += (original - own).T @ own  # of a few percent: the activations' own dtype is precise enough

    def close(self) -> list[Group]:
        """Removes the hooks, lets go of the last batch, and returns the groups."""
        for handle in self._handles:
            handle.remove()
        self._originals, self._products = {}, {}
        for group in self.groups:
            group._latest = None
        return self.groups


def gram(x: Tensor, block: int = 256) -> Tensor:
    """x^T x of float32 [tokens, k]: what is above the diagonal's blocks is a copy, which spares up to half the time."""
    product = torch.empty(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for begin in range(0, x.shape[1], block):
        end = begin + block
        torch.mm(x[:, begin:end].T, x[:, :end], out=product[begin:end, :end])
        product[:begin, begin:end] = product[begin:end, :begin].T
    return product


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
    mean = hessian / _unit(hessian, tokens)
    dead = mean.diagonal() <= 0
    mean.diagonal()[dead] = 1.0
    mean.diagonal().add_(damping)
    return mean.float(), dead


def _unit(hessian: Tensor, tokens: int) -> Tensor:
    """What a sum of x x^T is divided by for a mean diagonal of 1 over the live columns."""
    live = hessian.diagonal()[hessian.diagonal() > 0]
    return live.mean() if len(live) else torch.tensor(float(max(tokens, 1)), dtype=hessian.dtype)


def drift_correction(group: Group, hessian: Tensor) -> Callable[[str, Tensor], Tensor]:
    """f(name, W), float32 [n, k], such that W + f(name, W) on x comes nearest to W on x0.

    min_V E|W x0 - V x|^2 has the solution V = W E[x0 x^T] H^-1 = W + W E[(x0 - x) x^T] H^-1 (GPTAQ, arXiv 2504.02692):
    the error that the layers before left is mended where this layer can.

    Args:
        group: with ``drift`` or ``crossed``.
        hessian: float32 [k, k] of ``regularise``, damped, which keeps the correction small where little is known.
    """

    def solve(right: Tensor) -> Tensor:
        return torch.linalg.solve(hessian.double(), right.T / _unit(group.hessian, group.tokens)).T.float()

    if group.crossed:
        return lambda name, weight: solve(group.crossed[name] - weight.double() @ group.hessian)
    assert group.drift is not None
    share = solve(group.drift)
    return lambda _, weight: weight @ share
