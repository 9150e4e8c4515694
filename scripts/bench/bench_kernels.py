# SPDX-License-Identifier: Apache-2.0
"""Every linear op over shapes and rows with bf16 activations: weights and multiplications per second, share of a bound.

Usage: python scripts/bench/bench_kernels.py [--csv docs/benchmarks/cpu_kernels.csv] [--formats quip_sharp-2 ...]
           [--shapes 2048x2048 8192x2048 ...] [--rows 1 4 16 64 400] [--threads 1]

Shapes are n x k. Copies of a layer, --working-set MiB in all, are called in turn, so that weights come from memory as
they do when a model is served. The bound of one row is the larger of two times: that of reading the layer's tensors at
the measured memory bandwidth, and that of decoding its weights at the measured speed. The latter is the speed of one
row on a layer of 16384 x 2048, which stays in a last-level cache of 32 MiB; it includes the rotations and one
multiplication per weight, because no op decodes alone. More rows have no bound. `dense` is torch's own bf16 linear
layer of the same shape. QUIP_VLLM_CPU_TIER lowers the instruction-set tier.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarking import COMMON, FORMATS, ORIGIN, origin, random_layer, random_signs, seconds, write_rows
from torch import Tensor

from quip_vllm.ops import cpu_tier, prepare
from quip_vllm.ops.huge_pages import collapse

SHAPES = ["2048x2048", "8192x2048", "2048x8192", "576x576", "1536x576"]
CACHED = (16384, 2048)
COLUMNS = ["format", "n", "k", "rows", "microseconds", "gweights_per_s", "tmac_per_s", "bound_gweights_per_s"]
COLUMNS += ["share_of_bound", "over_dense", "bytes", "memory_gb_per_s", "tier", *ORIGIN]
MIB = 1 << 20

Layer = Callable[[Tensor], Tensor]


def main() -> int:
    """Runs the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=COMMON, choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 400])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--working-set", type=int, default=256, metavar="MIB", help="0: the layer stays in the cache")
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/cpu_kernels.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = {"tier": cpu_tier(), "memory_gb_per_s": memory_bandwidth(), **origin(args.threads)}
    print(f"memory: {shared['memory_gb_per_s']:.1f} GB/s, tier {shared['tier']}", flush=True)
    decoding = {name: decoding_speed(name) for name in args.formats}
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        dense = measure(dense_layers(n, k, args.working_set), k, args.rows)
        rows += [figures("dense", n, k, m, time, n * k * 2) for m, time in dense.items()]
        for name in args.formats:
            layers, size = quantized_layers(name, n, k, args.working_set)
            bound = max(size / (1e9 * shared["memory_gb_per_s"]), n * k / decoding[name])
            for m, time in measure(layers, k, args.rows).items():
                row = figures(name, n, k, m, time, size) | {"over_dense": dense[m] / time}
                if m == 1:
                    row |= {"bound_gweights_per_s": n * k / bound / 1e9, "share_of_bound": bound / time}
                rows.append(row)
            speeds = ", ".join(
                f"{m}: {row['gweights_per_s']:.2f}" for m, row in zip(args.rows, rows[-len(args.rows) :], strict=True)
            )
            print(f"{name} {shape}, Gweights/s by rows: {speeds}", flush=True)
            write_rows(args.csv, COLUMNS, [row | shared for row in rows])
    return 0


def figures(name: str, n: int, k: int, m: int, time: float, size: int) -> dict[str, Any]:
    """A row of the table without its ratios; time in seconds, size in bytes."""
    speeds = {"gweights_per_s": n * k / time / 1e9, "tmac_per_s": m * n * k / time / 1e12}
    return {"format": name, "n": n, "k": k, "rows": m, "microseconds": time * 1e6, "bytes": size, **speeds}


def memory_bandwidth() -> float:
    """GB/s, the better of a copy (reads and writes counted) and a sum of 256 MiB, in huge pages as weights are."""
    source = torch.ones(64 * MIB, dtype=torch.float32)
    target = torch.zeros_like(source)
    for one in (source, target):
        collapse(one)
    size = source.numel() * source.element_size()
    return max(2 * size / seconds(lambda: target.copy_(source)), size / seconds(source.sum)) / 1e9


def decoding_speed(name: str) -> float:
    """Weights per second of one row on a layer that stays in the cache."""
    n, k = CACHED
    layers, _ = quantized_layers(name, n, k, 0)
    return n * k / measure(layers, k, [1])[1]


def quantized_layers(name: str, n: int, k: int, working_set: int) -> tuple[list[Layer], int]:
    """Layers of one format that fill ``working_set`` MiB (one at least), and the bytes of each in a checkpoint."""
    spec = FORMATS[name].spec(k, (n,), None)
    generator = torch.Generator().manual_seed(0)
    tensors = random_layer(spec, random_signs(k, generator), generator)
    size = sum(tensor.nbytes for tensor in tensors.values())

    def layer() -> Layer:
        return prepare(spec, {name: tensor.clone() for name, tensor in tensors.items()}).linear

    return [layer() for _ in range(_copies(size, working_set))], size


def dense_layers(n: int, k: int, working_set: int) -> list[Layer]:
    """torch's bf16 linear layers that fill ``working_set`` MiB (one at least)."""

    def layer() -> Layer:
        weight = torch.randn(n, k, dtype=torch.bfloat16)
        return lambda x: torch.nn.functional.linear(x, weight)

    return [layer() for _ in range(_copies(2 * n * k, working_set))]


def _copies(size: int, working_set: int) -> int:
    return max(1, -(-working_set * MIB // size))


@torch.inference_mode()
def measure(layers: list[Layer], k: int, rows: list[int]) -> dict[int, float]:
    """Rows -> seconds per call, over the layers in turn."""
    turn = itertools.cycle(layers)
    found = {}
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        found[m] = seconds(lambda x=x: next(turn)(x))
    return found


if __name__ == "__main__":
    sys.exit(main())
