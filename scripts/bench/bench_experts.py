# SPDX-License-Identifier: Apache-2.0
"""The experts of a decoder layer on a CPU, quantized and in vLLM's own bf16 kernel: time of a call by rows.

Usage: python scripts/bench/bench_experts.py [--csv docs/benchmarks/experts.csv] [--formats quip_sharp-2 ...]
           [--hidden 1024 --inner 512 --experts 32 --top-k 4] [--layers 4] [--rows 1 16 400]

One thread, bf16 activations. A call has everything behind the router: gate and up, the activation, down, and the
weighted sum. Rows choose their experts at random. --layers layers are called in turn, so that weights come from memory.
Times are those that the thread was running, and the formats take turns in random order: so another program on the
machine moves all of them alike. Needs vllm.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarking import FORMATS, ORIGIN, origin, random_layer, random_signs, write_rows
from torch import Tensor
from torch.nn.functional import silu

from quip_vllm.ops import cpu_tier, prepare_experts
from quip_vllm.ops.prepared import PreparedExperts

COLUMNS = ["format", "hidden", "inner", "experts", "top_k", "rows", "microseconds", "gmac_per_s", "over_bf16"]
COLUMNS += ["samples", "tier", *ORIGIN]
USUAL = ["quip_sharp-2", "qtip-hyb-2", "qtip-1mad-2", "quip_sharp-4"]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [m, hidden], weights [m, t], ids [m, t] -> [m, hidden]."""


def main() -> int:
    """Runs the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=USUAL, choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512, help="width of an expert")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 400])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each format and number of rows")
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/experts.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    kinds = {"bf16": [dense(args, generator) for _ in range(args.layers)]}
    for name in args.formats:
        kinds[name] = [quantized(args, name, generator) for _ in range(args.layers)]
    shape = {"hidden": args.hidden, "inner": args.inner, "experts": args.experts, "top_k": args.top_k}
    shared = {**shape, "tier": cpu_tier(), **origin(1)}
    rows: list[dict[str, Any]] = []
    for m in args.rows:
        found = measure(args, kinds, m, generator)
        macs = 3 * m * args.top_k * args.hidden * args.inner
        for name, times in found.items():
            took = median(times)
            row = {"format": name, "rows": m, "microseconds": took * 1e6, "gmac_per_s": macs / took / 1e9}
            row |= {"over_bf16": median(found["bf16"]) / took, "samples": len(times)}
            rows.append(row)
            print(f"{m} rows, {name}: {took * 1e6:.0f} us, {row['over_bf16']:.2f} times bf16", flush=True)
        write_rows(args.csv, COLUMNS, [row | shared for row in rows])
    return 0


@torch.inference_mode()
def measure(
    args: argparse.Namespace, kinds: dict[str, list[Experts]], m: int, generator: torch.Generator
) -> dict[str, list[float]]:
    """Format -> times of single calls, after one of each layer that does not count."""
    x = torch.randn(m, args.hidden, generator=generator).bfloat16()
    weights = torch.rand(m, args.top_k, generator=generator)
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in itertools.count():
        ids = torch.rand(m, args.experts, generator=generator).topk(args.top_k).indices
        for name, layers in random.sample(list(kinds.items()), len(kinds)):
            begin = time.thread_time()
            layers[turn % len(layers)](x, weights, ids)
            found[name].append(time.thread_time() - begin)
        if turn > 2 * args.layers and sum(found["bf16"]) > args.seconds:
            return {name: times[args.layers :] for name, times in found.items()}
    raise AssertionError


def dense(args: argparse.Namespace, generator: torch.Generator) -> Experts:
    """A layer in vLLM's kernel for bf16 weights."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.import_kernels()  # of the library for this CPU
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def weight(n: int, k: int) -> Tensor:
        shape = (args.experts, n, k)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, k**-0.5, generator=generator)

    outer = cpu_prepack_moe_weight(weight(2 * args.inner, args.hidden), isa)
    inner = cpu_prepack_moe_weight(weight(args.hidden, args.inner), isa)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        cpu_fused_moe(y, x, outer, inner, None, None, weights, ids.int(), "silu", isa)
        return y

    return run


def quantized(args: argparse.Namespace, name: str, generator: torch.Generator) -> Experts:
    """A layer in our kernels, as the plugin runs it."""

    def experts(k: int, sizes: tuple[int, ...]) -> PreparedExperts:
        spec = FORMATS[name].spec(k, sizes, None)
        layers = [random_layer(spec, random_signs(k, generator), generator) for _ in range(args.experts)]
        return prepare_experts(spec, layers)

    outer, inner = experts(args.hidden, (args.inner, args.inner)), experts(args.inner, (args.hidden,))

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up = outer.linear(x, ids).view(-1, 2 * args.inner).chunk(2, dim=-1)
        return inner.linear(silu(gate) * up, ids.view(-1, 1), weights)

    return run


if __name__ == "__main__":
    sys.exit(main())
