# SPDX-License-Identifier: Apache-2.0
"""A layer that is ready to run: what `Backend.prepare` returns."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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
        rows = x.reshape(-1, self.spec.in_features)
        unused = self.spec.stored_in - self.spec.in_features
        rows = pad(rows, (0, unused)) if unused else rows.contiguous()
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

    @abc.abstractmethod
    def _rows(self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """`linear` of contiguous rows [m, stored k] -> [m, n or more]: what is too much is cut."""

    @abc.abstractmethod
    def _looked_up(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Tensor:
        """`embedding` of contiguous ids [m] -> [m, k]."""
