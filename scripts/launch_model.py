# SPDX-License-Identifier: Apache-2.0
"""What a linear layer of one row costs with three launches, with two and with one, by the model of cuda_shapes.py.

Usage: python scripts/launch_model.py

Prints a table, in microseconds, of HYB at 2 bits with block Hadamards of width 128. It needs no GPU, but the built CUDA
library, which says how much shared memory a thread block takes. Two launches: the output rotation is in the product's
epilogue, so k is whole. One: each thread block also rotates all of x. Each variant has its best thread blocks.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

from gpu_model import GPUS, TARGETS

from quip_vllm.ops import LinearSpec, cuda, cuda_shapes
from quip_vllm.ops.cuda_shapes import Candidate, Gpu, Problem
from quip_vllm.ops.extension import cuda_library_problem

LAYERS = {  # n, k
    "8B o_proj": (4096, 4096),
    "8B qkv_proj": (6144, 4096),
    "8B gate_up_proj": (28672, 4096),
    "8B down_proj": (4096, 14336),
    "70B qkv_proj": (10240, 8192),
    "70B gate_up_proj": (57344, 8192),
}
"""Those of Llama 3."""

ROTATION_INSTRUCTIONS = 40
"""For an element of x, that rotate_in would issue without its generic addresses: 123 in PTX, of which ptxas keeps about
half (an estimate, in favour of one launch)."""
ROTATION_LATENCY = 1300
"""Cycles: loads of x and su, three passes of butterflies, the largest of a row, with a barrier each (an estimate)."""


def main() -> int:
    """Prints the table; returns the exit code."""
    problem = cuda_library_problem()
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    print("| layer | GPU | three launches | two | one |\n|---|---|---|---|---|")
    for layer, (n, k) in LAYERS.items():
        for name in ("A100", "H100", "RTX 4090"):
            product, target = GPUS[name], TARGETS[GPUS[name].target]
            gpu = Gpu(product.multiprocessors, target.shared_block, target.shared)
            spec = LinearSpec("hyb", 2, k, (n,), 128)
            sizes = cuda._problem(spec, cuda._code(spec, gpu))
            cells = [
                f"{cycles / product.ghz / 1000:.1f}" for cycles in (apart(sizes, gpu), two(sizes, gpu), one(sizes, gpu))
            ]
            print(f"| {layer}, {n} x {k} | {name} | {' | '.join(cells)} |")
    return 0


def apart(problem: Problem, gpu: Gpu) -> float:
    """Cycles of three launches. The input rotation's launch takes as long as the output's."""
    return best(replace(problem, width=0), gpu, lambda _: cuda_shapes.OUTPUT_CYCLES)


def two(problem: Problem, gpu: Gpu) -> float:
    """Cycles of the input rotation's launch and the product's."""
    return best(problem, gpu, lambda c: cuda_shapes.OUTPUT_CYCLES if cuda_shapes.fuses(c, problem) else float("inf"))


def one(problem: Problem, gpu: Gpu) -> float:
    """Cycles of one launch: x is rotated once for each thread block of a multiprocessor."""

    def rotation(c: Candidate) -> float:
        if not cuda_shapes.fuses(c, problem):
            return float("inf")
        blocks = -(-problem.n // (cuda_shapes.ROW_TILES * cuda_shapes.TILE * c.warps_n))
        own = -(-blocks // gpu.multiprocessors)
        issue = own * problem.k / 32 * ROTATION_INSTRUCTIONS / cuda_shapes.SCHEDULERS
        waves = -(-own // cuda_shapes.resident(c, problem, gpu, 1))
        return issue + waves * ROTATION_LATENCY

    return best(problem, gpu, rotation)


def best(problem: Problem, gpu: Gpu, more: Callable[[Candidate], float]) -> float:
    """The least cycles of any thread block for one row, with what the variant adds."""
    fitting = [c for c in cuda_shapes.candidates(problem) if cuda_shapes.refusal(c, problem, gpu, 1) is None]
    return min(cuda_shapes.cycles(c, problem, gpu, 1) + more(c) for c in fitting)


if __name__ == "__main__":
    sys.exit(main())
