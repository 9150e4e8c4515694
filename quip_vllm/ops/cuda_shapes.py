# SPDX-License-Identifier: Apache-2.0
"""Which thread blocks multiply a layer: candidates, a reason for each refusal, and a model of their cost.

Chosen once, when a layer is loaded, for one, up to 8, up to 16 and more rows. All cut k alike, so an output's sum has
one order whatever the number of rows. Nothing is timed, so it is safe while a CUDA graph is captured.

Where the output rotation is within a thread block and k is whole, the product's epilogue applies it: no second launch,
but no parts of k either, which a layer of few outputs needs to occupy a GPU. The model weighs one against the other.

Where x is rotated in blocks of 128, too, and the rows are few, the product can be the only launch: its thread blocks
rotate what they multiply, each for itself, and the last to come adds the parts of k. That pays while rotating so often
takes less than the launches that it saves.

From some row on, if that is asked for, thread blocks of another kind multiply up to 256 rows at once (`choose_wide`).
They add the products of k in another order, which is one for all row counts up to what a thread block takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil

from quip_vllm.formats.tile import TILE
from quip_vllm.ops.cuda_layout import CHUNK, SPARE_CHUNKS

WARPS_K, ROW_TILES, WARPS_PER_SM, SCHEDULERS = 2, 2, 48, 4
RUN = 128
"""Width of the input rotations that a thread block of the product can do."""
ROWS = (1, 8, 16, 64)
"""Rows of x up to which each of a layer's four shapes is used; more are cut in blocks of 64."""

