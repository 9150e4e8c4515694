# SPDX-License-Identifier: Apache-2.0
"""Core hours, memory and disk of quantizing models of 7B and 70B weights, computed from one measured decoder layer.

Usage: python scripts/bench/estimate_quantization.py [--csv docs/benchmarks/quantization.csv] [--hidden 2048]

`quip-vllm quantize --method quip_sharp --bits 2 --no-two-sided --tune none` runs on three models of three layers
and random weights: one of half the width of a 7B model, and one of a quarter of it with few and with more calibration
tokens. The measured time is the CPU time of one thread between the files of the first and the second layer, that is one
layer of a long run; while the third is worked on, the files stay. The time has three parts: forward passes and
Hessians, by weights and tokens; the search, by weights, at the speed that bench_encode measures in the same run; and
the rest, matrix products and factorisations, by the cube of the width. No whole run is measured.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import bench_encode
import make_synthetic_checkpoint
import torch
from benchmarking import FORMATS, ORIGIN, origin, write_rows

from quip_vllm.ops import cpu_tier
from quip_vllm.quantizer.source.model import fast_dtype

SEQUENCE = 512
FEW, MORE = SEQUENCE, 9 * SEQUENCE
"""Calibration tokens of the measured runs."""
TOKENS = (16384, 65536, 524288)
"""Calibration tokens of the computed runs: self-written text's default, quality.md's, and a file's default."""
VOCABULARY, LAYERS = 256, 3
"""Of the measured models."""
NAMES = ["quip_sharp-2", "qtip-hyb-2", "qtip-1mad-4"]
COLUMNS = [
    "kind",
    "model",
    "format",
    "tokens",
    "layers",
    "layer_mweights",
    "seconds_per_layer",
    "core_hours",
    "memory_gb",
]
COLUMNS += ["source_gb", "output_gb", "dtype", "tier", *ORIGIN]


