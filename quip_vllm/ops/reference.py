# SPDX-License-Identifier: Apache-2.0
"""The oracle: the whole linear layer in plain torch, slow and in fp32, on any device."""

import torch
from torch import Tensor

from quip_vllm.formats import e8p_residual, trellis_codes
from quip_vllm.formats.methods import Method
from quip_vllm.formats.tile import TILE
from quip_vllm.ops.spec import LinearSpec
from quip_vllm.ops.tensors import check
from quip_vllm.transforms.hadamard import hadamard
from quip_vllm.transforms.incoherence import unrotate_weight


def decode(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The rotated weight, float32 [n, k]: codes to values, nothing else."""
    if spec.method is Method.QUIP_SHARP:
        return e8p_residual.decode_weight(tensors["codes"], tensors.get("residual_codes"), spec.bits)
    assert spec.code is not None
    parts, start = [], 0
    for i, size in enumerate(spec.output_sizes):
        lut = tensors["lut"][i] if "lut" in tensors else None
        rows = tensors["packed"][start // TILE : -(-(start + size) // TILE)]
        parts.append(trellis_codes.decode_weight(rows, spec.bits, spec.code, lut)[:size])
        start += size
    return torch.cat(parts)


def dequantize(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The dense weight, float32 [n, k], that the quantized layer stands for: y = x W^T exactly."""
    check(spec, tensors)
    su = tensors["su"].float()
    weights, signs = decode(spec, tensors).split(spec.output_sizes), tensors["sv"].float().split(spec.output_sizes)
    options = (spec.hadamard_block, spec.rotate_output)
    return torch.cat([unrotate_weight(w, su, sv, *options) for w, sv in zip(weights, signs, strict=True)])


class ReferenceBackend:
    """Decodes the whole weight at every call. Runs only with QUIP_VLLM_BACKEND=reference."""

    name = "reference"

    def refusal(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check(spec, tensors)
        return dict(tensors)

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        block = spec.hadamard_block
        rotated = hadamard(x.float() * tensors["su"].float(), block, transpose=True)
        y = rotated @ decode(spec, tensors).T
        if spec.rotate_output:
            parts = y.split(spec.output_sizes, dim=-1)
            y = torch.cat([hadamard(part.contiguous(), block) for part in parts], dim=-1)
        y = (y * tensors["sv"].float()).to(x.dtype)
        return y if bias is None else y + bias

    def embedding(self, spec: LinearSpec, ids: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.embedding(ids, dequantize(spec, tensors)).to(dtype)
