# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: one call of the compiled op per linear layer (sources in kernels/cpu)."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm.formats.methods import Code, Method
from quip_vllm.formats.trellis_codes import state_values
from quip_vllm.ops.dispatch import LinearSpec
from quip_vllm.ops.extension import cpu_library_problem
from quip_vllm.ops.tensors import check, layout
from quip_vllm.transforms.hadamard import block_size, factor
from quip_vllm.transforms.hadamard_matrices import hadamard_matrix


@cache
def _base(order: int, transpose: bool) -> Tensor:
    """H_q (transposed for the input side) as float32, one copy for all layers."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float32)  # vLLM loads models under another default dtype
    matrix = hadamard_matrix(order).float()
    return (matrix.T if transpose else matrix).contiguous()


@cache
def _lut_values() -> Tensor:
    return state_values(Code.LUT).flatten().contiguous()


def _rotation(n: int, block: int | None) -> tuple[int, int]:
    """(q, p): the row is rotated in runs of q*p."""
    return factor(n) if block is None else (1, block_size(n, block))


class CpuBackend:
    """Portable, AVX2 and AVX-512 kernels behind one op a method; the library chooses the tier at its first call."""

    name = "cpu"

    def refusal(self, spec: LinearSpec) -> str | None:
        problem = cpu_library_problem()
        if problem is not None:
            return problem
        try:
            layout(spec)
            for size in (spec.in_features, *spec.output_sizes):
                _rotation(size, spec.hadamard_block)
        except ValueError as error:
            return str(error)
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check(spec, tensors)
        prepared = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()
        }
        if spec.code is Code.LUT:
            prepared["lut"] = _lut_values()
        for i, size in enumerate((spec.in_features, *spec.output_sizes)):
            prepared[f"base{i}"] = _base(_rotation(size, spec.hadamard_block)[0], transpose=i == 0)
        return prepared

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        sizes = (spec.in_features, *spec.output_sizes)
        bases = [tensors[f"base{i}"] for i in range(len(sizes))]
        widths = [_rotation(size, spec.hadamard_block)[1] for size in sizes]
        rows = x.reshape(-1, spec.in_features).contiguous()
        if spec.method is Method.QTIP:
            assert spec.code is not None
            y = torch.ops.quip_vllm.qtip_linear(
                rows,
                tensors["packed"],
                tensors["su"],
                tensors["sv"],
                tensors.get("lut"),
                bases,
                widths,
                list(spec.output_sizes),
                spec.code.value,
                spec.bits,
            )
        else:
            y = torch.ops.quip_vllm.quip_sharp_linear(
                rows,
                tensors["codes"],
                tensors.get("residual_codes"),
                tensors["su"],
                tensors["sv"],
                bases,
                widths,
                list(spec.output_sizes),
            )
        return y.reshape(*x.shape[:-1], spec.out_features)
