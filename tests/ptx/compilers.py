# SPDX-License-Identifier: Apache-2.0
"""PTX from CUDA C++ and from Triton; neither compiler needs a GPU."""

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from ptx.interpreter import Program

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
NO_NVCC = "no nvcc on the PATH or in NVCC"


def cuda(source: str) -> Program:
    """Compiles a kernel that uses kernels/cuda/device.h; skips the test where there is no nvcc."""
    return cuda_program('#include "device.h"\nusing namespace quip::device;\n' + source)


@lru_cache
def cuda_program(source: str, architecture: str = "sm_80", options: tuple[str, ...] = ()) -> Program:
    """Compiles CUDA C++ that may include the files of kernels/cuda; skips the test where there is no nvcc.

    Args:
        source: The C++ text.
        architecture: nvcc's -arch.
        options: Further options of nvcc.

    Returns:
        The program.
    """
    if NVCC is None:
        pytest.skip(NO_NVCC)
    command = [NVCC, "-ptx", f"-arch={architecture}", "-std=c++17", f"-I{KERNELS}", *options]
    done = subprocess.run([*command, "-x", "cu", "-", "-o", "-"], input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Program(done.stdout)


def triton_program(function, signature: dict, constants: dict, options: dict | None = None) -> tuple[Program, int, int]:
    """Compiles a Triton kernel for sm_80, whose instructions the interpreter knows.

    Args:
        function: The kernel made by triton.jit.
        signature: Triton's types of the arguments; "constexpr" for the constants.
        constants: Values of the constants.
        options: Compiler options such as num_warps.

    Returns:
        The program, the threads of a block and the bytes of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(function, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options or {})
    return Program(compiled.asm["ptx"]), compiled.metadata.num_warps * 32, compiled.metadata.shared
