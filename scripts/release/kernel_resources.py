# SPDX-License-Identifier: Apache-2.0
"""Checks what the compiled CUDA kernels take of a GPU: spilled registers, local memory and registers per thread.

Usage: python scripts/release/kernel_resources.py [LIBRARY]

LIBRARY is quip_vllm/lib/libquip_vllm_cuda.so unless another is given. Prints one sentence per kernel that breaks a
rule, and exits with 1 if there is one. Needs cuobjdump, of the CUDA toolkit or of the package triton, and no GPU.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "quip_vllm" / "lib" / "libquip_vllm_cuda.so"
MOST_REGISTERS = 128
"""Per thread: the largest thread blocks have 512 threads, and a multiprocessor has 65,536 registers."""
MANY_ROWS_REGISTERS = 255
"""Per thread of the kernels for more than 16 rows, whose thread blocks have at most 256 threads."""

ARCHITECTURE = re.compile(r"^arch = (sm_\w+)", re.MULTILINE)
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
MANY_ROWS = re.compile(r"decode_gemm_kernel\w+Li8ELi\d+ELb0EEEv|(wide|wgmma)_gemm_kernel")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture.

    Attributes:
        kernel: the mangled name.
        architecture: for example "sm_90".
        registers: per thread.
        stack: bytes per thread that spilled registers and arrays take.
        local: bytes per thread of local memory beside the stack.
    """

    kernel: str
    architecture: str
    registers: int
    stack: int
    local: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what breaks a rule; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    library = parser.parse_args(arguments).library
    tool = find_cuobjdump()
    if tool is None:
        print("There is no cuobjdump: install the CUDA toolkit or the package triton.", file=sys.stderr)
        return 2
    if not library.exists():
        print(f"{library} is not there: run make build where nvcc is.", file=sys.stderr)
        return 2
    kernels = read(tool, library)
    problems = [*faults(kernels)]
    print("\n".join(problems) or f"{len(kernels)} kernels, none spills, at most {most(kernels)} registers per thread")
    return int(bool(problems))


def find_cuobjdump() -> str | None:
    """The tool on PATH or in the package triton; None where there is none."""
    package = find_spec("triton")
    inside = Path(package.origin).parent / "backends/nvidia/bin/cuobjdump" if package and package.origin else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


def read(tool: str, library: Path) -> list[Usage]:
    """One entry per kernel and architecture of a library.

    Raises:
        subprocess.CalledProcessError: the library cannot be read.
    """
    done = subprocess.run([tool, "-res-usage", str(library)], check=True, capture_output=True, text=True)
    return parse(done.stdout)


def parse(text: str) -> list[Usage]:
    """The entries of what cuobjdump prints."""
    _, *parts = ARCHITECTURE.split(text)
    return [
        Usage(kernel, architecture, int(registers), int(stack), int(local))
        for architecture, part in zip(parts[::2], parts[1::2], strict=True)
        for kernel, registers, stack, local in USAGE.findall(part)
    ]


def faults(kernels: Iterable[Usage]) -> Iterable[str]:
    """One sentence per rule that a kernel breaks."""
    for kernel in kernels:
        name = f"{kernel.kernel} on {kernel.architecture}"
        if kernel.stack or kernel.local:
            yield f"{name}: {kernel.stack + kernel.local} bytes of local memory per thread, where 0 are allowed."
        limit = MANY_ROWS_REGISTERS if MANY_ROWS.search(kernel.kernel) else MOST_REGISTERS
        if kernel.registers > limit:
            yield f"{name}: {kernel.registers} registers per thread, where {limit} are allowed."


def most(kernels: Iterable[Usage]) -> int:
    """The most registers per thread of any kernel."""
    return max(kernel.registers for kernel in kernels)


if __name__ == "__main__":
    sys.exit(main())
