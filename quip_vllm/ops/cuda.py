# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: one call of the compiled op per linear layer (sources in kernels/cuda)."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import check
from quip_vllm.formats.tile import TILE
from quip_vllm.ops import cuda_layout, cuda_shapes
from quip_vllm.ops.extension import cuda_library_problem, gpu_problem
from quip_vllm.ops.rotations import bases, kernels_problem, rotation_base, rotations

INSTRUCTIONS = {"1mad": 4.4, "1mad_int8": 3.1, "3inst": 5.4, "hyb": 2.9, "lut": 5.0, "e8p": 2.1}
"""Per weight at 2 bits and one row, for the choice of thread blocks (docs/benchmarks/cuda_static.md has them all)."""


class CudaBackend:
    """The fused kernels for NVIDIA GPUs from compute capability 8.0. Activations are fp16, or int8 with code 1mad.

    QUIP_VLLM_ACTIVATIONS=int8 rounds them where the code has it; fp16 is the default.
    """

    name = "cuda"

    def __init__(self) -> None:
        # The op's name of the code, its thread blocks, rows for the dense weight: constants to torch.compile.
        self.plans: dict[LinearSpec, tuple[str, list[int], int]] = {}

    def refusal(self, spec: LinearSpec) -> str | None:
        problem = gpu_problem() or cuda_library_problem() or kernels_problem(spec)
        if problem is not None:
            return problem
        if len(spec.output_sizes) > 16:
            return f"{len(spec.output_sizes)} fused projections: the kernels take 16"
        if envs.activations() == "int8" and spec.code != "1mad":
            return "QUIP_VLLM_ACTIVATIONS is int8, which on a GPU only code 1mad has: unset it"
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check(spec, tensors)
        device = tensors["sv"].device
        gpu = _gpu(device)
        code = _code(spec, gpu)
        self.plans[spec] = code, _shape(spec, code, gpu), envs.dense_rows()
        prepared = {"packed": cuda_layout.packed_words(spec, tensors), "su": tensors["su"].float().contiguous()}
        prepared["sv"] = torch.nn.functional.pad(tensors["sv"].float(), (0, sum(_sizes(spec)) - spec.out_features))
        table = cuda_layout.table(spec, tensors)
        if table is not None:
            prepared["table"] = table
        for name, order, _, transpose in bases(spec):
            prepared[name] = rotation_base(order, not transpose, device)  # the kernels read the columns of each
        return prepared

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        widths = [width for _, width in rotations(spec)]
        code, shape, dense_rows = self.plans[spec]
        sizes = _sizes(spec)
        if bias is not None and sum(sizes) > spec.out_features:
            bias = torch.nn.functional.pad(bias, (0, sum(sizes) - spec.out_features))
        y = torch.ops.quip_vllm.cuda_linear(
            x.reshape(-1, spec.in_features).contiguous(),
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"],
            [tensors[f"base{i}"] for i in range(len(widths))],
            widths,
            sizes,
            bias,
            code,
            spec.bits,
            shape,
            dense_rows,
        )
        return y[:, : spec.out_features].reshape(*x.shape[:-1], spec.out_features)

    def embedding(self, spec: LinearSpec, ids: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        code, *_ = self.plans[spec]
        rows = torch.ops.quip_vllm.cuda_embedding(
            ids.reshape(-1).contiguous(),
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"],
            tensors["inverse_base"],
            rotations(spec)[0][1],
            code.removesuffix("_int8"),
            spec.bits,
            dtype,
        )
        return rows.reshape(*ids.shape, spec.in_features)


def _sizes(spec: LinearSpec) -> list[int]:
    """The outputs of the op: an output head of a trellis has whole tiles."""
    if spec.rotate_output or spec.code == "e8p":
        return list(spec.output_sizes)
    return [spec.out_features + -spec.out_features % TILE]


def _gpu(device: torch.device) -> cuda_shapes.Gpu:
    if device.type != "cuda":  # the emulator
        return cuda_shapes.Gpu(4, 99 * 1024, 100 * 1024)
    found = torch.cuda.get_device_properties(device)
    return cuda_shapes.Gpu(
        found.multi_processor_count, found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
    )


def _code(spec: LinearSpec, gpu: cuda_shapes.Gpu) -> str:
    """The op's name of the code: which kernels of it run here."""
    if spec.code == "1mad" and envs.activations() == "int8":
        return "1mad_int8"
    code = spec.code
    if code in ("hyb", "e8p") and _shared(f"{code}_large", spec.bits)(1, 4, 4) <= gpu.shared_block:
        return f"{code}_large"
    return code


def _shared(code: str, bits: int) -> Callable[[int, int, int], int]:
    return lambda rows, warps_n, depth: torch.ops.quip_vllm.cuda_shared_bytes(code, bits, rows, warps_n, depth)


@cache
def _shape(spec: LinearSpec, code: str, gpu: cuda_shapes.Gpu) -> list[int]:
    """The choice, made once for all layers of these sizes."""
    return cuda_shapes.choose(_problem(spec, code), gpu)


def _problem(spec: LinearSpec, code: str) -> cuda_shapes.Problem:
    tables = 3 if spec.bits == 3 else 2
    table_words = {"hyb": 512 * 16, "hyb_large": 1024 * 32, "e8p": tables * 256 * 16, "e8p_large": tables * 256 * 32}
    (order, width), *others = set(rotations(spec)[1:])
    return cuda_shapes.Problem(
        spec.out_features,
        spec.in_features,
        spec.bits,
        INSTRUCTIONS[code.removesuffix("_large")],
        table_words.get(code, 0),
        spec.code == "lut",
        _shared(code, spec.bits),
        0 if others or order > 1 else width,
    )
