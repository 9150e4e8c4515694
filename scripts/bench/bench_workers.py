# SPDX-License-Identifier: Apache-2.0
"""What `--workers` and `--ray` are worth: one matrix rounded by one process and by others; and what 70B and 405B take.

Usage: python scripts/bench/bench_workers.py [--csv docs/benchmarks/workers.csv]

A random matrix of 1024 x 1024 is rounded on two sides with hyb at 2 bits: in this process with one thread, in 1 and 2
processes of one thread each, and by a Ray cluster of 1 and 2 nodes of one core that the script starts. Rows of the kind
`computed` say what a model takes on machines of 64 cores: a call of the search takes the time of its tiles on its
machines' cores, and what a call by Ray took beyond the search here; what is not search runs on one machine, whose
cores are taken to share it evenly. That part is in quantization.csv; without tuning and the backward pass.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarking import FORMATS, ORIGIN, ROOT, origin, read_rows, write_rows
from estimate_quantization import MODELS, Costs, Shape

from quip_vllm.formats.tile import TILE
from quip_vllm.quantizer.rounding.encoders import make_encoder
from quip_vllm.quantizer.rounding.ldl import feedback
from quip_vllm.quantizer.rounding.ldlq import two_sided_ldlq
from quip_vllm.quantizer.rounding.searchers import Searchers, searchers, spread

SIZE, CORES, TOKENS = 1024, 64, 65536
NAME = "qtip-hyb-2"
LARGE = (*MODELS[1:], Shape("405B", 16384, 53248, 1024, 126, 128256))
COLUMNS = ["kind", "what", "machines", "seconds", "calls", "search_hours", "rest_hours", "hours", *ORIGIN]


def main() -> int:
    """Measures and writes the CSV; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/workers.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    shared = {"calls": len(tiles_of(SIZE, SIZE)), **origin(1)}
    taken = {}
    for what, count in (("this process", 1), ("processes", 1), ("processes", 2), ("Ray", 1), ("Ray", 2)):
        with others(what, count) as found:
            taken[what, count] = rounded(found)
        rows.append({"kind": "measured", "what": what, "machines": count, "seconds": taken[what, count], **shared})
        print({key: rows[-1][key] for key in ("what", "machines", "seconds")}, flush=True)
    beyond = max(0.0, taken["Ray", 1] - taken["this process", 1]) / shared["calls"]
    costs = costs_of_a_layer()
    for shape in LARGE:
        for machines in (1, 8, 64):
            search = sum(
                call_seconds(tiles, machines, costs, beyond) for n, k in shape.linears for tiles in tiles_of(n, k)
            )
            rest = (costs.seconds(shape, NAME, TOKENS) - shape.weights * costs.search[NAME]) / CORES
            hours = {"search_hours": search * shape.layers / 3600, "rest_hours": rest * shape.layers / 3600}
            row = {"kind": "computed", "what": shape.name, "machines": machines, **hours, "hours": sum(hours.values())}
            rows.append(row | origin(1))
    write_rows(args.csv, COLUMNS, rows)
    return 0


def tiles_of(n: int, k: int) -> list[int]:
    """Tiles that are searched at once, of each diagonal of a matrix."""
    rows, columns = n // TILE, k // TILE
    return [min(i + 1, rows, columns, rows + columns - 1 - i) for i in range(rows + columns - 1)]


def call_seconds(tiles: int, machines: int, costs: Costs, beyond: float) -> float:
    """Of one diagonal: the tiles of the core that has most, and what the machines cost beyond."""
    most = -(-tiles // (machines * CORES))
    return most * TILE**2 * costs.search[NAME] + (beyond if machines > 1 else 0)


def costs_of_a_layer() -> Costs:
    """Those from which quantization.csv was computed."""
    rows = [row for row in read_rows(ROOT / "docs/benchmarks/quantization.csv") if row["kind"] == "computed"]
    seconds = {(row["model"], row["format"], int(row["tokens"])): float(row["seconds_per_layer"]) for row in rows}
    (small, large), fewer = MODELS, 16384
    token = (seconds["7B", NAME, TOKENS] - seconds["7B", NAME, fewer]) / (small.weights * (TOKENS - fewer))
    left = [seconds[shape.name, NAME, TOKENS] - token * TOKENS * shape.weights for shape in MODELS]
    # left = weights * search + products * product, for both
    product = (left[1] / large.weights - left[0] / small.weights) / (
        large.products / large.weights - small.products / small.weights
    )
    return Costs(token, product, {NAME: left[0] / small.weights - product * small.products / small.weights})


@contextmanager
def others(what: str, count: int) -> Iterator[Searchers | None]:
    """Searchers of one core each."""
    if what != "Ray":
        with searchers(count if what == "processes" else None, None) as found:
            yield found
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        with searchers(None, cluster.address) as found:
            yield found
    finally:
        cluster.shutdown()


def rounded(found: Searchers | None) -> float:
    """Seconds for the matrix; once for warming up on a smaller one."""
    stored = FORMATS[NAME]
    encoder = make_encoder(stored.code, stored.bits)
    for size in (256, SIZE):
        draw = torch.Generator().manual_seed(0)
        hessians = [torch.randn(2 * size, size, generator=draw) for _ in range(2)]
        factors = [feedback(x.T @ x / len(x), TILE)[0] for x in hessians]
        weight = torch.randn(size, size, generator=draw) * encoder.rms
        begin = time.perf_counter()
        two_sided_ldlq(weight, *factors, spread(encoder, found))
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
