# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: one call of the compiled op per linear layer (sources in kernels/cpu)."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm.formats.methods import Code, Method
from quip_vllm.formats.tile import TILE
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


def _rotations(spec: LinearSpec) -> list[tuple[int, int]]:
    """(q, p) of the input and of each output. Raises ValueError for a size that has none."""
    outputs = [_rotation(n, spec.hadamard_block) if spec.rotate_output else (1, 1) for n in spec.output_sizes]
    return [_rotation(spec.in_features, spec.hadamard_block), *outputs]


class CpuBackend:
    """Portable, AVX2 and AVX-512 kernels behind one op a method; the library chooses the tier at its first call."""

    name = "cpu"

    def refusal(self, spec: LinearSpec) -> str | None:
        problem = cpu_library_problem()
        if problem is not None:
            return problem
        try:
            layout(spec)
            _rotations(spec)
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
        for i, (order, _) in enumerate(_rotations(spec)):
            prepared[f"base{i}"] = _base(order, transpose=i == 0)
        if not spec.rotate_output:
            prepared["inverse_base"] = _base(_rotations(spec)[0][0], transpose=False)
        return prepared

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        widths = [width for _, width in _rotations(spec)]
        bases = [tensors[f"base{i}"] for i in range(len(widths))]
        rows = x.reshape(-1, spec.in_features).contiguous()
        sv, sizes = tensors["sv"], list(spec.output_sizes)
        unused = 0 if spec.rotate_output or spec.method is not Method.QTIP else -spec.out_features % TILE
        if unused:
            sv, sizes = torch.nn.functional.pad(sv, (0, unused)), [spec.out_features + unused]
        if spec.method is Method.QTIP:
            assert spec.code is not None
            y = torch.ops.quip_vllm.qtip_linear(
                rows,
                tensors["packed"],
                tensors["su"],
                sv,
                tensors.get("lut"),
                bases,
                widths,
                sizes,
                spec.code.value,
                spec.bits,
            )
        else:
            y = torch.ops.quip_vllm.quip_sharp_linear(
                rows,
                tensors["codes"],
                tensors.get("residual_codes"),
                tensors["su"],
                sv,
                bases,
                widths,
                sizes,
            )
        return y[:, : spec.out_features].reshape(*x.shape[:-1], spec.out_features)

    def embedding(self, spec: LinearSpec, ids: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        flat = ids.reshape(-1).contiguous()
        rotation = (tensors["inverse_base"], _rotations(spec)[0][1])
        signs = (tensors["su"], tensors["sv"])
        if spec.method is Method.QTIP:
            assert spec.code is not None
            rows = torch.ops.quip_vllm.qtip_embedding(
                flat, tensors["packed"], *signs, tensors.get("lut"), *rotation, spec.code.value, spec.bits, dtype
            )
        else:
            rows = torch.ops.quip_vllm.quip_sharp_embedding(
                flat, tensors["codes"], tensors.get("residual_codes"), *signs, *rotation, dtype
            )
        return rows.reshape(*ids.shape, spec.in_features)
