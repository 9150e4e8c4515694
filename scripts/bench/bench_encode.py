# SPDX-License-Identifier: Apache-2.0
"""The searches: sequences or vectors per second and the distortion of a Gaussian; and whole quantizations.

Usage: python scripts/bench/bench_encode.py [--csv docs/benchmarks/cpu_encode.csv] [--formats qtip-1mad-2 ...]
           [--threads N] [--device cuda] [--model MODEL --calibration FILE --runs quip_sharp-2 qtip-1mad-2 qtip-hyb-2]

`viterbi` rows are the tail-biting search of sequences of 256 weights, one row per code and bits; `e8p` is the search of
nearest points of 8-vectors. Distortion is the mean squared error per weight of N(0, 1), with the code scaled to the
Gaussian's deviation (the lattice: 1.03). `quantize` rows are the wall clock of `quip-vllm quantize MODEL`, one row per
format of --runs, each in a process of its own.
QUIP_VLLM_CPU_TIER lowers the instruction-set tier.

With --device cuda a GPU searches, and quantizes. `equal` is the share of the first sequences or vectors whose codes are
the CPU's. A GPU's walks are those of float costs, which are all that the tier "portable" has: there a share below 1 is
an error, and the exit status 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarking import COMMON, FORMATS, ORIGIN, Clock, format_name, origin, seconds, write_rows
from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.store import read_json
from quip_vllm.formats import e8p
from quip_vllm.formats.trellis import SEQUENCE
from quip_vllm.formats.trellis_codes import TrellisCode
from quip_vllm.ops import cpu_tier, encode_lattice, encode_trellis
from quip_vllm.quantizer.rounding.encoders import code_rms

LATTICE_SCALE = 1.03
"""Root mean square of the vectors, in units of the lattice, at which E8P's distortion on a Gaussian is lowest."""
COLUMNS = ["what", "format", "count", "seconds", "per_s", "mweights_per_s", "distortion", "mean_proxy_loss"]
COLUMNS += ["equal", "tier", "device", *ORIGIN]
COMPARED = {"viterbi": 16, "e8p": 4096}
"""Sequences and vectors that the CPU searches as well."""


def main() -> int:
    """Runs the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trellis = [name for name, stored in FORMATS.items() if stored.format.method == "qtip"]
    usual = [name for name in trellis if name in COMMON]
    parser.add_argument("--formats", nargs="*", default=usual, choices=trellis, metavar="FORMAT")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--vectors", type=int, default=1 << 18)
    parser.add_argument("--model", help="folder or hub name; adds the whole quantizations")
    parser.add_argument("--calibration", default="self", help="as for quip-vllm quantize")
    parser.add_argument(
        "--runs", nargs="+", default=["quip_sharp-2", "qtip-1mad-2", "qtip-hyb-2"], choices=list(FORMATS)
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where codes are searched, as torch names it")
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/cpu_encode.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = {"tier": cpu_tier(), "device": _name_of(args.device), **origin(args.threads)}
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row | shared)
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        write_rows(args.csv, COLUMNS, rows)

    add(lattice(args.vectors, device=args.device))
    for name in args.formats:
        add(viterbi(FORMATS[name], args.sequences, device=args.device))
    for name in args.runs if args.model else ():
        add(quantize(name, args.model, args.calibration, args.threads, args.device))
    return int(cpu_tier() == "portable" and any(row.get("equal", 1) < 1 for row in rows))


def lattice(count: int, clock: Clock = time.perf_counter, device: str = "cpu") -> dict[str, Any]:
    """The row of E8P's nearest points."""
    targets = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    row, codes = _searched(
        "e8p", format_name(LayerFormat("e8p", 2)), targets * LATTICE_SCALE, device, encode_lattice, clock
    )
    decoded = e8p.decode(codes[:, None]) / LATTICE_SCALE
    return row | {"distortion": float((decoded - targets).square().mean())}


def viterbi(stored: LayerFormat, count: int, clock: Clock = time.perf_counter, device: str = "cpu") -> dict[str, Any]:
    """The row of one trellis code at one rate."""
    code, bits = stored.format, stored.bits
    assert isinstance(code, TrellisCode)  # `choices`
    values = code.values(code.table(bits))
    rms = code_rms(code, values)
    targets = torch.randn(count, SEQUENCE, generator=torch.Generator().manual_seed(0))
    tables = {place: values.to(place) for place in ("cpu", device)}

    def search(x: Tensor) -> Tensor:
        return encode_trellis(x, tables[device if x.is_cuda else "cpu"], bits)

    row, states = _searched("viterbi", format_name(stored), targets * rms, device, search, clock)
    decoded = values[states.long()].flatten(1) / rms
    return row | {"distortion": float((decoded - targets).square().mean())}


def _searched(
    what: str, name: str, targets: Tensor, device: str, search: Callable[[Tensor], Tensor], clock: Clock
) -> tuple[dict[str, Any], Tensor]:
    """A row but for the distortion, and the codes."""
    there, few = targets.to(device), targets[: COMPARED[what]]
    taken = seconds(lambda: search(there).cpu(), least_calls=1 if what == "viterbi" else 3, clock=clock)
    codes = search(there).cpu()
    same = (codes[: len(few)] == search(few)).view(len(few), -1).all(1)
    row = _row(what, name, len(targets), taken, targets.numel())
    return row | {"equal": float(same.float().mean())}, codes


def _name_of(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def quantize(name: str, model: str, calibration: str, threads: int, device: str = "cpu") -> dict[str, Any]:
    """The row of a whole run of the quantizer."""
    stored = FORMATS[name]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "quip_vllm.cli", "quantize", model, f"{scratch}/out", "--tune", "none"]
        command += ["--method", stored.format.method, "--bits", str(stored.bits), "--calibration", calibration]
        command += ["--code", stored.code, "--device", device]
        begin = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        taken = time.perf_counter() - begin
        layers = read_json(Path(scratch) / "out" / "quantization_report.json")["layers"]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    loss = mean(layer["proxy_loss"] for layer in layers)
    return _row("quantize", name, len(layers), taken, weights) | {"mean_proxy_loss": loss}


def _row(what: str, name: str, count: int, taken: float, weights: int) -> dict[str, Any]:
    row = {"what": what, "format": name, "count": count, "seconds": taken}
    return row | {"per_s": count / taken, "mweights_per_s": weights / taken / 1e6}


if __name__ == "__main__":
    sys.exit(main())
