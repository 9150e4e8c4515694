# SPDX-License-Identifier: Apache-2.0
"""Hooks that accumulate Hessians and drift while a decoder layer runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from quip_vllm.nn.experts import Experts
from quip_vllm.quantizer.curvature.inputs import Inputs


class _AllRead(Exception):
    """Ends a pass through a decoder layer whose output nobody wants."""


class Collector:
    """Finds the groups of linear layers that read the same activation, and sums what is known of each activation.

    For the drift the layer runs twice per batch: first, inside ``with collector.original():``, on the hidden states of
    the original model, then, inside ``with collector.inputs():``, on those behind the quantized layers.

    Args:
        linears: full module name -> linear layer.
        weights: full module name -> weights of the tokens, float32 [tokens of all batches], equal for the readers of
            one activation. A layer that has none counts each token once.
        experts: full module name of an expert's linear layer -> what runs the expert, and says which tokens it reads.
            A token that one of the two passes gives another expert has no drift there.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        weights: Mapping[str, Tensor] | None = None,
        experts: Mapping[str, Experts] | None = None,
    ):
        self._weights, self._experts = weights or {}, experts or {}
        self._rows: dict[str, Tensor] = {}  # of x0, which tokens an expert's are
        self._group_of: dict[str, Inputs] = {}
        self._latest: dict[str, Tensor] = {}  # first name of a group -> its activation in this pass
        self._originals: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}  # W x0 of layers with few outputs
        self._count = len(linears)
        self._in_original = False
        self._calls: list[str] = []  # of one pass
        self._each_once = self._may_end = False
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._record(name, args[0]))
            for name, module in linears.items()
        ]
        self._handles += [
            module.register_forward_hook(lambda module, _, out, name=name: self._keep(name, module, out))
            for name, module in linears.items()
            if module.out_features < module.in_features and name not in self._experts
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
        """A pass for the sums alone: it ends with the last layer's input, if the original pass read each once."""
        self._calls, self._may_end = [], self._each_once
        with suppress(_AllRead):
            yield
        self._may_end = False

    def close(self) -> list[Inputs]:
        """Removes the hooks and returns one object per group, in the order in which the layers ran."""
        for handle in self._handles:
            handle.remove()
        return [group for name, group in self._group_of.items() if group.names[0] == name]

    def _keep(self, name: str, module: nn.Linear, out: Tensor) -> None:
        # Its difference from W x is a few percent of it: half precision would not leave enough of that.
        if self._in_original and out.dtype == torch.float32:
            self._products[name] = out if module.bias is None else out - module.bias

    def _record(self, name: str, x: Tensor) -> None:
        self._calls.append(name)
        experts = self._experts.get(name)
        if self._in_original:
            self._originals[name] = x
            if experts is not None:
                self._rows[name] = experts.rows
            return
        original = self._originals.pop(name, None)
        if original is not None and experts is not None:
            original = _of_same_tokens(original, self._rows[name], x, experts.rows)
        if name not in self._group_of:
            first = next((first for first, latest in self._latest.items() if latest is x), name)
            self._group_of[name] = self._group_of[first] if first != name else Inputs.of(name, x.shape[-1], x.device)
            if first != name:
                self._group_of[first].names.append(name)
        group = self._group_of[name]
        if group.names[0] == name:  # one product for all readers
            weights = self._weights.get(name)
            if weights is not None:
                weights = weights[group.tokens : group.tokens + x.shape[:-1].numel()].to(x.device)
            group.add(x, weights)
            self._latest[name] = x
            if original is not None:
                readers = [name, *(other for other, x0 in self._originals.items() if x0 is original)]
                known = all(reader in self._products for reader in readers)
                products = {reader: self._products[reader] for reader in readers} if known else None
                group.drift.add(original.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), products, weights)
        if self._may_end and len(set(self._calls)) == self._count:
            raise _AllRead


def _of_same_tokens(original: Tensor, its: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """x with the rows of `original` for tokens that both have; `its` and `rows` say which these are, in order."""
    found = x.clone()
    found[torch.isin(rows, its)] = original[torch.isin(its, rows)]
    return found
