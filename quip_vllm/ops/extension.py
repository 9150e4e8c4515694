# SPDX-License-Identifier: Apache-2.0
"""Finds the compiled libraries, or says in one sentence what is missing."""

from functools import cache
from pathlib import Path

import torch

from quip_vllm.ops import library  # noqa: F401  # the schemas must exist before their implementations load

CPU_LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libquip_vllm_cpu.so"


@cache
def cpu_library_problem() -> str | None:
    """Loads the CPU library once. Returns None when it is loaded, else one sentence with the remedy."""
    if not CPU_LIBRARY.exists():
        return f"the compiled library {CPU_LIBRARY} is not there: run `make build` (needs g++)"
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        return f"the compiled library does not load ({error}): delete it and run `make build` with this torch"
    return None


def require_cpu_library() -> None:
    """Raises RuntimeError with the remedy unless the CPU library is loaded."""
    problem = cpu_library_problem()
    if problem is not None:
        raise RuntimeError(problem)
