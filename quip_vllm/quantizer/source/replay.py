# SPDX-License-Identifier: Apache-2.0
"""Running one decoder layer by itself: with the arguments of the model's own call for a batch of the same size."""

import copy
from collections import UserDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """What a model gives a decoder layer beside the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        keyword: whether the hidden states are the keyword argument ``hidden_states``, else they come first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool


Calls = dict[int, Call]
"""Sequences in a batch -> the call of one layer. The first call of a size stands for all of it."""


class Returned:
    """How many values a model's decoder layers return: None for a bare tensor, unknown until one ran."""

    count: int | None = None

    def see(self, _: nn.Module, args: Any, out: Any) -> None:
        """Forward hook of a decoder layer."""
        self.count = len(out) if isinstance(out, tuple) else None


class Stub(nn.Module):
    """Stands in for a decoder layer: passes its input on, or ``output``, and keeps what it was called with."""

    hidden: Tensor
    call: Call

    def __init__(self, original: nn.Module, returned: Returned):
        super().__init__()
        self.output: Tensor | None = None
        self._returned = returned
        for name in ("attention_type", "layer_type", "block_type"):  # some models ask their layers which mask they want
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:  # noqa: D102  # torch's
        keyword = not args
        self.hidden = kwargs.pop("hidden_states") if keyword else args[0]
        self.call = Call(tuple(map(_fresh, args[1:])), {name: _fresh(value) for name, value in kwargs.items()}, keyword)
        out = self.hidden if self.output is None else self.output
        return out if self._returned.count is None else (out, *[None] * (self._returned.count - 1))


def run_layer(layer: nn.Module, hidden: Tensor, calls: Calls) -> Tensor:
    """One decoder layer's output hidden states, called as the model calls it for as many sequences."""
    args, kwargs, keyword = calls[hidden.shape[0]]
    fresh = {name: _fresh(value) for name, value in kwargs.items()}
    others = tuple(map(_fresh, args))
    out = layer(*others, hidden_states=hidden, **fresh) if keyword else layer(hidden, *others, **fresh)
    return out[0] if isinstance(out, tuple) else out


def same(one: Any, other: Any, known: set[tuple[int, int]] | None = None) -> bool:
    """Whether two arguments are equal, tensors bit by bit.

    Args:
        one: an argument, or a container of them.
        other: as `one`.
        known: ids of pairs of tensors that are equal, which are compared once while they live; all layers share some.
    """
    if isinstance(one, Tensor):
        pair = (id(one), id(other))
        equal = pair in (known or ()) or (isinstance(other, Tensor) and torch.equal(one, other))
        if equal and known is not None:
            known.add(pair)
        return equal
    if isinstance(one, tuple | list):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same(*two, known) for two in zip(one, other, strict=True))
        )
    if isinstance(one, _WriteOnly):
        return isinstance(other, Mapping)
    if isinstance(one, Mapping):
        equal = isinstance(other, Mapping) and one.keys() == other.keys()
        return equal and all(same(one[key], other[key], known) for key in one)
    return bool(one is other or one == other)


def kinds(layers: nn.ModuleList) -> list[int]:
    """The first layer of each kind: layers are of one kind if they differ in weights and their own index alone."""

    def facts(index: int) -> dict[str, Any]:
        return {
            f"{name}.{key}": value
            for name, module in layers[index].named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        }

    last = len(layers) - 1
    first, final = facts(0), facts(last)
    indices = {key for key, value in first.items() if value == 0 and final.get(key) == last}
    found: dict[str, int] = {}
    for index in range(len(layers)):
        own = {key: value for key, value in facts(index).items() if key not in indices}
        found.setdefault(f"{layers[index]}{own}", index)
    return list(found.values())


class _WriteOnly(UserDict[Any, Any]):
    """An empty dictionary that a model gives to all layers: one alone may leave something there, but not read."""

    def __getitem__(self, key: Any, default: Any = None) -> Any:
        raise LookupError("it reads what another layer left")

    __contains__ = get = __getitem__  # type: ignore[assignment]  # of all kinds of arguments


def _fresh(value: Any) -> Any:
    """A container of its own for each call, in which a layer may write."""
    if isinstance(value, Mapping) and not len(value):
        return _WriteOnly()
    return copy.copy(value) if isinstance(value, Mapping | list) else value
