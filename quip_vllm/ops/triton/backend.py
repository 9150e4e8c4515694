# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: for NVIDIA GPUs without a compiled library. triton is imported when a layer is loaded."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.tensors import SU, SV, check
from quip_vllm.ops import library  # noqa: F401  # the schema must exist before its implementation
from quip_vllm.ops.extension import gpu_problem
from quip_vllm.ops.prepared import PreparedExperts, PreparedLayer, gpu_weight, summed
from quip_vllm.ops.rotations import bases, kernels_code, kernels_problem, rotation_base, rotations
from quip_vllm.ops.triton import shapes


@dataclass(frozen=True)
class TritonLayer(PreparedLayer):
    """A layer for the Triton kernels.

    Attributes:
        widths: p of each rotation, in the order of `rotations`.
        split_chunks: chunks of a part of k.
        shapes: what `shapes.choose` chose.
    """

    backend = "triton"
    widths: list[int]
    split_chunks: int
    shapes: list[int]

    def _rows(self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        y = torch.ops.quip_vllm.triton_linear(x, *self._weight(tensors))
        return y if bias is None else y[:, : self.spec.out_features] + bias

    def _rows_of_experts(
        self, x: Tensor, ids: Tensor, shares: Tensor | None, tensors: Mapping[str, Tensor], own: frozenset[str]
    ) -> Tensor:
        return summed(torch.ops.quip_vllm.triton_experts(x, ids, *self._weight(tensors)), shares)

    def ready(self, experts: PreparedExperts) -> PreparedExperts:
        """See PreparedLayer: the tables at an address of theirs, and every kernel compiled."""
        from quip_vllm.ops.triton import launch

        tensors = dict(experts.tensors)
        if "table" in experts.own:
            tensors["table"] = launch.aligned_table(self.spec.code, tensors["table"])
        experts = replace(experts, tensors=tensors)
        count, device = len(tensors["su"]), tensors["su"].device
        for x in _inputs(self.spec, device, (1, 8 * count, 8 * count + 1)) if device.type == "cuda" else ():
            experts.linear(x, torch.zeros(len(x), 1, dtype=torch.int64, device=device))
        return experts

    def _weight(self, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What both ops want of the layer."""
        return (
            *gpu_weight(tensors, self.widths),
            list(self.spec.stored_outputs),
            kernels_code(self.spec),
            self.spec.bits,
            self.split_chunks,
            self.shapes,
        )

    def _looked_up(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.ops.quip_vllm.triton_embedding(
            ids,
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"],
            tensors["inverse_base"],
            self.widths[0],
            kernels_code(self.spec),
            self.spec.bits,
            dtype,
        )


class TritonBackend:
    """The kernels of this folder, for compute capability 8.0 and above. Activations are fp16 inside."""

    name = "triton"
    routes = True

    def refusal(self, spec: LinearSpec) -> str | None:
        """See Backend."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: run `pip install triton`"
        problem = gpu_problem() or kernels_problem(spec, (TileOrder.ROW_MAJOR,))
        if problem is not None:
            return problem
        if envs.activations() == "int8":
            return "QUIP_VLLM_ACTIVATIONS is int8, which the Triton kernels do not have: unset it"
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> TritonLayer:
        """See Backend."""
        from quip_vllm.ops.triton import launch

        check(spec, tensors)
        device = tensors[SV.name].device
        prepared = {
            "packed": launch.packed_words(spec, tensors),
            "su": tensors[SU.name].float().contiguous(),
            "sv": tensors[SV.name].float().contiguous(),
        }
        table = launch.table(spec, tensors)
        if table is not None:
            prepared["table"] = table
        for name, order, width, transpose in bases(spec):
            prepared[name] = _base(order, transpose, width, device)
        split_chunks = shapes.split_chunks(spec, device)

        def multiply(rows: int, shape: shapes.Shape) -> None:
            x = torch.zeros(rows, launch.padded(spec.stored_in), dtype=torch.float16, device=device)
            layer = prepared.get("table"), list(spec.stored_outputs), kernels_code(spec), spec.bits, split_chunks
            launch.multiply(x, prepared["packed"], *layer, shape)

        widths = [width for _, width in rotations(spec)]
        layer = TritonLayer(spec, prepared, widths, split_chunks, shapes.choose(spec, device, multiply))
        if device.type == "cuda":
            for x in _inputs(spec, device, shapes.ROWS):
                layer.linear(x)
                if not spec.rotate_output:
                    layer.embedding(torch.zeros(1, dtype=torch.int64, device=device), x.dtype)
        return layer


@cache
@torch.inference_mode(False)
def _base(order: int, transpose: bool, width: int, device: torch.device) -> Tensor:
    """One for all layers: do not write to it."""
    from quip_vllm.ops.triton import launch

    return launch.base(rotation_base(order, transpose), width).to(device)


def _inputs(spec: LinearSpec, device: torch.device, counts: Sequence[int]) -> Iterator[Tensor]:
    """Yields x for every kernel that may be needed, so that none is compiled while a CUDA graph is captured."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows in counts:
            yield torch.zeros(rows, spec.in_features, dtype=dtype, device=device)


@torch.library.impl("quip_vllm::triton_linear", ("cuda", "cpu"))
def _(x, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks, shapes):
    from quip_vllm.ops.triton import launch

    with torch.cuda.device_of(x):  # on which Triton launches
        return launch.linear(x, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks, shapes)


@torch.library.impl("quip_vllm::triton_experts", ("cuda", "cpu"))
def _(x, ids, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks, shapes):
    from quip_vllm.ops.triton import launch

    with torch.cuda.device_of(x):
        return launch.linear(
            x, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks, shapes, ids
        )


@torch.library.impl("quip_vllm::triton_embedding", ("cuda", "cpu"))
def _(ids, packed, table, su, sv, base, width, code, bits, dtype):
    from quip_vllm.ops.triton import launch

    with torch.cuda.device_of(ids):
        return launch.embedding(ids, packed, table, su, sv, base, width, code, bits, dtype)
