# SPDX-License-Identifier: Apache-2.0
"""Hours, memory and disk of quantizing models of 7B and 70B weights, computed from one measured decoder layer.

Usage: python scripts/bench/estimate_quantization.py [--csv docs/benchmarks/quantization.csv] [--hidden 4096]

`quip-vllm quantize --method quip_sharp --bits 2` runs on three models of two layers and random weights: a layer of 7B
with few and with more calibration tokens, and one of half its width. The measured time is the one between the shards
of the first and the second layer, that is one layer of a long run. Three unknowns follow: seconds per weight and token
(forward passes and Hessians), per weight (the search), and per multiplication of LDLQ. The time of the trellis search
replaces that of the lattice at the speeds that bench_encode measures in the same run. No whole run is measured.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_encode
import make_synthetic_checkpoint
import torch
from benchmarking import FORMATS, ORIGIN, origin, write_rows

from quip_vllm.ops import cpu_tier
from quip_vllm.quantizer.model import fast_dtype

SEQUENCE = 512
FEW, MORE = SEQUENCE, 9 * SEQUENCE
"""Calibration tokens of the measured runs."""
TOKENS = (16384, 65536, 524288)
"""Calibration tokens of the computed runs: self-written text's default, quality.md's, and a file's default."""
VOCABULARY = 256
NAMES = ["quip_sharp-2", "qtip-hyb-2", "qtip-1mad-4"]
COLUMNS = ["kind", "model", "format", "tokens", "layers", "layer_mweights", "seconds_per_layer", "hours", "memory_gb"]
COLUMNS += ["source_gb", "output_gb", "dtype", "tier", *ORIGIN]


@dataclass(frozen=True)
class Shape:
    """A model of the Llama family; ``kv`` is the outputs of the key projection."""

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
        """Multiplications of LDLQ in one decoder layer."""
        return sum(n * k * k for n, k in self.linears)

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
    parser.add_argument("--hidden", type=int, default=4096, help="width of the layer that is measured (default 4096)")
    args = parser.parse_args()
    large, small = (
        Shape(f"layer of {h}", h, 7 * h // 2, h // 4, 2, VOCABULARY) for h in (args.hidden, args.hidden // 2)
    )
    searches = {"quip_sharp-2": bench_encode.lattice(1 << 16)}
    searches |= {name: bench_encode.viterbi(FORMATS[name], 256) for name in NAMES[1:]}
    speed = {name: row["mweights_per_s"] * 1e6 for name, row in searches.items()}
    dtype = fast_dtype(torch.bfloat16)
    shared = {"dtype": str(dtype), "tier": cpu_tier(), **origin(torch.get_num_threads())}
    rows: list[dict[str, Any]] = []
    for shape, tokens in ((small, FEW), (large, FEW), (large, MORE)):
        seconds, memory = measure(shape, tokens)
        row = {"kind": "measured", "model": shape.name, "format": NAMES[0], "tokens": tokens, "layers": 2}
        rows.append(
            row | {"layer_mweights": shape.weights / 1e6, "seconds_per_layer": seconds, "memory_gb": memory / 1e9}
        )
        print(rows[-1], flush=True)
    costs = solve((small, large), [row["seconds_per_layer"] for row in rows])
    memory = [row["memory_gb"] * 1e9 for row in rows]
    for shape in MODELS:
        for name in NAMES:
            for tokens in TOKENS:
                search = shape.weights * (1 / speed[name] - 1 / speed[NAMES[0]])
                layer = seconds_of(shape, tokens, costs) + search
                row = {
                    "kind": "computed",
                    "model": shape.name,
                    "format": name,
                    "tokens": tokens,
                    "layers": shape.layers,
                }
                row |= {"layer_mweights": shape.weights / 1e6, "seconds_per_layer": layer}
                row |= {"hours": layer * shape.layers / 3600}
                row["memory_gb"] = memory_of(shape, tokens, (small, large), memory, dtype.itemsize) / 1e9
                inside = shape.weights * shape.layers
                row["source_gb"] = (inside + shape.embeddings) * 2 / 1e9
                row["output_gb"] = (inside * FORMATS[name].bits / 8 + shape.embeddings * 2) / 1e9
                rows.append(row)
    write_rows(args.csv, COLUMNS, [row | shared for row in rows])
    return 0


def measure(shape: Shape, tokens: int) -> tuple[float, int]:
    """(seconds from the first layer's shard to the second's, largest resident bytes of the run)."""
    with tempfile.TemporaryDirectory() as scratch:
        model, out, text = (Path(scratch) / name for name in ("model", "out", "text.txt"))
        sizes = {"hidden": shape.hidden, "mlp": shape.mlp, "heads": 32, "kv-heads": 8}
        sizes |= {"layers": 2, "vocab": VOCABULARY}
        flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        if make_synthetic_checkpoint.main([str(model), "--format", "bf16", *flags]):
            raise ValueError(f"the layer of {shape.hidden} cannot be made: see the message above")
        _write_tokenizer(model)
        draw = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
        text.write_text(" ".join(map(str, draw.tolist())))
        command = [sys.executable, "-m", "quip_vllm.cli", "quantize", str(model), str(out), "--method", "quip_sharp"]
        command += ["--bits", "2", "--calibration", str(text), "--sequences", str(tokens // SEQUENCE)]
        process = subprocess.Popen([*command, "--sequence-length", str(SEQUENCE)], stderr=subprocess.DEVNULL)
        moments: list[float] = []
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            shards = len(list(out.glob("*.safetensors")))
            moments += [time.perf_counter()] * (shards - len(moments))
            if ended:
                break
            time.sleep(0.02)
    if status or len(moments) < 2:
        raise ValueError(f"{' '.join(command)} ended with status {status} after {len(moments)} shards: run it by hand")
    return moments[1] - moments[0], usage.ru_maxrss * 1024


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def solve(shapes: tuple[Shape, Shape], seconds: list[float]) -> tuple[float, float, float]:
    """Seconds (per weight and token, per weight, per multiplication of LDLQ) from the three measured runs."""
    small, large = shapes
    runs = ((small, FEW), (large, FEW), (large, MORE))
    equations = [[shape.weights * tokens, shape.weights, shape.products] for shape, tokens in runs]
    matrix = torch.tensor(equations, dtype=torch.float64)
    scale = matrix.amax(0)
    found = torch.linalg.solve(matrix / scale, torch.tensor(seconds, dtype=torch.float64)) / scale
    if (found < 0).any():
        raise ValueError(
            f"the runs took {seconds} s, which no costs explain: run again on a machine that does nothing else"
        )
    return tuple(found.tolist())


def seconds_of(shape: Shape, tokens: int, costs: tuple[float, float, float]) -> float:
    """Of one decoder layer, quip_sharp at 2 bits."""
    per_token, per_weight, per_product = costs
    return shape.weights * (tokens * per_token + per_weight) + shape.products * per_product


def memory_of(shape: Shape, tokens: int, shapes: tuple[Shape, Shape], peaks: list[float], itemsize: int) -> float:
    """Bytes: what does not depend on the shape, what grows with the largest Hessian, and the hidden states twice."""
    small, large = shapes
    growth = (peaks[1] - peaks[0]) / (large.mlp**2 - small.mlp**2)
    return peaks[0] + growth * (shape.mlp**2 - small.mlp**2) + 2 * tokens * shape.hidden * itemsize


if __name__ == "__main__":
    sys.exit(main())
