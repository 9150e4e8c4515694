# SPDX-License-Identifier: Apache-2.0
"""Quantizes one model in many ways and measures each: perplexity, KL divergence, top-1 agreement, bytes.

Usage: python scripts/bench/bench_quality.py MODEL --calibration FILE --text FILE --work DIR
           [--csv CSV] [--only NAME ...]

Each row of CONFIGURATIONS is quantized into DIR/NAME with `quip-vllm quantize` unless that folder is finished already;
then all are measured side by side on the same windows. Their rows take the place of those of the same names in the
CSV, with commit and machine; other rows stay.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quip_vllm import cli
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.windows import score, windows_of
from quip_vllm.quantizer.calibration import SELF_SEQUENCE_LENGTH, SELF_SEQUENCES

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
SELF = ["--calibration", "self", "--sequences", str(SELF_SEQUENCES), "--sequence-length", str(SELF_SEQUENCE_LENGTH)]
CONFIGURATIONS |= {f"{name}2self": [*CONFIGURATIONS[f"{name}2"], *SELF] for name in METHODS}
COLUMNS = ["name", "perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "bits_per_weight", "bytes"]
COLUMNS += ["mean_proxy_loss", "arguments", "windows", "commit", "machine"]


def main() -> int:
    """Runs the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/quality.csv"))
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME", choices=list(CONFIGURATIONS))
    args = parser.parse_args()
    usual = ["--calibration", args.calibration, "--sequences", "64", "--sequence-length", "1024"]
    for name in args.only:
        out = args.work / name
        if not (out / "config.json").exists():
            more = ["--resume"] if (out / ".quantize").exists() else []
            code = cli.main(["quantize", args.model, str(out), *usual, *CONFIGURATIONS[name], *more])
            if code:
                return code
    windows = windows_of(args.text, AutoTokenizer.from_pretrained(args.model), 2048, args.windows)
    models = [load_model(str(args.work / name)) for name in args.only]
    figures = score(models, windows, load_model(args.model))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: dict[str, dict[str, Any]] = {}
    if args.csv.exists():
        with open(args.csv, newline="") as file:
            rows = {row["name"]: row for row in csv.DictReader(file)}
    for name, row in zip(args.only, figures, strict=True):
        report = json.loads((args.work / name / "quantization_report.json").read_text())
        losses = [layer["proxy_loss"] for layer in report["layers"]]
        totals = inspect(args.work / name)["totals"]
        row = {key: round(value, 5) for key, value in row.items()}
        row |= {key: totals[key] for key in ("bits_per_weight", "bytes")}
        row |= {"name": name, "arguments": " ".join(CONFIGURATIONS[name]), "windows": windows.shape[0]}
        row |= {"mean_proxy_loss": round(sum(losses) / len(losses), 6), "commit": commit}
        rows[name] = {**row, "machine": f"{platform.machine()} CPU"}
        print({key: row[key] for key in COLUMNS[:7]}, flush=True)
    with open(args.csv, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows[name] for name in CONFIGURATIONS if name in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
