# SPDX-License-Identifier: Apache-2.0
"""Quantizes one model in many ways and measures each on one text or several: the figures of `quip-vllm evaluate`.

Usage: python scripts/bench/bench_quality.py MODEL --calibration FILE --text FILE [--text FILE ...] --work DIR
           [--csv CSV] [--only NAME ...]

Each row of CONFIGURATIONS is quantized into DIR/NAME with `quip-vllm quantize` unless that folder is finished already;
the rows of peers.NAMES are nearest rounding, and run only if --only names them. Then all are measured side by side on
the same windows. Their rows replace those of the same names and texts in the CSV; other rows stay.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import peers
import torch
from benchmarking import ORIGIN, origin, read_rows, write_rows
from transformers import AutoTokenizer

from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.report import FIGURES
from quip_vllm.evaluation.windows import score, windows_of
from quip_vllm.quantizer.settings import AMOUNTS, LDLQ, ROUNDINGS

METHODS = {"qs": ["--method", "quip_sharp"], "qt": ["--method", "qtip", "--code", "1mad"]}
METHODS["qh"] = ["--method", "qtip", "--code", "hyb"]
WHOLE = {f"{name}{bits}": [*method, "--bits", str(bits)] for name, method in METHODS.items() for bits in (2, 3, 4)}
CONFIGURATIONS = {name: [*flags, "--tune", "none"] for name, flags in WHOLE.items()}
CONFIGURATIONS |= {f"{name}full": [*flags, "--tune", "full", "--epochs", "2"] for name, flags in WHOLE.items()}
ONE_SIDED = {name: [*flags, "--no-two-sided"] for name, flags in CONFIGURATIONS.items() if name in WHOLE}
CONFIGURATIONS |= {f"{name}one": flags for name, flags in ONE_SIDED.items()}
CONFIGURATIONS |= {f"{name}d0": [*flags, "--drift-correction", "0"] for name, flags in ONE_SIDED.items()}
for short, block in {"b64": "64", "b128": "128", "bmax": "1024"}.items():
    CONFIGURATIONS[f"qs2{short}d0"] = [*CONFIGURATIONS["qs2d0"], "--hadamard-block", block]
for name in ("qs2", "qh2"):
    CONFIGURATIONS[f"{name}fullx4"] = [*CONFIGURATIONS[f"{name}full"], "--sequences", "256"]
    for source, (count, length) in AMOUNTS.items():
        amount = ["--calibration", source, "--sequences", str(count), "--sequence-length", str(length)]
        for end in ("", "full"):
            CONFIGURATIONS[f"{name}{source}{end}"] = [*CONFIGURATIONS[f"{name}{end}"], *amount]
for bits in (3, 4):
    for rounding in ROUNDINGS:
        grid = ["--method", "quip", "--bits", str(bits), "--tune", "none", "--rounding", rounding]
        CONFIGURATIONS[f"qg{bits}{'' if rounding == LDLQ else rounding}"] = grid
    CONFIGURATIONS[f"qg{bits}discquant"] += ["--drift-correction", "0"]
CONFIGURATIONS |= {f"qg{bits}one": [*CONFIGURATIONS[f"qg{bits}"], "--no-two-sided"] for bits in (3, 4)}
CONFIGURATIONS["qp2.5"] = ["--method", "qtip", "--bits", "2.5", "--tune", "none"]
CONFIGURATIONS["qh2fullx4e1"] = [*CONFIGURATIONS["qh2fullx4"], "--epochs", "1"]
CONFIGURATIONS["qp3refitx4"] = ["--method", "qtip", "--bits", "3.0", "--tune", "refit", "--sequences", "256"]
CUTS = {"": ["--split", "1"], "split2": ["--split", "2"], "split3": ["--split", "3"]}
CUTS["b128"] = ["--hadamard-block", "128"]
for short, flags in CUTS.items():
    CONFIGURATIONS[f"qs2{short}"] = [*CONFIGURATIONS["qs2"], *flags]
CONFIGURATIONS |= {f"qs2{short}s1": [*CONFIGURATIONS[f"qs2{short}"], "--seed", "1"] for short in CUTS}
EQUAL = ("qs2", "qh2", "qh2full", "qh2bundle", "qh2bundlefull")
CONFIGURATIONS |= {f"{name}w0": [*CONFIGURATIONS[name], "--token-weights", "0"] for name in EQUAL}
for name in ("qs2", "qh2bundle", "qh2bundlefull"):
    CONFIGURATIONS[f"{name}d20"] = [*CONFIGURATIONS[name], "--drift-correction", "0.2"]
CONFIGURATIONS["qh2bundlefulld20e1"] = [*CONFIGURATIONS["qh2bundlefulld20"], "--epochs", "1"]
SEQUENCES, LENGTH, DRIFT = 64, 1024, 0.35
"""Calibration and the share of drift correction, unless the row says otherwise. The share was the default before."""
COLUMNS = ["name", "text", *FIGURES, "bits_per_weight", "bytes", "mean_proxy_loss", "minutes", "peak_gb"]
COLUMNS += ["arguments", "windows", *ORIGIN]
"""Minutes and peak memory are those of `quip-vllm quantize`, where it ran in one piece; DIR/NAME.json keeps them."""


def main() -> int:
    """Runs the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, action="append")
    parser.add_argument("--start-token", action="store_true", help="as in `quip-vllm evaluate`")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/quality.csv"))
    names = [*CONFIGURATIONS, *peers.NAMES]
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME", choices=names)
    args = parser.parse_args()
    usual = ["--calibration", args.calibration, "--sequences", str(SEQUENCES), "--sequence-length", str(LENGTH)]
    usual += ["--drift-correction", str(DRIFT)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if args.csv.exists():
        rows = {(row["name"], row["text"]): dict(row) for row in read_rows(args.csv)}
    cost = {name: {key: row[key] for key in ("minutes", "peak_gb")} for (name, _), row in rows.items()}
    for name in (name for name in args.only if name in CONFIGURATIONS):
        out = args.work / name
        if not (out / "config.json").exists():
            begun = (out / ".quantize").exists()
            flags = [*usual, *CONFIGURATIONS[name], *(["--resume"] if begun else [])]
            code, spent = _quantize([args.model, str(out), *flags])
            if code:
                return code
            write_json(args.work / f"{name}.json", {} if begun else spent)
        if (args.work / f"{name}.json").exists():
            cost[name] = read_json(args.work / f"{name}.json")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    models, described = [], []
    for name in args.only:
        if name in CONFIGURATIONS:
            models.append(load_model(str(args.work / name)))
            row = _described(args.work / name) | {"arguments": " ".join(CONFIGURATIONS[name])}
        else:
            models.append(peers.nearest(load_model(args.model), peers.NAMES[name]))
            row = _peer(models[-1], peers.NAMES[name])
        described.append(row | cost.get(name, {}))
    reference = load_model(args.model)
    for text in args.text:
        windows = windows_of(text, tokenizer, 2048, args.windows, args.start_token)
        shared = {"text": Path(text).name, "windows": len(windows), **origin(torch.get_num_threads())}
        for name, found, row in zip(args.only, score(models, windows, reference), described, strict=True):
            rows[name, shared["text"]] = {"name": name, **found, **row, **shared}
            print({key: rows[name, shared["text"]][key] for key in ("name", "text", *FIGURES)}, flush=True)
        order = sorted(rows, key=lambda key: names.index(key[0]))
        write_rows(args.csv, COLUMNS, [rows[key] for key in order])
    return 0


def _quantize(arguments: list[str]) -> tuple[int, dict[str, float]]:
    """Exit code of `quip-vllm quantize`, and its minutes and peak memory in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "quip_vllm.cli", "quantize", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    minutes = (time.perf_counter() - begin) / 60
    return os.waitstatus_to_exitcode(status), {"minutes": round(minutes, 1), "peak_gb": round(usage.ru_maxrss / 1e6, 2)}


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
