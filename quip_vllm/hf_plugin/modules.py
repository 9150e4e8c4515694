# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a layer's tensors as the checkpoint has them, so that they load, move and save as others do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops import dequantize, prepare
from quip_vllm.ops.prepared import PreparedLayer


class StoredLayer(nn.Module):
    """A quantized layer: buffers named as in the files, and what the backend of their device has made of them.

    Both are in memory: twice the quantized weight. A change of the dtype, as by ``model.half()``, leaves the buffers.

    Args:
        spec: the layer.
        buffers: name in the files, behind the layer's name -> an empty tensor of its shape and dtype.
        read: those tensors, when they are read -> the tensors of `formats.tensors.layout`.
    """

    def __init__(
        self, spec: LinearSpec, buffers: Mapping[str, Tensor], read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        super().__init__()
        self.spec, self._read = spec, read
        self._names = list(buffers)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self._prepared: PreparedLayer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors, named as `formats.tensors.layout` does."""
        return self._read({name: self.get_buffer(name) for name in self._names})

    def prepare(self) -> PreparedLayer:
        """The layer, ready to run where its buffers are now."""
        if self._prepared is None:
            self._prepared = prepare(self.spec, self.tensors())
        return self._prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self.get_buffer(name) for name in self._names}
        result = super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self.get_buffer(name)
            if now.dtype != before.dtype:
                setattr(self, name, before.to(now.device))
            if now.device != before.device:
                self._prepared = None
        return result

    def extra_repr(self) -> str:
        """Sizes and format, for print."""
        sizes = f"in_features={self.spec.in_features}, out_features={self.spec.out_features}"
        return f"{sizes}, code={self.spec.code}, bits={self.spec.bits}"


class Linear(StoredLayer):
    """x [..., k] -> [..., n] in x's dtype; a gradient passes through to x, and to the bias.

    Args:
        bias: that of the module in whose place this stands, or None.
    """

    def __init__(self, *args: Any, bias: nn.Parameter | None = None) -> None:
        super().__init__(*args)
        self.in_features, self.out_features = self.spec.in_features, self.spec.out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + bias."""
        learning = torch.is_grad_enabled() and x.requires_grad
        y = Product.apply(x, self) if learning else self.prepare().linear(x)
        return y if self.bias is None else y + self.bias[: self.out_features].to(y.dtype)


class Product(torch.autograd.Function):
    """x W^T, with the gradient of x by the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear) -> Tensor:
        """y [..., n]."""
        ctx.layer = layer
        return layer.prepare().linear(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """That of x."""
        return gradient @ dequantize(ctx.layer.spec, ctx.layer.tensors()).to(gradient.dtype), None


class Sliced(nn.Module):
    """A layer that the files hold in slices, named ``slice.0`` and so on.

    Args:
        slices: in order.
        of_inputs: whether each has a share of the inputs, so that outputs are summed, or of the outputs.
    """

    def __init__(self, slices: Sequence[Linear], of_inputs: bool) -> None:
        super().__init__()
        self.slice = nn.ModuleList(slices)
        self._of_inputs = of_inputs

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T."""
        if not self._of_inputs:
            return torch.cat([one(x) for one in self.slice], dim=-1)
        pieces = x.split([one.in_features for one in self.slice], dim=-1)
        return torch.stack([one(piece) for one, piece in zip(self.slice, pieces, strict=True)]).sum(0)


class Embedding(StoredLayer):
    """int64 ids [...] -> rows [..., k].

    Args:
        dtype: of the rows.
        scale: by which a row is multiplied.
    """

    def __init__(self, *args: Any, dtype: torch.dtype, scale: float) -> None:
        super().__init__(*args)
        self.dtype, self._scale = dtype, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Rows by number."""
        rows = self.prepare().embedding(ids, self.dtype)
        return rows if self._scale == 1 else rows * torch.tensor(self._scale, dtype=self.dtype, device=rows.device)


class TiedHead(nn.Module):
    """An output head that has its weight from the input embedding.

    Args:
        embedding: which keeps the weight; it is no submodule, so that files have it once.
    """

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self._embedding = [embedding]

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T."""
        return self._embedding[0].prepare().linear(x)
