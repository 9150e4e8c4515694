# SPDX-License-Identifier: Apache-2.0
"""Torch modules over a PreparedLayer: for evaluation, benchmarks and whatever builds on transformers."""

import torch
from torch import Tensor, nn

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops import prepare


class _Quantized(nn.Module):
    """What both modules share.

    The prepared tensors belong to the device on which they were prepared, and a checkpoint's tensors cannot be had
    back from them. So they are neither parameters nor buffers: `state_dict` has none, and `.to()` does not move them.

    Args:
        spec: the layer.
        tensors: the checkpoint's, named and shaped as `formats.tensors.layout` says, on the device of the module.

    Raises:
        ValueError: no backend runs the layer there, or a tensor is not what the spec asks for.
    """

    def __init__(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.prepared = prepare(spec, tensors)

    def extra_repr(self) -> str:
        """Sizes, format and backend, for print."""
        spec = self.prepared.spec
        sizes = f"in_features={spec.in_features}, out_features={spec.out_features}"
        return f"{sizes}, code={spec.code}, bits={spec.bits}, backend={self.prepared.backend}"


class QuantizedLinear(_Quantized):
    """A linear layer whose weight stays quantized: x [..., k] -> [..., n] in x's dtype.

    Args:
        spec: the layer.
        tensors: the checkpoint's.
        bias: [n], or None.
    """

    def __init__(self, spec: LinearSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> None:
        super().__init__(spec, tensors)
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + bias."""
        return self.prepared.linear(x, None if self.bias is None else self.bias.to(x.dtype))


class QuantizedEmbedding(_Quantized):
    """An embedding whose weight stays quantized: int64 ids [...] -> [..., k].

    Args:
        spec: the layer, without an output rotation.
        tensors: the checkpoint's.
        dtype: of the rows.
    """

    def __init__(self, spec: LinearSpec, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        if spec.rotate_output:
            raise ValueError("an embedding of rotated outputs has no rows to look up: give rotate_output=False")
        super().__init__(spec, tensors)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Rows by number."""
        return self.prepared.embedding(ids, self.dtype)
