# SPDX-License-Identifier: Apache-2.0
"""The oracle: the whole linear layer in plain torch, slow and in fp32, on any device and for every LinearSpec."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from quip_vllm.formats.decode import decode_parts
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV, check, split
from quip_vllm.ops.prepared import PreparedLayer
from quip_vllm.ops.rotations import sizes_problem
from quip_vllm.transforms.hadamard import hadamard


def dequantize(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The dense weight, float32 [n, k], that the quantized layer stands for: y = x W^T exactly."""
    check(spec, tensors)
    parts = split(spec, tensors)
    # Rows of U_n What U_k^T; the output side is turned as columns of the transpose.
    turned = [hadamard(weight, spec.hadamard_block, chunks=spec.input_chunks) for weight in decode_parts(spec, tensors)]
    columns = _outputs(spec, [weight.T for weight in turned], parts)
    return (columns[: spec.in_features] * tensors[SU.name].float()[: spec.in_features, None]).T.contiguous()


def _linear(spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """float32 x [..., stored k] -> [..., n]: sv * U_n(What(U_k^T(su * x))) of each part, padding cut."""
    signed = x * tensors[SU.name].float()
    rotated = hadamard(signed, spec.hadamard_block, transpose=True, chunks=spec.input_chunks)
    return _outputs(spec, [rotated @ weight.T for weight in decode_parts(spec, tensors)], split(spec, tensors))


def _outputs(spec: LinearSpec, products: list[Tensor], parts: list[dict[str, Tensor]]) -> Tensor:
    """sv * U_n(product) of each part, padding cut: [..., stored n] -> [..., n of all parts]."""
    if spec.rotate_output:
        products = [hadamard(y, spec.hadamard_block, chunks=spec.output_chunks) for y in products]
    scaled = [y * part[SV.name].float() for y, part in zip(products, parts, strict=True)]
    return torch.cat([y[..., :n] for y, n in zip(scaled, spec.output_sizes, strict=True)], dim=-1)


@dataclass(frozen=True)
class ReferenceLayer(PreparedLayer):
    """The checkpoint's own tensors; the whole weight is decoded at every call."""

    backend = "reference"

    def _rows(self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        y = _linear(self.spec, x.float(), dict(tensors)).to(x.dtype)
        return y if bias is None else y + bias

    def _looked_up(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Tensor:
        return embedding(ids, dequantize(self.spec, dict(tensors))).to(dtype)


class ReferenceBackend:
    """Runs every LinearSpec, and only with QUIP_VLLM_BACKEND=reference."""

    name = "reference"
    routes = False

    def refusal(self, spec: LinearSpec) -> str | None:
        """See Backend."""
        return sizes_problem(spec)

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> ReferenceLayer:
        """See Backend."""
        check(spec, tensors)
        return ReferenceLayer(spec, dict(tensors))
