# SPDX-License-Identifier: Apache-2.0
"""Quantizes one model in many ways and measures each: perplexity, KL divergence, top-1 agreement, bytes.

Usage: python scripts/bench/bench_quality.py MODEL --calibration FILE --text FILE --work DIR
           [--csv CSV] [--only NAME ...]

Each row of CONFIGURATIONS is quantized into DIR/NAME with `quip-vllm quantize` unless that folder is finished already;
the rows of peers.NAMES are nearest rounding, and run only if --only names them. Then all are measured side by side on
the same windows. Their rows replace those of the same names in the CSV; other rows stay.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import peers
import torch
from benchmarking import ORIGIN, origin, read_rows, write_rows
from transformers import AutoTokenizer

from quip_vllm import cli
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import read_json
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.windows import score, windows_of
from quip_vllm.quantizer.settings import AMOUNTS

METHODS = {"qs": ["--method", "quip_sharp"], "qt": ["--method", "qtip", "--code", "1mad"]}
METHODS["qh"] = ["--method", "qtip", "--code", "hyb"]
ROTATIONS = {"b64": "64", "b128": "128", "bmax": "1024"}
CONFIGURATIONS = {
    f"{name}{bits}": [*method, "--bits", str(bits)] for name, method in METHODS.items() for bits in (2, 3, 4)
}
CONFIGURATIONS |= {
    f"{name}2{short}": [*CONFIGURATIONS[f"{name}2"], "--hadamard-block", block]
    for name in METHODS
    for short, block in ROTATIONS.items()
}
CONFIGURATIONS |= {f"{name}d0": [*flags, "--drift-correction", "0"] for name, flags in CONFIGURATIONS.items()}
for source, (count, length) in AMOUNTS.items():
    amount = ["--calibration", source, "--sequences", str(count), "--sequence-length", str(length)]
    CONFIGURATIONS |= {f"{name}2{source}": [*CONFIGURATIONS[f"{name}2"], *amount] for name in METHODS}
SEQUENCES, LENGTH = 64, 1024
"""Calibration, unless the row says otherwise."""
COLUMNS = ["name", "perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "bits_per_weight", "bytes"]
COLUMNS += ["mean_proxy_loss", "arguments", "windows", *ORIGIN]


def main() -> int:
    """Runs the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/quality.csv"))
    names = [*CONFIGURATIONS, *peers.NAMES]
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME", choices=names)
    args = parser.parse_args()
    usual = ["--calibration", args.calibration, "--sequences", str(SEQUENCES), "--sequence-length", str(LENGTH)]
    for name in (name for name in args.only if name in CONFIGURATIONS):
        out = args.work / name
        if not (out / "config.json").exists():
            more = ["--resume"] if (out / ".quantize").exists() else []
            code = cli.main(["quantize", args.model, str(out), *usual, *CONFIGURATIONS[name], *more])
            if code:
                return code
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = windows_of(args.text, tokenizer, 2048, args.windows)
    models, described = [], []
    for name in args.only:
        if name in CONFIGURATIONS:
            models.append(load_model(str(args.work / name)))
            described.append(_described(args.work / name) | {"arguments": " ".join(CONFIGURATIONS[name])})
        else:
            models.append(peers.nearest(load_model(args.model), peers.NAMES[name]))
            described.append(_peer(models[-1], peers.NAMES[name]))
    figures = score(models, windows, load_model(args.model))
    rows: dict[str, Any] = {row["name"]: row for row in read_rows(args.csv)} if args.csv.exists() else {}
    shared = {"windows": len(windows), **origin(torch.get_num_threads())}
    for name, found, row in zip(args.only, figures, described, strict=True):
        rows[name] = {"name": name, **{key: found[key] for key in COLUMNS[1:5]}, **row, **shared}
        print({key: rows[name][key] for key in COLUMNS[:7]}, flush=True)
    write_rows(args.csv, COLUMNS, [rows[name] for name in names if name in rows])
    return 0


def _described(folder: Path) -> dict[str, Any]:
    """Size and proxy loss of a checkpoint of ours."""
    totals = inspect(folder)["totals"]
    layers = read_json(folder / "quantization_report.json")["layers"]
    loss = mean(layer["proxy_loss"] for layer in layers)
    return {key: totals[key] for key in ("bits_per_weight", "bytes")} | {"mean_proxy_loss": loss}


def _peer(model: Any, bits: int) -> dict[str, Any]:
    """Size of a model of nearest rounding; what it does not round is in bf16."""
    inside = sum(module.weight.numel() for module in peers.linears(model).values())
    rest = sum(parameter.numel() for parameter in model.parameters()) - inside
    stored = peers.stored_bits(bits)
    return {"bits_per_weight": stored, "bytes": round(inside * stored / 8 + rest * 2)}


if __name__ == "__main__":
    sys.exit(main())
