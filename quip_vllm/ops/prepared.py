# SPDX-License-Identifier: Apache-2.0
"""A layer that is ready to run: what `Backend.prepare` returns."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from quip_vllm.formats.spec import LinearSpec


@dataclass(frozen=True)
class PreparedLayer(abc.ABC):
    """A quantized layer laid out for one backend. It holds every choice that was made for it; backends hold nothing.

    Attributes:
        backend: the backend's name.
        spec: the layer.
        tensors: what the backend reads, by names of its own. A module that registers them as parameters may pass its
            own copies to the methods.
    """

    backend: ClassVar[str]
    spec: LinearSpec
    tensors: Mapping[str, Tensor]

    def linear(self, x: Tensor, bias: Tensor | None = None, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """y = sv * U_n(What(U_k^T(su * x))) + bias, for each part.

        Args:
            x: [..., k], float16, bfloat16 or float32.
            bias: [n] in x's dtype.
            tensors: in place of the layer's own, the same names, shapes and dtypes.

        Returns:
            [..., n] in x's dtype.
        """
        rows = self._stored(x.reshape(-1, self.spec.in_features))
        y = self._rows(rows, bias, self.tensors if tensors is None else tensors)
        return y[:, : self.spec.out_features].reshape(*x.shape[:-1], self.spec.out_features)

    def embedding(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Rows of the dequantized weight of a layer without an output rotation.

        Args:
            ids: int64 [...], each in 0..n-1. Another raises IndexError or RuntimeError, or, on a GPU, gives a row of
                NaN.
            dtype: of the result.
            tensors: as for `linear`.

        Returns:
            [..., k] in `dtype`.
        """
        found = self._looked_up(ids.reshape(-1).contiguous(), dtype, self.tensors if tensors is None else tensors)
        return found.reshape(*ids.shape, self.spec.in_features)

    def _stored(self, rows: Tensor) -> Tensor:
        """Rows [m, k], contiguous and filled up to [m, stored k]."""
        unused = self.spec.stored_in - self.spec.in_features
        return pad(rows, (0, unused)) if unused else rows.contiguous()

    def for_all(self, layers: "Sequence[PreparedLayer]") -> "PreparedLayer":
        """The choices that hold for several layers of this spec, of which this is one; without tensors."""
        return replace(self, tensors={})

    def ready(self, experts: "PreparedExperts") -> "PreparedExperts":
        """Experts whose layer this is, once their tensors are together, before they run."""
        return experts

    def _rows_of_experts(
        self, x: Tensor, ids: Tensor, shares: Tensor | None, tensors: Mapping[str, Tensor], own: frozenset[str]
    ) -> Tensor:
        """`PreparedExperts.linear` of contiguous rows [m, stored k] -> [rows, n or more]: a call per expert."""
        of_results = ids.flatten()
        y = x.new_zeros(len(of_results), self.spec.out_features)
        for i in of_results[of_results >= 0].unique().tolist():
            tensors_of = {name: one[i] if name in own else one for name, one in tensors.items()}
            rows = (of_results == i).nonzero()[:, 0]
            y[rows] = self._rows(x[rows // ids.shape[1]], None, tensors_of)[:, : y.shape[1]]
        return summed(y, shares)

    @abc.abstractmethod
    def _rows(self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """`linear` of contiguous rows [m, stored k] -> [m, n or more]: what is too much is cut."""

    @abc.abstractmethod
    def _looked_up(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Tensor:
        """`embedding` of contiguous ids [m] -> [m, k]."""


def gpu_weight(tensors: Mapping[str, Tensor], widths: list[int]) -> tuple[Any, ...]:
    """What the ops of both GPU backends want first of a layer, or of experts; widths: of each rotation."""
    bases = [tensors[f"base{i}"] for i in range(len(widths))]
    return tensors["packed"], tensors.get("table"), tensors["su"], tensors["sv"], bases, widths


def summed(y: Tensor, shares: Tensor | None) -> Tensor:
    """Rows [tokens * s, n], or the sums of s in turn times their shares, float32 [tokens, s]: [tokens, n]."""
    if shares is None:
        return y
    return (y.view(*shares.shape, y.shape[1]).float() * shares[..., None]).sum(1).to(y.dtype)


@dataclass(frozen=True)
class PreparedExperts:
    """Layers of one spec, of which every row of x has some of its own: those of a mixture's experts.

    Attributes:
        layer: what was chosen for all of them, without tensors.
        tensors: by the names of a layer's tensors; those in `own` have a first dimension of experts.
        own: names of the tensors that each expert has; all share the others.
    """

    layer: PreparedLayer
    tensors: Mapping[str, Tensor]
    own: frozenset[str]

    def linear(
        self, x: Tensor, ids: Tensor, shares: Tensor | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """`PreparedLayer.linear` of the experts that each row names.

        Args:
            x: [m, k], float16, bfloat16 or float32.
            ids: int64 [m, t], numbers of experts. A negative one names none: the result is zero, and costs nothing.
            shares: float32 [tokens, s] with as many elements as `ids`: s results in turn, times these, are summed.
            tensors: in place of its own, the same names, shapes and dtypes.

        Returns:
            [m, t, n] in x's dtype; with shares the sums, [tokens, n].

        Raises:
            IndexError, RuntimeError: a number is too large. On a GPU its row is NaN.
        """
        tensors, spec = self.tensors if tensors is None else tensors, self.layer.spec
        shares = None if shares is None else shares.contiguous()
        y = self.layer._rows_of_experts(self.layer._stored(x), ids.contiguous(), shares, tensors, self.own)
        y = y[:, : spec.out_features]
        return y.reshape(*ids.shape, spec.out_features) if shares is None else y
