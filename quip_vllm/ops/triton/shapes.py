# SPDX-License-Identifier: Apache-2.0
"""Shapes of decode_gemm's programs: a table's, or with QUIP_VLLM_TRITON_TUNE=1 the fastest of a few, timed at load.

An output is summed in the order of its chunks and of the parts of k, whatever the shape. So any shape gives the same
bits, and a clock may choose. Other parts of k would give others: they depend on the layer's size and the GPU alone.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tile import TILE
from quip_vllm.ops import cuda_layout
from quip_vllm.ops.rotations import kernels_code

logger = logging.getLogger(__name__)

ROWS = (8, 16, 32, 64)
"""Rows of x that share a choice: the least that hold all of a call's, else 64."""

WARPS = {8: (4, 2, 8), 9: (2, 1), 10: (2, 1), 12: (4, 2, 8)}
"""Warps, and tiles, of a program, by the first digit of the compute capability; the table's first.

With four warps Triton would multiply by wgmma on 9.0 and by tcgen05 on 10.0, which take the weight in another order.
"""

NEWER = (2, 1)
"""Warps on a GPU that is not in the table."""

WARPS_PER_MULTIPROCESSOR = 32
"""What the parts of k aim at: enough to hide the memory's latency."""

SPLIT_CHUNKS = 8
"""Chunks that a part of k has at least: its partial sums cost as much to write and read as a chunk's words."""

Layer = tuple[str, int, int, tuple[int, ...], torch.device]
"""What a choice is for: code, bits, inputs, outputs, device."""


class Shape(NamedTuple):
    """Of a program: warps, each with a tile of the weight; rows of x; chunks in a turn of its loop."""

    warps: int
    rows: int
    unroll: int


_timed: dict[tuple[Layer, int], Shape] = {}  # with the rows that share it: layers of equal sizes are timed once


def candidates(rows: int, warps: tuple[int, ...]) -> list[Shape]:
    """Shapes for up to `rows` rows, the table's first. Registers do not hold two chunks of 32 rows and more."""
    blocks = (rows, rows // 2) if rows > ROWS[0] else (rows,)
    return [Shape(w, r, u) for r in blocks for u in ((2, 1) if r < 32 else (1,)) for w in warps]


def choose(spec: LinearSpec, device: torch.device, run: Callable[[int, Shape], object]) -> list[int]:
    """Chooses a layer's shapes; while a CUDA graph is captured, the table's.

    Args:
        spec: the layer.
        device: where it runs.
        run: one multiplication of so many rows by a shape, to be timed.

    Returns:
        The op's `shapes`: a Shape's three numbers for each of ROWS.

    Raises:
        ValueError: QUIP_VLLM_TRITON_TUNE has another value than it may.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    tune = envs.triton_tune() and not capturing
    found: list[int] = []
    for rows in ROWS:
        first = candidates(rows, gpu(device)[0])[0]
        found += _fastest(spec, device, rows, run) if tune else first
    return found


def _fastest(spec: LinearSpec, device: torch.device, rows: int, run: Callable[[int, Shape], object]) -> Shape:
    key = ((kernels_code(spec), spec.bits, spec.stored_in, spec.stored_outputs, device), rows)
    if key not in _timed:
        every = candidates(rows, gpu(device)[0])
        times = {shape: milliseconds(partial(run, rows, shape)) for shape in every}
        best = min(times, key=times.__getitem__)
        logger.info(
            "quip_vllm: %s at %d bits, outputs %s, %d inputs, up to %d rows on %s: "
            "warps, rows, unroll %s take %.4f ms, the table's %s %.4f ms",
            *(spec.code, spec.bits, spec.output_sizes, spec.in_features, rows, device),
            *(tuple(best), times[best], tuple(every[0]), times[every[0]]),
        )
        _timed[key] = best
    return _timed[key]


def shape(shapes: Sequence[int], m: int) -> Shape:
    """The Shape for m rows, from what `choose` returned."""
    group = next((i for i, rows in enumerate(ROWS) if m <= rows), len(ROWS) - 1)
    return Shape(*shapes[3 * group : 3 * group + 3])


def rows_of_expert(rows: int, experts: int) -> int:
    """The rows to choose a shape for, where so many are shared by experts: most of these then have one block."""
    return 8 if rows <= 4 * experts else 16 if rows <= 8 * experts else ROWS[-1]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, its caches empty."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def gpu(device: torch.device) -> tuple[tuple[int, ...], int]:
    """Warps that a program may have, and multiprocessors."""
    if device.type != "cuda":  # Triton's interpreter
        return WARPS[8], 4
    found = torch.cuda.get_device_properties(device)
    return WARPS.get(found.major, NEWER), found.multi_processor_count


def split_chunks(spec: LinearSpec, device: torch.device) -> int:
    """Chunks of a part of k: the same for any number of rows and any shape, so that the order of summation is."""
    (warps, *_), multiprocessors = gpu(device)
    tiles, chunks = -(-sum(spec.stored_outputs) // TILE), -(-spec.stored_in // cuda_layout.CHUNK)
    wanted = multiprocessors * WARPS_PER_MULTIPROCESSOR // (-(-tiles // warps) * warps)
    splits = max(1, min(wanted, chunks // SPLIT_CHUNKS))
    return -(-chunks // splits)
