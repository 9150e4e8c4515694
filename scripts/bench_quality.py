# SPDX-License-Identifier: Apache-2.0
"""Quantizes one model in many ways and measures each: perplexity, KL divergence, top-1 agreement, bytes.

Usage: python scripts/bench_quality.py MODEL --calibration FILE --text FILE --work DIR [--csv CSV] [--only NAME ...]

Each row of CONFIGURATIONS is quantized into DIR/NAME with `quip-vllm quantize` unless that folder is finished already;
then all are measured side by side on the same windows. Rows are written to the CSV with commit and machine.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from quip_vllm import cli
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.windows import score, windows_of

CONFIGURATIONS = {
    "qs2": ["--method", "quip_sharp", "--bits", "2"],
    "qs3": ["--method", "quip_sharp", "--bits", "3"],
    "qs4": ["--method", "quip_sharp", "--bits", "4"],
    "qt2": ["--method", "qtip", "--bits", "2", "--code", "1mad"],
    "qt3": ["--method", "qtip", "--bits", "3", "--code", "1mad"],
    "qt4": ["--method", "qtip", "--bits", "4", "--code", "1mad"],
    "qh2": ["--method", "qtip", "--bits", "2", "--code", "hyb"],
    "qh3": ["--method", "qtip", "--bits", "3", "--code", "hyb"],
    "qh4": ["--method", "qtip", "--bits", "4", "--code", "hyb"],
    "qs2d0": ["--method", "quip_sharp", "--bits", "2", "--drift-correction", "0"],
    "qs2b64": ["--method", "quip_sharp", "--bits", "2", "--hadamard-block", "64"],
    "qs2b128": ["--method", "quip_sharp", "--bits", "2", "--hadamard-block", "128"],
    "qs2bmax": ["--method", "quip_sharp", "--bits", "2", "--hadamard-block", "1024"],
    "qt2b64": ["--method", "qtip", "--bits", "2", "--code", "1mad", "--hadamard-block", "64"],
    "qt2b128": ["--method", "qtip", "--bits", "2", "--code", "1mad", "--hadamard-block", "128"],
    "qt2bmax": ["--method", "qtip", "--bits", "2", "--code", "1mad", "--hadamard-block", "1024"],
}
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
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS))
    args = parser.parse_args()
    sequences = ["--calibration", args.calibration, "--sequences", "64", "--sequence-length", "1024"]
    for name in args.only:
        out = args.work / name
        if not (out / "config.json").exists():
            more = ["--resume"] if (out / ".quantize").exists() else []
            code = cli.main(["quantize", args.model, str(out), *CONFIGURATIONS[name], *sequences, *more])
            if code:
                return code
    windows = windows_of(args.text, AutoTokenizer.from_pretrained(args.model), 2048, args.windows)
    models = [load_model(str(args.work / name)) for name in args.only]
    figures = score(models, windows, load_model(args.model))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with open(args.csv, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for name, row in zip(args.only, figures, strict=True):
            report = json.loads((args.work / name / "quantization_report.json").read_text())
            losses = [layer["proxy_loss"] for layer in report["layers"]]
            totals = inspect(args.work / name)["totals"]
            row = {key: round(value, 5) for key, value in row.items()}
            row |= {key: totals[key] for key in ("bits_per_weight", "bytes")}
            row |= {"name": name, "arguments": " ".join(CONFIGURATIONS[name]), "windows": windows.shape[0]}
            row |= {"mean_proxy_loss": round(sum(losses) / len(losses), 6), "commit": commit}
            table.writerow({**row, "machine": f"{platform.machine()} CPU"})
            print({key: row[key] for key in COLUMNS[:7]}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
