# SPDX-License-Identifier: Apache-2.0
"""Every environment variable the package reads.

The compiled CPU library reads one more, QUIP_VLLM_CPU_TIER (kernels/cpu/tiers.cpp): the name of an instruction-set
tier lowers it; unset, it takes the best that the CPU has.
"""

import os


def backend() -> str | None:
    """QUIP_VLLM_BACKEND: run this backend and no other (cpu, cuda, triton, reference); unset: the first that can."""
    return os.environ.get("QUIP_VLLM_BACKEND") or None


def activations() -> str | None:
    """QUIP_VLLM_ACTIVATIONS: exact or int8; unset: on a CPU int8 for 16-bit activations where the kernels have it."""
    wanted = os.environ.get("QUIP_VLLM_ACTIVATIONS") or None
    if wanted not in (None, "exact", "int8"):
        raise ValueError(f"QUIP_VLLM_ACTIVATIONS is {wanted!r}: give exact or int8, or unset it")
    return wanted


def dense_rows() -> int:
    """QUIP_VLLM_DENSE_ROWS: rows of x from which the CUDA backend decodes a whole layer, for cuBLAS to multiply by.

    256 unless set. 0 is never: then a row's bits do not depend on how many rows there are.
    """
    return _rows("QUIP_VLLM_DENSE_ROWS", 256)


def one_launch_rows() -> int:
    """QUIP_VLLM_ONE_LAUNCH_ROWS: rows of x up to which the CUDA backend may take one launch for a layer, not three.

    0, never, unless set: it has not run on a GPU. 16 is the most that it can.
    """
    return _rows("QUIP_VLLM_ONE_LAUNCH_ROWS", 0)


def wide_rows() -> int:
    """QUIP_VLLM_WIDE_ROWS: rows of x from which the CUDA backend decodes a tile once for up to 256 rows, where it can.

    0, never, unless set: it has not run on a GPU. It comes before QUIP_VLLM_DENSE_ROWS.
    """
    return _rows("QUIP_VLLM_WIDE_ROWS", 0)


def _rows(name: str, usual: int) -> int:
    wanted = os.environ.get(name) or str(usual)
    if not wanted.isdecimal():
        raise ValueError(f"{name} is {wanted!r}: give a number of rows, 0 for never, or unset it")
    return int(wanted)


def triton_tune() -> bool:
    """QUIP_VLLM_TRITON_TUNE: 1 takes the fastest shapes of the Triton kernels, timed at load; unset or 0: a table's."""
    wanted = os.environ.get("QUIP_VLLM_TRITON_TUNE") or "0"
    if wanted not in ("0", "1"):
        raise ValueError(f"QUIP_VLLM_TRITON_TUNE is {wanted!r}: give 1 or 0, or unset it")
    return wanted == "1"
