# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: for NVIDIA GPUs without a compiled library. triton is imported when a layer is loaded."""

import importlib.util
from functools import partial

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import check
from quip_vllm.ops import library  # noqa: F401  # the schema must exist before its implementation
from quip_vllm.ops.extension import gpu_problem
from quip_vllm.ops.rotations import bases, kernels_problem, rotation_base, rotations
from quip_vllm.ops.triton import shapes


class TritonBackend:
    """The kernels of this folder, for compute capability 8.0 and above. Activations are fp16 inside."""

    name = "triton"

    def __init__(self) -> None:
        self.split_chunks: dict[LinearSpec, int] = {}  # chunks of a part of k: a constant to torch.compile

    def refusal(self, spec: LinearSpec) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: run `pip install triton`"
        problem = gpu_problem() or kernels_problem(spec)
        if problem is not None:
            return problem
        if envs.activations() == "int8":
            return "QUIP_VLLM_ACTIVATIONS is int8, which the Triton kernels do not have: unset it"
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from quip_vllm.ops.triton import launch

        check(spec, tensors)
        device = tensors["sv"].device
        self.split_chunks[spec] = shapes.split_chunks(spec, device)
        prepared = {
            "packed": launch.packed_words(spec, tensors),
            "su": tensors["su"].float().contiguous(),
            "sv": tensors["sv"].float().contiguous(),
        }
        table = launch.table(spec, tensors)
        if table is not None:
            prepared["table"] = table
        for name, order, width, transpose in bases(spec):
            prepared[name] = launch.base(rotation_base(order, transpose), width).to(device)
        shapes.choose(spec, device, partial(self._multiply, spec, prepared))
        if device.type == "cuda":
            self._compile(spec, prepared, device)
        return prepared

    def _multiply(self, spec: LinearSpec, prepared: dict[str, Tensor], rows: int, shape: shapes.Shape) -> None:
        """The multiplication of a layer alone, to be timed."""
        from quip_vllm.ops.triton import launch

        packed = prepared["packed"]
        x = torch.zeros(rows, launch.padded(spec.in_features), dtype=torch.float16, device=packed.device)
        layer = prepared.get("table"), list(spec.output_sizes), spec.code, spec.bits, self.split_chunks[spec]
        launch.multiply(x, packed, *layer, shape)

    def _compile(self, spec: LinearSpec, prepared: dict[str, Tensor], device: torch.device) -> None:
        """Runs every kernel that the layer may need, so that none is compiled while a CUDA graph is captured."""
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for rows in shapes.ROWS:
                self.linear(spec, torch.zeros(rows, spec.in_features, dtype=dtype, device=device), prepared)
            if not spec.rotate_output:
                self.embedding(spec, torch.zeros(1, dtype=torch.int64, device=device), prepared, dtype)

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        widths = [width for _, width in rotations(spec)]
        y = torch.ops.quip_vllm.triton_linear(
            x.reshape(-1, spec.in_features).contiguous(),
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"],
            [tensors[f"base{i}"] for i in range(len(widths))],
            widths,
            list(spec.output_sizes),
            spec.code,
            spec.bits,
            self.split_chunks[spec],
        )
        y = y.reshape(*x.shape[:-1], spec.out_features)
        return y if bias is None else y + bias

    def embedding(self, spec: LinearSpec, ids: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        rows = torch.ops.quip_vllm.triton_embedding(
            ids.reshape(-1).contiguous(),
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"],
            tensors["inverse_base"],
            rotations(spec)[0][1],
            spec.code,
            spec.bits,
            dtype,
        )
        return rows.reshape(*ids.shape, spec.in_features)


@torch.library.impl("quip_vllm::triton_linear", ("cuda", "cpu"))
def _(x, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks):
    from quip_vllm.ops.triton import launch

    return launch.linear(x, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks)


@torch.library.impl("quip_vllm::triton_embedding", ("cuda", "cpu"))
def _(ids, packed, table, su, sv, base, width, code, bits, dtype):
    from quip_vllm.ops.triton import launch

    return launch.embedding(ids, packed, table, su, sv, base, width, code, bits, dtype)
