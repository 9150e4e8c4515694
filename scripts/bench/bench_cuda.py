# SPDX-License-Identifier: Apache-2.0
"""The fused linear layers on a GPU, beside cuBLAS in fp16 and the time to read the packed weights.

Usage: python scripts/bench/bench_cuda.py [--formats quip_sharp-2 ...] [--sizes 4096x4096 ...] [--rows 1 4 ...]
           [--csv FILE] [--backends cuda triton] [--block 128] [--ways | --humming]

There is one row per format, size (outputs x inputs), number of rows and backend. The time is that of one call in a CUDA
graph of calls, each with weights of its own: together four times what the GPU's cache holds, as the layers of a model
follow one another. torch's fp16 matmul of the same shape is measured likewise in the same run. The bound is the packed
bytes divided by the bandwidth of a copying kernel, measured here. Ratios are to those two. Needs a GPU.

--block rotates in blocks. With 128, up to 16 rows are timed three times: with the launches that the backend chooses,
and, of one choice of thread blocks, with one launch and apart.

--ways times the CUDA backend by each way to multiply many rows: decode_gemm, which decodes a weight for each 64 rows;
the dense weight and cuBLAS; wide_gemm and, on a GPU that has it, wgmma_gemm, which decode it for up to 256 rows.

--humming times vLLM's Humming kernels (pip install humming-kernels, which compiles with nvcc as it runs) in place of
ours, in the same way: weights of 2, 3 and 4 bits in groups of 128, activations in fp16.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarking import COMMON, FORMATS, ORIGIN, origin, random_layer, random_signs, write_rows
from torch import Tensor
from tqdm import tqdm

from quip_vllm.ops.cuda import CudaLayer, gpu_of, wide_of
from quip_vllm.ops.cuda_layout import CHUNK
from quip_vllm.ops.cuda_shapes import RUN
from quip_vllm.ops.dispatch import Backend, backends
from quip_vllm.ops.prepared import PreparedLayer

COLUMNS = ["backend", "format", "n", "k", "block", "rows", "launches", "microseconds", "cublas_fp16_microseconds"]
COLUMNS += ["over_cublas", "packed_bytes", "bound_microseconds", "share_of_bandwidth", "copy_gb_s", "gpu", "torch"]
COLUMNS += ORIGIN
SIZES = ["4096x4096", "14336x4096", "4096x14336", "1024x8192"]
HUMMING = {f"int{bits}-g128": {"dtype": f"int{bits}", "group_size": 128} for bits in (2, 3, 4)}
DEVICE = "cuda"


def main() -> int:
    """Measures and writes the CSV; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=COMMON, metavar="FORMAT")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--block", type=int, help="rotations in blocks of this many; the full width unless given")
    parser.add_argument("--ways", action="store_true", help="every way to multiply many rows, of the CUDA backend")
    parser.add_argument("--humming", action="store_true", help="vLLM's Humming kernels in place of ours")
    parser.add_argument("--csv", type=Path, default=Path("build/cuda_kernels.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda: torch sees no GPU: run it on a machine with one, with torch's CUDA build", file=sys.stderr)
        return 2
    shared = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy_speed() / 1e9}
    shared |= origin("GPU")
    found = []
    for case in tqdm(list(_cases(args)), unit="layer"):
        for entry in case(args, shared["copy_gb_s"]):
            found.append({**entry, **shared})
            write_rows(args.csv, COLUMNS, found)
    return 0


Case = Callable[[argparse.Namespace, float], Iterator[dict[str, Any]]]


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    if args.humming:
        yield from (partial(_humming, name, n, k) for name in HUMMING for n, k in sizes)
        return
    for backend in (backend for backend in backends("cuda") if backend.name in args.backends):
        yield from (partial(_measure, backend, name, n, k) for name in args.formats for n, k in sizes)


def _measure(
    backend: Backend, name: str, n: int, k: int, args: argparse.Namespace, copy_gb_s: float
) -> Iterator[dict[str, Any]]:
    spec = FORMATS[name].spec(k, (n,), args.block)
    if backend.refusal(spec) is not None:
        print(f"{backend.name} does not run {name}: {backend.refusal(spec)}", file=sys.stderr)
        return
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(spec, random_signs(k, generator), generator)
    prepared = backend.prepare(spec, {key: tensor.cuda() for key, tensor in layer.items()})
    packed = n * k * spec.bits // 8
    layers = [
        replace(prepared, tensors={**prepared.tensors, "packed": prepared.tensors["packed"].clone()})
        for _ in range(copies(packed))
    ]
    what = {"backend": backend.name, "format": name, "n": n, "k": k, "block": args.block, "packed_bytes": packed}
    for x, cublas in _beside_cublas(n, k, args.rows):
        ways = ways_of(prepared) if args.ways else launches_of(prepared, len(x))
        for launches, changes in ways.items():
            ours = seconds([partial(replace(layer, **changes).linear, x) for layer in layers])
            yield {**what, "launches": launches, **_times(packed, len(x), ours, cublas, copy_gb_s)}


