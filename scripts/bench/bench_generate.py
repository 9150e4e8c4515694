# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of checkpoints in transformers, for a machine without vLLM: decoding at several batch sizes.

Usage: python scripts/bench/bench_generate.py NAME=FOLDER ... [--device cuda] [--dtype float16] [--csv FILE]

On a GPU transformers compiles a step over a cache of a fixed size, which runs in a CUDA graph. The time of decoding is
that of 33 new tokens less that of 1, the median of --repeats. Ratios are to the first checkpoint.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarking import ORIGIN, origin, write_rows
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import quip_vllm.hf_plugin  # noqa: F401  # registers the methods

PROMPT, NEW = 32, 32
COLUMNS = ["name", "batch", "tokens_per_s", "lowest", "highest", "over_first", "samples", "device", "dtype", "torch"]
COLUMNS += ["transformers", *ORIGIN]


def main() -> int:
    """Measures and writes the CSV; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--csv", type=Path, default=Path("build/generated.csv"))
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench_generate: torch sees no GPU: give --device cpu", file=sys.stderr)
        return 2
    import transformers

    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    shared = {"device": device, "dtype": args.dtype, "samples": args.repeats, "torch": torch.__version__}
    shared |= {
        "transformers": transformers.__version__,
        **origin("GPU" if device != "cpu" else torch.get_num_threads()),
    }
    rows: list[dict[str, Any]] = []
    for item in tqdm(args.checkpoints, unit="checkpoint"):
        name, _, folder = item.partition("=")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().to(args.device)
        for batch in args.batches:
            rates = [batch * NEW / seconds for seconds in decoding(model, batch, args.repeats)]
            first = next((row["tokens_per_s"] for row in rows if row["batch"] == batch), median(rates))
            row = {"name": name, "batch": batch, "tokens_per_s": median(rates), "over_first": median(rates) / first}
            rows.append({**row, "lowest": min(rates), "highest": max(rates), **shared})
            write_rows(args.csv, COLUMNS, rows)
        del model
        gc.collect()
    return 0


@torch.inference_mode()
def decoding(model: Any, batch: int, repeats: int) -> list[float]:
    """Seconds that NEW tokens take behind the first one, once per repeat."""
    tokens = torch.randint(3, model.config.get_text_config().vocab_size, (batch, PROMPT), device=model.device)
    fixed = {"cache_implementation": "static"} if tokens.is_cuda else {}

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            **fixed,
        )
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for count in (NEW + 1, 1) * 2:  # compiles
        seconds(count)
    return [seconds(NEW + 1) - seconds(1) for _ in range(repeats)]


if __name__ == "__main__":
    sys.exit(main())