START_CYCLES = 2500
"""Of a thread block: the first copies, the last exchange, and its share of the launch (an estimate)."""
CHUNK_CYCLES = 300
"""Least time of a chunk of one warp, when nothing else hides the latencies of decoding it (an estimate)."""
OUTPUT_CYCLES = 3000
"""The output rotation's launch: 1 us from one kernel of a CUDA graph to the next, 1 us from loads to stores (an
estimate; a GPU's microsecond has 1400 to 2500 cycles)."""
SPLIT_CYCLES = 400
"""What each part of k adds to it (an estimate)."""
INPUT_CYCLES = 3000
"""The input rotation's launch, likewise (an estimate)."""
PROLOGUE_CYCLES = 1500
"""Least time of the input rotation in the prologue: x is read twice, and a barrier (an estimate)."""
RUN_INSTRUCTIONS, LARGEST_INSTRUCTIONS = 150, 30
"""There, of a warp, for 128 numbers of a row: to rotate them, and to find the row's largest (estimates)."""
LAST_CYCLES = 3000
"""Until the counters are clear and a thread block, the last to come, has the others' sums (an estimate)."""
WIDE_WARPS = 8
"""Of a thread block for many rows, each of which decodes a share of its 8 tiles, or of 4 of a code of two stages."""
WIDE_ROWS = (256, 128, 64)
"""Rows of x that such a thread block multiplies: the most for which there is shared memory."""
MULTIPLICATION_CYCLES, WGMMA_CYCLES = 2, 1
"""Of a multiprocessor, for 16 outputs, 8 rows and 16 inputs (estimates)."""
WIDE_SPLIT_CYCLES = 30
"""What a part of k adds to the output rotation, a row of x (an estimate)."""
EPILOGUE_CYCLES = 700
"""The output rotation in the epilogue: some seven barriers with a pass through shared memory each (an estimate)."""


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on.

    Attributes:
        multiprocessors: how many.
        shared_block, shared_multiprocessor: bytes of shared memory that each may have.
        wgmma: whether it multiplies asynchronously; only compute capability 9.0 does in this way.
    """

    multiprocessors: int
    shared_block: int
    shared_multiprocessor: int
    wgmma: bool = False


@dataclass(frozen=True)
class Problem:
    """A layer on a GPU.

    Attributes:
        n, k, bits: outputs (of all fused projections), inputs, code bits per weight.
        instructions: per weight, of the code's main loop.
        shared: bytes of shared memory of (rows, warps_n, depth, chunks), 0 where no kernel is compiled for them; chunks
            are those of a part of k in the only launch, and 0 in one of three.
        table_words: of the table that a block copies before it starts.
        width: of the output rotations, if all have one and no base; else 0.
        one_launch_rows: rows of x up to which one launch may do all; 0 where the input rotation does not allow it.
        wide_shared: bytes of shared memory of a thread block for many rows, of (rows, whether by wgmma), 0 where no
            kernel is compiled.
        stages: of the code.
    """

    n: int
    k: int
    bits: int
    instructions: float
    table_words: int
    shared: Callable[[int, int, int, int], int]
    width: int = 0
    one_launch_rows: int = 0
    wide_shared: Callable[[int, bool], int] = lambda rows, wgmma: 0
    stages: int = 1


@dataclass(frozen=True)
class Candidate:
    """A thread block: warps along the outputs, chunks that a warp takes in a stage, chunks of a part of k."""

    warps_n: int
    depth: int
    split_chunks: int


def refusal(candidate: Candidate, problem: Problem, gpu: Gpu, rows: int) -> str | None:
    """Why a candidate cannot run, or None."""
    shared = problem.shared(rows, candidate.warps_n, candidate.depth, 0)
    if shared == 0:
        return f"no kernel for {rows} rows has thread blocks of {candidate.warps_n} warps and depth {candidate.depth}"
    if shared > gpu.shared_block:
        return f"{shared} bytes of shared memory: a block has {gpu.shared_block}"
    return None


def within(candidate: Candidate, problem: Problem) -> bool:
    """Whether each output rotation is within a thread block: `fuses` of kernels/cuda/bindings_linear.cu."""
    return problem.width > 0 and candidate.warps_n * ROW_TILES * TILE % problem.width == 0


def fuses(candidate: Candidate, problem: Problem) -> bool:
    """Whether the product's epilogue applies the output rotation in one launch of two."""
    return candidate.split_chunks >= -(-problem.k // CHUNK) and within(candidate, problem)


def can_be_alone(candidate: Candidate, problem: Problem, gpu: Gpu, rows: int) -> bool:
    """Whether the product can be the only launch."""
    if rows > problem.one_launch_rows or not within(candidate, problem):
        return False
    return 0 < problem.shared(rows, candidate.warps_n, candidate.depth, _chunks(candidate, problem)) <= gpu.shared_block


def _chunks(candidate: Candidate, problem: Problem) -> int:
    return min(candidate.split_chunks, -(-problem.k // CHUNK))


def resident(candidate: Candidate, problem: Problem, gpu: Gpu, rows: int, alone: bool = False) -> int:
    """Thread blocks that a multiprocessor holds."""
    chunks = _chunks(candidate, problem) if alone else 0
    shared = problem.shared(rows, candidate.warps_n, candidate.depth, chunks) + 1024
    return max(1, min(gpu.shared_multiprocessor // shared, WARPS_PER_SM // (candidate.warps_n * WARPS_K)))


def cycles(candidate: Candidate, problem: Problem, gpu: Gpu, rows: int, alone: bool = False) -> float:
    """The model: waves of thread blocks, each as long as its instructions take to issue or a warp's chunks to pass.

    alone: as the only launch; else with the rotations' launches.
    """
    tiles, chunks = -(-problem.n // TILE), -(-problem.k // CHUNK)
    splits = -(-chunks // candidate.split_chunks)
    warps = candidate.warps_n * WARPS_K
    blocks = -(-tiles // (ROW_TILES * candidate.warps_n)) * splits
    together = min(resident(candidate, problem, gpu, rows, alone), -(-blocks // gpu.multiprocessors))
    waves = -(-blocks // (gpu.multiprocessors * together))
    steps = -(-candidate.split_chunks // WARPS_K)
    stage = 70 / candidate.depth  # instructions beside the decoding, by chunk
    issue = steps * together * warps * (CHUNK * problem.instructions + stage) / SCHEDULERS  # 64 weights a lane
    table = 4 * problem.table_words / (32 * SCHEDULERS) * together
    work = START_CYCLES + table + max(issue, steps * CHUNK_CYCLES)
    if alone:
        runs = rows * _chunks(candidate, problem) * CHUNK / RUN, rows * problem.k / RUN
        rotate = (runs[0] * RUN_INSTRUCTIONS + runs[1] * LARGEST_INSTRUCTIONS) * together / SCHEDULERS
        last = LAST_CYCLES + splits * SPLIT_CYCLES if splits > 1 else 0
        return waves * (work + max(PROLOGUE_CYCLES, rotate) + EPILOGUE_CYCLES) + last
    end = EPILOGUE_CYCLES * waves if fuses(candidate, problem) else OUTPUT_CYCLES + splits * SPLIT_CYCLES
    return INPUT_CYCLES + waves * work + end


def pays(candidate: Candidate, problem: Problem, gpu: Gpu, rows: int) -> bool:
    """Whether one launch can do all, in less time than three."""
    if not can_be_alone(candidate, problem, gpu, rows):
        return False
    return cycles(candidate, problem, gpu, rows, alone=True) < cycles(candidate, problem, gpu, rows)


def candidates(problem: Problem) -> list[Candidate]:
    """Every shape there is; a part of k is a multiple of what a stage takes, or all."""
    chunks = -(-problem.k // CHUNK)
    parts = sorted({-(-chunks // (splits * SPARE_CHUNKS)) * SPARE_CHUNKS for splits in range(1, 33)})
    return [Candidate(warps, depth, part) for warps in (8, 4, 2, 1) for depth in (4, 2, 1) for part in parts]


def choose(problem: Problem, gpu: Gpu) -> list[int]:
    """The `shape` of the op: chunks of a part of k, then warps and depth for each of ROWS (more rows: depth is 1).

    Raises:
        ValueError: no candidate fits the GPU.
    """
    every = candidates(problem)
    shape: list[int] = []
    for rows in ROWS:
        refused = {c: refusal(c, problem, gpu, rows) for c in every}
        fitting = [c for c in every if refused[c] is None and (not shape or c.split_chunks == shape[0])]
        if not fitting:
            reasons = "; ".join(sorted({reason for reason in refused.values() if reason}))
            raise ValueError(f"no thread block multiplies {rows} rows by {problem.n} x {problem.k} here: {reasons}")
        best = min(fitting, key=lambda c: cycles(c, problem, gpu, rows, pays(c, problem, gpu, rows)))
        shape += [best.warps_n, best.depth] if shape else [best.split_chunks, best.warps_n, best.depth]
    return shape[:-1]


def one_launch_rows(shape: list[int], problem: Problem, gpu: Gpu) -> int:
    """Rows of x up to which one launch does all, with what `choose` chose: 0, or one of ROWS."""
    most = 0
    for rows, warps, depth in zip(ROWS, shape[1:-1:2], shape[2::2], strict=False):
        if not pays(Candidate(warps, depth, shape[0]), problem, gpu, rows):
            break
        most = rows
    return most


def wide_refusal(problem: Problem, gpu: Gpu, rows: int, wgmma: bool) -> str | None:
    """Why no thread block multiplies so many rows at once, or None."""
    if wgmma and not gpu.wgmma:
        return "no wgmma: only GPUs of compute capability 9.0 have it"
    shared = problem.wide_shared(rows, wgmma)
    if shared == 0:
        return f"no kernel for {rows} rows has this code at {problem.bits} bits: most codes have some at 2 to 4"
    if shared > gpu.shared_block:
        return f"{shared} bytes of shared memory: a block has {gpu.shared_block}"
    return None


def choose_wide(problem: Problem, gpu: Gpu) -> list[int]:
    """The end of the op's `wide`, or [] if nothing can run.

    Rows of a thread block, the chunks of a part of k where one thread block has all rows, and 1 for wgmma, which comes
    first, else 0.
    """
    chunks = -(-problem.k // CHUNK)
    parts = sorted({-(-chunks // splits) for splits in range(1, 33)})
    for wgmma in (True, False):
        for rows in WIDE_ROWS:
            if wide_refusal(problem, gpu, rows, wgmma) is None:
                return [rows, min(parts, key=partial(wide_cycles, problem, gpu, rows, wgmma)), int(wgmma)]
    return []


def wide_cycles(problem: Problem, gpu: Gpu, rows: int, wgmma: bool, split_chunks: int) -> float:
    """The model for many rows: waves of thread blocks, one a multiprocessor, that decode and multiply.

    With wgmma these overlap.
    """
    tiles = WIDE_WARPS // (1 if wgmma else problem.stages)
    splits = ceil(ceil(problem.k / CHUNK) / split_chunks)
    waves = ceil(ceil(problem.n / (TILE * tiles)) * splits / gpu.multiprocessors)
    decode = tiles * CHUNK * TILE / 32 * problem.instructions / SCHEDULERS
    cycles = WGMMA_CYCLES if wgmma else MULTIPLICATION_CYCLES
    multiply = tiles * problem.stages * rows / 8 * (CHUNK / 16) * cycles
    chunk = max(decode, multiply) if wgmma else decode + multiply
    table = 4 * problem.table_words / (32 * SCHEDULERS)
    work = waves * (START_CYCLES + table + split_chunks * chunk)
    return work + splits * rows * WIDE_SPLIT_CYCLES * problem.n / 4096
