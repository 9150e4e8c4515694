# SPDX-License-Identifier: Apache-2.0
"""Finds the compiled libraries and the GPU, or says in one sentence what is missing."""

from functools import cache
from pathlib import Path

import torch

from quip_vllm.ops import library  # noqa: F401  # the schemas must exist before their implementations load

CPU_LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libquip_vllm_cpu.so"
CUDA_LIBRARY = CPU_LIBRARY.with_name("libquip_vllm_cuda.so")


@cache
def cpu_library_problem() -> str | None:
    """Loads the CPU library once. Returns None when it is loaded, else one sentence with the remedy."""
    return _load(CPU_LIBRARY, "a C++20 compiler")


@cache
def cuda_library_problem() -> str | None:
    """Loads the CUDA library once. Returns None when it is loaded, else one sentence with the remedy."""
    return _load(CUDA_LIBRARY, "nvcc")


def _load(path: Path, compiler: str) -> str | None:
    if not path.exists():
        return (
            f"the compiled library {path} is not there: install quip-vllm again where {compiler} is on the "
            "PATH, or run `make build` in its source tree"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled library does not load ({error}): install quip-vllm again beside this torch"
    return None


def usable_device(name: str) -> torch.device:
    """The device of a name, as cpu or cuda:1. Raises ValueError where torch cannot use it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        said = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--device is {name}, which torch cannot use here ({said}): give cpu, or a device it has"
        ) from None


def gpu_problem() -> str | None:
    """Returns None where a kernel for GPUs may run, or torch sees no GPU, else one sentence with the remedy."""
    if torch.version.hip is not None:
        return (
            f"this torch is for AMD GPUs (ROCm {torch.version.hip}): the kernels are for NVIDIA's; take one, or a CPU"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"this GPU has compute capability {found}: the kernels need 8.0 or above; take a newer one, or a CPU"
    return None


def require_cpu_library() -> None:
    """Raises RuntimeError with the remedy unless the CPU library is loaded."""
    _require(cpu_library_problem())


def require_cuda_library() -> None:
    """Raises RuntimeError with the remedy unless the CUDA library is loaded and may run on the GPU."""
    _require(gpu_problem() or cuda_library_problem())


def _require(problem: str | None) -> None:
    if problem is not None:
        raise RuntimeError(problem)
