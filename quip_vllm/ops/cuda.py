# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: one call of the compiled op per linear layer (sources in kernels/cuda)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV, check
from quip_vllm.ops import cuda_layout, cuda_shapes
from quip_vllm.ops.extension import cuda_library_problem, gpu_problem
from quip_vllm.ops.prepared import PreparedLayer, gpu_weight, summed
from quip_vllm.ops.rotations import bases, kernels_code, kernels_problem, rotation_base, rotations

INSTRUCTIONS = {"1mad": 4.4, "1mad_int8": 3.1, "3inst": 5.4, "hyb": 2.9, "lut": 5.0, "e8p": 2.1, "mcg": 5.4}
"""Instructions per weight of a code's main loop at 2 bits and one row, estimates for the choice of thread blocks."""
USUAL_INSTRUCTIONS = 4.5
"""The same for a code that the table does not name."""


@dataclass(frozen=True)
class CudaLayer(PreparedLayer):
    """A layer for the CUDA kernels.

    Attributes:
        kernels: the op's name of the code: which kernels of it run.
        widths: p of each rotation, in the order of `rotations`.
        output_sizes: of the op: an output head of a trellis code has whole tiles.
        thread_blocks: what `cuda_shapes.choose` chose.
        one_launch_rows: rows of x up to which one launch does all; 0 is never.
        dense_rows: rows of x from which the whole weight is decoded first; 0 is never.
        wide: empty, or rows of x from which a thread block takes up to 256, and what `cuda_shapes.choose_wide` chose.
    """

    backend = "cuda"
    kernels: str
    widths: list[int]
    output_sizes: list[int]
    thread_blocks: list[int]
    one_launch_rows: int
    dense_rows: int
    wide: list[int]

    def _rows(self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        if bias is not None and sum(self.output_sizes) > self.spec.out_features:
            bias = torch.nn.functional.pad(bias, (0, sum(self.output_sizes) - self.spec.out_features))
        return torch.ops.quip_vllm.cuda_linear(
            x,
            *gpu_weight(tensors, self.widths),
            self.output_sizes,
            bias,
            self.kernels,
            self.spec.bits,
            self.thread_blocks,
            self.one_launch_rows,
            self.dense_rows,
            self.wide,
        )

    def _rows_of_experts(
        self, x: Tensor, ids: Tensor, shares: Tensor | None, tensors: Mapping[str, Tensor], own: frozenset[str]
    ) -> Tensor:
        weight = gpu_weight(tensors, self.widths)
        y = torch.ops.quip_vllm.cuda_experts(
            x, ids, *weight, self.output_sizes, self.kernels, self.spec.bits, self.thread_blocks
        )
        return summed(y, shares)

    def _looked_up(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.ops.quip_vllm.cuda_embedding(
            ids,
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"],
            tensors["inverse_base"],
            self.widths[0],
            self.kernels.removesuffix("_int8"),
            self.spec.bits,
            dtype,
        )


class CudaBackend:
    """The fused kernels for NVIDIA GPUs from compute capability 8.0. Activations are fp16, or int8 with code 1mad.

    QUIP_VLLM_ACTIVATIONS=int8 rounds them where the code has it; fp16 is the default.
    """

    name = "cuda"
    routes = True

    def refusal(self, spec: LinearSpec) -> str | None:
        """See Backend."""
        problem = gpu_problem() or cuda_library_problem() or kernels_problem(spec)
        if problem is not None:
            return problem
        if len(spec.output_sizes) > 16:
            return f"{len(spec.output_sizes)} fused parts: the kernels take 16"
        if envs.activations() == "int8" and kernels_code(spec) != "1mad":
            return "QUIP_VLLM_ACTIVATIONS is int8, which on a GPU only code 1mad with tiles in our order has: unset it"
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> CudaLayer:
        """See Backend."""
        check(spec, tensors)
        device = tensors[SV.name].device
        gpu = gpu_of(device)
        kernels, sizes = _kernels(spec, gpu), _sizes(spec)
        prepared = {
            "packed": cuda_layout.packed_words(spec, tensors),
            "su": tensors[SU.name].float().contiguous(),
            "sv": torch.nn.functional.pad(tensors[SV.name].float(), (0, sum(sizes) - sum(spec.stored_outputs))),
        }
        table = cuda_layout.table(spec, tensors)
        if table is not None:
            prepared["table"] = table
        for name, order, _, transpose in bases(spec):
            prepared[name] = rotation_base(order, not transpose, device)  # the kernels read the columns of each
        widths = [width for _, width in rotations(spec)]
        shape, one_launch = _shape(spec, kernels, gpu, envs.one_launch_rows())
        wide = wide_of(spec, kernels, gpu, envs.wide_rows())
        return CudaLayer(spec, prepared, kernels, widths, sizes, shape, one_launch, envs.dense_rows(), wide)


def _sizes(spec: LinearSpec) -> list[int]:
    """The outputs of the op: an output head of a trellis has whole tiles."""
    if spec.rotate_output:
        return list(spec.stored_outputs)
    return [spec.out_features + -spec.out_features % spec.format.outputs_per_row]


def gpu_of(device: torch.device) -> cuda_shapes.Gpu:
    """What the choice of thread blocks needs of a GPU."""
    if device.type != "cuda":  # the emulator
        return cuda_shapes.Gpu(4, 99 * 1024, 100 * 1024)
    found: Any = torch.cuda.get_device_properties(device)  # whose stub lacks an attribute
    return cuda_shapes.Gpu(
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.shared_memory_per_multiprocessor,
        found.major == 9,
    )


def _kernels(spec: LinearSpec, gpu: cuda_shapes.Gpu) -> str:
    """The op's name of the code: which kernels of it run here."""
    code = kernels_code(spec)
    if code == "1mad" and envs.activations() == "int8":
        return "1mad_int8"
    if code in ("hyb", "e8p") and _shared(f"{code}_large", spec.bits)(1, 4, 4, 0) <= gpu.shared_block:
        return f"{code}_large"
    return code


def _shared(code: str, bits: int) -> Callable[[int, int, int, int], int]:
    return lambda *block: torch.ops.quip_vllm.cuda_shared_bytes(code, bits, *block)


@cache
def _shape(spec: LinearSpec, code: str, gpu: cuda_shapes.Gpu, one_launch_rows: int) -> tuple[list[int], int]:
    """The choice, made once for all layers of these sizes: thread blocks, and rows up to which one launch does all."""
    problem = _problem(spec, code, one_launch_rows)
    shape = cuda_shapes.choose(problem, gpu)
    return shape, min(one_launch_rows, cuda_shapes.one_launch_rows(shape, problem, gpu))


@cache
def wide_of(spec: LinearSpec, code: str, gpu: cuda_shapes.Gpu, least: int) -> list[int]:
    """The op's `wide` from `least` rows on; 0 is never."""
    chosen = cuda_shapes.choose_wide(_problem(spec, code.removesuffix("_large")), gpu) if least else []
    return [least, *chosen] if chosen else []


def _problem(spec: LinearSpec, code: str, one_launch_rows: int = 0) -> cuda_shapes.Problem:
    tables = 3 if spec.bits == 3 else 2
    table_words = {"hyb": 512 * 16, "hyb_large": 1024 * 32, "e8p": tables * 256 * 16, "e8p_large": tables * 256 * 32}
    of_x, *of_outputs = rotations(spec)
    (order, width), *others = set(of_outputs)
    return cuda_shapes.Problem(
        sum(spec.stored_outputs),
        spec.stored_in,
        spec.bits,
        INSTRUCTIONS.get(code if code == "1mad_int8" else spec.code, USUAL_INSTRUCTIONS),
        table_words.get(code, 0),
        _shared(code, spec.bits),
        0 if others or order > 1 else width,
        one_launch_rows if of_x == (1, cuda_shapes.RUN) else 0,
        lambda *block: torch.ops.quip_vllm.cuda_wide_bytes(code, spec.bits, *block),
        2 if spec.code == "e8p" and spec.bits > 2 else 1,
    )