@dataclass(frozen=True)
class Shape:
    """A model of the Llama family; ``kv`` is the outputs of `k_proj`."""

    name: str
    hidden: int
    mlp: int
    kv: int
    layers: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the linear layers of a decoder layer."""
        attention = [(self.hidden, self.hidden)] * 2 + [(self.kv, self.hidden)] * 2
        return [*attention, *[(self.mlp, self.hidden)] * 2, (self.hidden, self.mlp)]

    @property
    def weights(self) -> int:
        """Of one decoder layer."""
        return sum(n * k for n, k in self.linears)

    @property
    def products(self) -> int:
        """A number to which the multiplications of one decoder layer are proportional: of LDLQ and of its Hessians."""
        return sum(n * k * k for n, k in self.linears) + 3 * self.hidden**3 + self.mlp**3

    @property
    def embeddings(self) -> int:
        """Weights of the input embedding and the output head."""
        return 2 * self.vocabulary * self.hidden


MODELS = (Shape("7B", 4096, 14336, 1024, 32, 32000), Shape("70B", 8192, 28672, 1024, 80, 128256))
"""The shapes of Mistral 7B and of Llama 3 70B."""


def main() -> int:
    """Measures and writes the CSV; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/quantization.csv"))
    parser.add_argument("--hidden", type=int, default=2048, help="width of the layer that is measured (default 2048)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    large, small = (
        Shape(f"layer of {h}", h, 7 * h // 2, h // 4, LAYERS, VOCABULARY) for h in (args.hidden, args.hidden // 2)
    )
    searches = {"quip_sharp-2": bench_encode.lattice(1 << 16, time.process_time)}
    searches |= {name: bench_encode.viterbi(FORMATS[name], 256, time.process_time) for name in NAMES[1:]}
    search = {name: 1e-6 / row["mweights_per_s"] for name, row in searches.items()}
    dtype = fast_dtype(torch.bfloat16)
    shared = {"dtype": str(dtype), "tier": cpu_tier(), **origin(1)}
    rows: list[dict[str, Any]] = []
    for shape, tokens in ((small, FEW), (small, MORE), (large, FEW)):
        seconds, memory = measure(shape, tokens)
        row = {"kind": "measured", "model": shape.name, "format": NAMES[0], "tokens": tokens, "layers": LAYERS}
        rows.append(
            row | {"layer_mweights": shape.weights / 1e6, "seconds_per_layer": seconds, "memory_gb": memory / 1e9}
        )
        print(rows[-1], flush=True)
    costs = Costs.of(small, large, [row["seconds_per_layer"] for row in rows], search)
    peaks = [row["memory_gb"] for row in rows]
    growth = (peaks[2] - peaks[0]) / (large.mlp**2 - small.mlp**2)  # with the largest Hessian
    for shape, name, tokens in itertools.product(MODELS, NAMES, TOKENS):
        inside, layer = shape.weights * shape.layers, costs.seconds(shape, name, tokens)
        row = {"kind": "computed", "model": shape.name, "format": name, "tokens": tokens, "layers": shape.layers}
        row |= {"layer_mweights": shape.weights / 1e6, "seconds_per_layer": layer}
        row["core_hours"] = layer * shape.layers / 3600
        states = 2 * tokens * shape.hidden * dtype.itemsize / 1e9  # of the original model, and of the quantized one
        row["memory_gb"] = peaks[0] + growth * (shape.mlp**2 - small.mlp**2) + states
        row["source_gb"] = (inside + shape.embeddings) * 2 / 1e9
        row["output_gb"] = (inside * FORMATS[name].bits / 8 + shape.embeddings * 2) / 1e9
        rows.append(row)
    write_rows(args.csv, COLUMNS, [row | shared for row in rows])
    return 0


def measure(shape: Shape, tokens: int) -> tuple[float, int]:
    """(CPU seconds from the first layer's file to the second's, largest resident bytes of the run)."""
    with tempfile.TemporaryDirectory() as scratch:
        model, out, text = (Path(scratch) / name for name in ("model", "out", "text.txt"))
        sizes = {"hidden": shape.hidden, "mlp": shape.mlp, "heads": 32, "kv-heads": 8}
        sizes |= {"layers": LAYERS, "vocab": VOCABULARY}
        flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        if make_synthetic_checkpoint.main([str(model), "--format", "bf16", *flags]):
            raise ValueError(f"the layer of {shape.hidden} cannot be made: see the message above")
        _write_tokenizer(model)
        draw = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
        text.write_text(" ".join(map(str, draw.tolist())))
        command = [sys.executable, "-m", "quip_vllm.cli", "quantize", str(model), str(out), "--method", "quip_sharp"]
        command += ["--tune", "none", "--no-two-sided"]
        command += ["--bits", "2", "--calibration", str(text), "--sequences", str(tokens // SEQUENCE)]
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, "--sequence-length", str(SEQUENCE)], stderr=subprocess.DEVNULL, env=one)
        moments: list[float] = []
        while True:
            layers = len(glob(f"{out}/.quantize/layer-*.safetensors"))  # none where the folder is gone already
            moments += [_cpu_seconds(process.pid)] * (layers - len(moments))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.005)
    if status or len(moments) < 2:
        raise ValueError(f"{' '.join(command)} ended with status {status} after {len(moments)} layers: run it by hand")
    return moments[1] - moments[0], usage.ru_maxrss * 1024


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


@dataclass(frozen=True)
class Costs:
    """CPU seconds per weight and token, per multiplication, and per weight that a search encodes."""

    token: float
    product: float
    search: dict[str, float]

    @classmethod
    def of(cls, small: Shape, large: Shape, seconds: Sequence[float], search: dict[str, float]) -> "Costs":
        """From the layers that ``main`` measures."""
        token = (seconds[1] - seconds[0]) / (small.weights * (MORE - FEW))
        rest = seconds[2] - large.weights * (FEW * token + search[NAMES[0]])
        return cls(token, rest / large.products, search)

    def seconds(self, shape: Shape, name: str, tokens: int) -> float:
        """Of one decoder layer."""
        return shape.weights * (tokens * self.token + self.search[name]) + shape.products * self.product


if __name__ == "__main__":
    sys.exit(main())
