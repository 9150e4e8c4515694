# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: for NVIDIA GPUs without a compiled library. triton is imported when a layer is loaded."""

import importlib.util

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.methods import Code
from quip_vllm.formats.tile import TILE
from quip_vllm.ops import cuda_layout, library  # noqa: F401  # the schema must exist before its implementation
from quip_vllm.ops.spec import LinearSpec
from quip_vllm.ops.tensors import bases, check, rotation_base, rotations, sizes_problem

ROWS = (8, 16, 32, 64)
"""Rows of x that a program multiplies: the least that hold all, else blocks of 64."""

WARPS = {8: 4, 9: 2, 10: 2, 12: 4}
"""Warps, and tiles, of a program, by the first digit of the compute capability.

With four warps Triton would multiply by wgmma on 9.0 and by tcgen05 on 10.0, which take the weight in another order.
"""

WARPS_PER_MULTIPROCESSOR = 32
"""What the parts of k aim at: enough to hide the memory's latency."""

SPLIT_CHUNKS = 8
"""Chunks that a part of k has at least: its partial sums cost as much to write and read as a chunk's words."""


class TritonBackend:
    """The kernels of this folder, for compute capability 8.0 and above. Activations are fp16 inside."""

    name = "triton"

    def __init__(self) -> None:
        self.plans: dict[LinearSpec, list[int]] = {}  # warps, chunks of a part of k: constants to torch.compile

    def refusal(self, spec: LinearSpec) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: run `pip install triton`"
        if torch.version.hip is not None:
            return "this is an AMD GPU, for which the kernels are not proved yet"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            major, minor = torch.cuda.get_device_capability()
            return f"this GPU has compute capability {major}.{minor}: Triton emits no tensor-core code below 8.0"
        problem = sizes_problem(spec)
        if problem is not None:
            return problem
        if envs.activations() == "int8":
            return "QUIP_VLLM_ACTIVATIONS is int8, which the Triton kernels do not have: unset it"
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from quip_vllm.ops.triton import launch

        check(spec, tensors)
        device = tensors["sv"].device
        warps, multiprocessors = _gpu(device)
        self.plans[spec] = [warps, _split_chunks(spec, warps, multiprocessors)]
        prepared = {
            "packed": launch.packed_words(spec, tensors),
            "su": tensors["su"].float().contiguous(),
            "sv": tensors["sv"].float().contiguous(),
        }
        table = launch.table(spec, tensors)
        if table is not None:
            prepared["table"] = table
        if spec.code is Code.HYB and len(spec.output_sizes) > 1:
            prepared["blocks"] = _blocks(spec, warps).to(device)
        for name, order, width, transpose in bases(spec):
            prepared[name] = launch.base(rotation_base(order, transpose), width).to(device)
        if device.type == "cuda":
            self._compile(spec, prepared, device)
        return prepared

    def _compile(self, spec: LinearSpec, prepared: dict[str, Tensor], device: torch.device) -> None:
        """Runs every kernel that the layer may need, so that none is compiled while a CUDA graph is captured."""
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for rows in ROWS:
                self.linear(spec, torch.zeros(rows, spec.in_features, dtype=dtype, device=device), prepared)
            if not spec.rotate_output:
                self.embedding(spec, torch.zeros(1, dtype=torch.int64, device=device), prepared, dtype)

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        widths = [width for _, width in rotations(spec)]
        y = torch.ops.quip_vllm.triton_linear(
            x.reshape(-1, spec.in_features).contiguous(),
            tensors["packed"],
            tensors.get("table"),
            tensors.get("blocks"),
            tensors["su"],
            tensors["sv"],
            [tensors[f"base{i}"] for i in range(len(widths))],
            widths,
            list(spec.output_sizes),
            spec.code_name,
            spec.bits,
            self.plans[spec],
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
            spec.code_name,
            spec.bits,
            dtype,
        )
        return rows.reshape(*ids.shape, spec.in_features)


def _gpu(device: torch.device) -> tuple[int, int]:
    """Warps of a program, and multiprocessors."""
    if device.type != "cuda":  # Triton's interpreter
        return 4, 4
    found = torch.cuda.get_device_properties(device)
    return WARPS.get(found.major, 2), found.multi_processor_count


def _split_chunks(spec: LinearSpec, warps: int, multiprocessors: int) -> int:
    """Chunks of a part of k: the same for any number of rows, so that the order of summation is."""
    tiles, chunks = -(-spec.out_features // TILE), -(-spec.in_features // cuda_layout.CHUNK)
    wanted = multiprocessors * WARPS_PER_MULTIPROCESSOR // (-(-tiles // warps) * warps)
    splits = max(1, min(wanted, chunks // SPLIT_CHUNKS))
    return -(-chunks // splits)


def _blocks(spec: LinearSpec, warps: int) -> Tensor:
    """int32 [programs, 3]: the first tile, the tile behind the projection's last, the projection."""
    rows, start = [], 0
    for i, size in enumerate(spec.output_sizes):
        end = start + size // TILE
        rows += [(first, end, i) for first in range(start, end, warps)]
        start = end
    return torch.tensor(rows, dtype=torch.int32)


@torch.library.impl("quip_vllm::triton_linear", ("cuda", "cpu"))
def _(x, packed, table, blocks, su, sv, bases, widths, output_sizes, code, bits, plan):
    from quip_vllm.ops.triton import launch

    return launch.linear(x, packed, table, blocks, su, sv, bases, widths, output_sizes, code, bits, plan)


@torch.library.impl("quip_vllm::triton_embedding", ("cuda", "cpu"))
def _(ids, packed, table, su, sv, base, width, code, bits, dtype):
    from quip_vllm.ops.triton import launch

    return launch.embedding(ids, packed, table, su, sv, base, width, code, bits, dtype)