def _humming(name: str, n: int, k: int, args: argparse.Namespace, copy_gb_s: float) -> Iterator[dict[str, Any]]:
    from humming.layer import HummingLayer

    first = HummingLayer(shape_n=n, shape_k=k, weight_config=dict(HUMMING[name]), torch_dtype=torch.float16).to(DEVICE)
    first.load_from_unquantized(torch.randn(n, k, device=DEVICE, dtype=torch.float16))
    first.transform()
    packed = sum(one.nbytes for one in first.parameters())
    layers = [first, *(copy.deepcopy(first) for _ in range(copies(packed) - 1))]
    what = {"backend": "humming", "format": name, "n": n, "k": k, "packed_bytes": packed, "launches": "chosen"}
    for x, cublas in _beside_cublas(n, k, args.rows):
        yield {**what, **_times(packed, len(x), seconds([partial(layer, x) for layer in layers]), cublas, copy_gb_s)}


def _beside_cublas(n: int, k: int, rows: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
    """Yields x [rows, k] and the seconds that torch's fp16 matmul takes for it."""
    dense = [torch.randn(n, k, device=DEVICE, dtype=torch.float16) for _ in range(copies(2 * n * k))]
    for m in rows:
        x = torch.randn(m, k, device=DEVICE, dtype=torch.float16)
        yield x, seconds([partial(torch.matmul, x, weight.T) for weight in dense])


def _times(packed: int, rows: int, ours: float, cublas: float, copy_gb_s: float) -> dict[str, Any]:
    """The columns of times in seconds."""
    bound = packed / (copy_gb_s * 1e9)
    found = {"rows": rows, "microseconds": ours * 1e6, "cublas_fp16_microseconds": cublas * 1e6}
    found |= {"over_cublas": cublas / ours, "bound_microseconds": bound * 1e6}
    return {**found, "share_of_bandwidth": bound / ours}


def launches_of(prepared: PreparedLayer, rows: int) -> dict[str, dict[str, Any]]:
    """What to change of a layer, so that it is launched as each name says."""
    ways: dict[str, dict[str, Any]] = {"chosen": {}}
    if isinstance(prepared, CudaLayer) and set(prepared.widths) == {RUN}:
        split, *_, many = prepared.thread_blocks
        chunks = min(split, prepared.spec.stored_in // CHUNK)
        shared = torch.ops.quip_vllm.cuda_shared_bytes(prepared.kernels, prepared.spec.bits, rows, 4, 2, chunks)
        if 0 < shared <= torch.cuda.get_device_properties(0).shared_memory_per_block_optin:
            blocks = {"thread_blocks": [split, *[4, 2] * 3, many]}
            ways |= {"one": {**blocks, "one_launch_rows": 16}, "apart": {**blocks, "one_launch_rows": 0}}
    return ways


def ways_of(prepared: PreparedLayer) -> dict[str, dict[str, Any]]:
    """What to change of a layer, so that any number of rows is multiplied as each name says."""
    if not isinstance(prepared, CudaLayer):
        return {"chosen": {}}
    gpu = gpu_of(torch.device("cuda"))
    wide = {
        name: wide_of(prepared.spec, prepared.kernels, replace(gpu, wgmma=wgmma), 1)
        for name, wgmma in (("wide_gemm", False), ("wgmma_gemm", True))
    }
    ways = {name: {"wide": chosen} for name, chosen in wide.items() if chosen and chosen[-1] == (name == "wgmma_gemm")}
    return {"decode_gemm": {"dense_rows": 0, "wide": []}, "dense": {"dense_rows": 1, "wide": []}, **ways}


def copies(size: int) -> int:
    """Weights of `size` bytes that are four times the GPU's cache, or 64 of them: no call finds its own there."""
    return min(64, 4 * torch.cuda.get_device_properties(0).L2_cache_size // size + 2)


def seconds(calls: Sequence[Callable[[], Tensor]], repeats: int = 11) -> float:
    """Median time of a call in a CUDA graph of all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return median(times)


def copy_speed() -> float:
    """Bytes per second that a kernel reads and writes together; the GPU's copy engines are slower."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: torch.neg(source, out=target)])


if __name__ == "__main__":
    sys.exit(main())
