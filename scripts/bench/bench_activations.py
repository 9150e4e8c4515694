# SPDX-License-Identifier: Apache-2.0
"""What int8 activations cost in quality: the CPU kernels in transformers, exact and int8, compared with dense weights.

Usage: python scripts/bench/bench_activations.py CHECKPOINT ... --text FILE [--windows 4] [--csv CSV]

Each checkpoint's linear layers are run three times in float32: as dense dequantized weights (the reference), by the
kernels with exact activations, and by the kernels with int8 ones. Perplexity of each, KL divergence and top-1 agreement
to the reference, over the same windows of 2048 tokens.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from benchmarking import ORIGIN, origin, write_rows
from torch import nn
from transformers import AutoTokenizer

from quip_vllm.checkpoint.layers import read_layers
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.windows import score, windows_of
from quip_vllm.nn.linear import QuantizedLinear

COLUMNS = ["name", "activations", "perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "windows"]


def with_kernels(folder: Path, activations: str) -> nn.Module:
    """The checkpoint as a transformers model whose quantized decoder linears run on the kernels."""
    os.environ["QUIP_VLLM_ACTIVATIONS"] = activations
    model = load_model(str(folder))
    for name, spec, tensors in read_layers(folder):
        if spec.rotate_output:  # the head stays as it is
            parent, _, leaf = name.rpartition(".")
            bias = model.get_submodule(name).bias
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(spec, tensors, bias))
    return model


def main() -> int:
    """Writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/activations.csv"))
    args = parser.parse_args()
    rows = []
    for folder in args.checkpoints:
        windows = windows_of(args.text, AutoTokenizer.from_pretrained(folder), 2048, args.windows)
        kinds = ("exact", "int8")
        models = [with_kernels(folder, kind) for kind in kinds]
        for kind, figures in zip(kinds, score(models, windows, load_model(str(folder))), strict=True):
            row = {"name": folder.name, "activations": kind, **{key: figures[key] for key in COLUMNS[2:6]}}
            rows.append(row | {"windows": windows.shape[0]} | origin(torch.get_num_threads()))
            print({key: row[key] for key in COLUMNS}, flush=True)
        write_rows(args.csv, [*COLUMNS, *ORIGIN], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
