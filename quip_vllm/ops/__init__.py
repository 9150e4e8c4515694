# SPDX-License-Identifier: Apache-2.0
"""How the formats run: ``select_backend`` gives the backend of a layer, ``encode_*`` are the quantizer's searches."""

from typing import Any

import torch
from torch import Tensor

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.dispatch import Backend, prepare, prepare_experts, select_backend
from quip_vllm.ops.extension import require_cpu_library, require_cuda_library
from quip_vllm.ops.reference import dequantize

__all__ = [
    "Backend",
    "LinearSpec",
    "dequantize",
    "encode_lattice",
    "encode_trellis",
    "prepare",
    "prepare_experts",
    "select_backend",
]


def encode_trellis(targets: Tensor, values: Tensor, bits: int) -> Tensor:
    """Tail-biting Viterbi search (QTIP, arXiv 2406.11235, section 3.1 and algorithm 4).

    A GPU searches what lies on it, by the sums of the CPU's search with float costs; the CPU searches all else.

    Args:
        targets: float32 [count, 256], sequences in tile order.
        values: float32 [65536, vector_dim], the value of each state.
        bits: bits per weight; bits * vector_dim is at most 8.

    Returns:
        int32 [count, 256 / vector_dim]: states, a valid tail-biting walk each.

    Raises:
        RuntimeError: the compiled library is missing, or the shapes are wrong.
    """
    return _searched("encode_trellis", targets, values.T, bits)


def encode_lattice(x: Tensor) -> Tensor:
    """The nearest E8P code of each 8-vector, exactly (QuIP#, arXiv 2402.04396, section 4.2).

    Args:
        x: float32 [count, 8].

    Returns:
        int16 [count]. Between equally near points any may be returned; CPU and GPU return the same.
    """
    return _searched("encode_lattice", x)


def _searched(op: str, x: Tensor, *more: Any) -> Tensor:
    """The result of a search for x: the GPU's where x lies on one, else the CPU's."""
    device = x.device if x.is_cuda else torch.device("cpu")
    given = [one.to(device).contiguous() if isinstance(one, Tensor) else one for one in (x, *more)]
    if not x.is_cuda:
        require_cpu_library()
        return getattr(torch.ops.quip_vllm, op)(*given).to(x.device)
    require_cuda_library()
    return getattr(torch.ops.quip_vllm, f"cuda_{op}")(*given)


def cpu_tier() -> str:
    """The instruction-set tier that the CPU kernels run at (docs/kernels.md lists them)."""
    require_cpu_library()
    return torch.ops.quip_vllm.cpu_tier()


def cpu_tiers() -> dict[str, dict[str, bool]]:
    """The tiers of the CPU library, best first: the features that each needs, and whether this CPU has them."""
    require_cpu_library()
    lines = (line.split() for line in torch.ops.quip_vllm.cpu_tiers().splitlines())
    return {name: {feature[1:]: feature[0] == "+" for feature in features} for name, *features in lines}
