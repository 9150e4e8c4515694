# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a layer's tensors as the checkpoint has them, so that they load, move and save as others do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV
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
        nn.Module.__init__(self)
        self.spec, self._read = spec, read
        self._names = list(buffers)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self._prepared: PreparedLayer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors, named as `formats.tensors.layout` does."""
        return self._read({name: getattr(self, name).detach() for name in self._names})

    def multiplied(self) -> dict[str, Tensor]:
        """`tensors`, as `prepare` takes them."""
        return self.tensors()

    def prepare(self) -> PreparedLayer:
        """The layer, ready to run where its buffers are now."""
        if self._prepared is None:
            self._prepared = prepare(self.spec, self.multiplied())
        return self._prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self.get_buffer(name) for name in self._names if name in self._buffers}
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


class Linear(StoredLayer, nn.Linear):
    """x [..., k] -> [..., n] in x's dtype; a gradient passes through to x, and to the bias.

    To PEFT and others it is an nn.Linear. Its ``weight`` is empty: what has a device and a dtype to be asked for.

    Args:
        bias: that of the module in whose place this stands, or None.
    """

    def __init__(self, *args: Any, bias: nn.Parameter | None = None) -> None:
        super().__init__(*args)
        self.in_features, self.out_features = self.spec.in_features, self.spec.out_features
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.register_parameter("bias", bias)
        self._learns = False

    def train_vectors(self) -> list[nn.Parameter]:
        """Makes ``su`` and ``sv`` parameters in float32: see `hf_plugin.train_vectors`."""
        if not {SU.name, SV.name} <= set(self._names):
            raise ValueError(
                f"a layer whose tensors are {', '.join(self._names)} has no vectors that can be trained: convert the "
                "checkpoint with quip-vllm convert, or quantize the model with quip-vllm quantize"
            )
        for name in (SU.name, SV.name) if not self._learns else ():
            vector = self._buffers.pop(name)
            self.register_parameter(name, nn.Parameter(vector.float()))  # type: ignore[union-attr]
        self._prepared, self._learns = None, True
        self.spec = replace(self.spec, vector_dtype=torch.float32)
        return [self.get_parameter(SU.name), self.get_parameter(SV.name)]

    def multiplied(self) -> dict[str, Tensor]:
        """`tensors`, with ones for vectors that learn: `forward` multiplies by these."""
        tensors = self.tensors()
        ones = {name: torch.ones_like(tensors[name]) for name in (SU.name, SV.name) if self._learns}
        return {**tensors, **ones}

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + bias."""
        dtype = x.dtype
        if self._learns:
            x = (x * self.get_parameter(SU.name)).to(dtype)
        y = product(x, self)
        if self._learns:
            y = (y * self.get_parameter(SV.name)).to(dtype)
        return y if self.bias is None else y + self.bias[: self.out_features].to(y.dtype)


def product(x: Tensor, layer: StoredLayer) -> Tensor:
    """x W^T; a gradient passes through to x."""
    learning = torch.is_grad_enabled() and x.requires_grad
    return Product.apply(x, layer) if learning else layer.prepare().linear(x)


class Product(torch.autograd.Function):
    """x W^T, with the gradient of x by the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLayer) -> Tensor:
        """y [..., n]."""
        ctx.layer = layer
        return layer.prepare().linear(x).clone()  # no view: Llama 4 adds to it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """That of x."""
        return gradient @ dequantize(ctx.layer.spec, ctx.layer.multiplied()).to(gradient.dtype), None


def train_vectors(model: nn.Module) -> list[nn.Parameter]:
    """Makes ``su`` and ``sv`` of every quantized linear layer parameters that learn, in float32; the codes stay.

    ``save_pretrained`` writes them in their places, and the folder is served as any other. Layers that read one
    activation have an ``su`` each from then on, so that vLLM rotates it once for each of them.

    Args:
        model: loaded with `hf_plugin`. What else learns is for the caller to say (``requires_grad``).

    Returns:
        The parameters, for an optimizer.

    Raises:
        ValueError: it has no quantized linear layer, or one whose files hold no vectors by these names, as EXL3's.
    """
    layers = [one for one in model.modules() if isinstance(one, Linear)]
    if not layers:
        raise ValueError("the model has no quantized linear layer: load a checkpoint after import quip_vllm.hf_plugin")
    return [vector for layer in layers for vector in layer.train_vectors()]


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
        return product(x, self._embedding[0])
