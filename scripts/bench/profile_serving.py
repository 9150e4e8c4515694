# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes in vLLM on a CPU: linear layers, embedding, attention, other layers, the engine.

Usage: python scripts/bench/profile_serving.py NAME=FOLDER ... [--csv docs/benchmarks/cpu_step.csv]

Each checkpoint runs in a process of its own, on one thread, with the engine in that process, so that torch's profiler
sees it. A share is of the time that a step takes while it is profiled; `milliseconds` is that of a step which is not.
`layers` is what torch.compile made of norms, rotary positions, activations and sums. `engine` is the rest: scheduler,
sampler and vLLM's Python.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_serving
from benchmarking import ORIGIN, origin, write_rows

WORKLOADS = {"decode 1": (32, 1, 17), "decode 16": (32, 16, 17), "prefill 400": (400, 1, 1)}
"""Name -> tokens of a prompt, prompts, new tokens of each."""
PARTS = {
    "linear": (
        "quip_vllm::cpu_linear",
        "quip_vllm::cpu_experts",
        "aten::linear",
        "aten::mm",
        "aten::addmm",
        "_C::onednn_mm",
        "_C::cpu_fused_moe",
    ),
    "embedding": ("quip_vllm::cpu_embedding", "aten::embedding"),
    "attention": ("vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"),
}
"""Part of a step -> ops whose time is its own, with all that they call."""
SHARES = [*PARTS, "layers", "engine"]
"""Of the time of a step; they sum to 1."""
COLUMNS = ["name", "workload", "milliseconds", *SHARES, "vllm", *ORIGIN]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main() -> int:
    """Runs all, or one checkpoint's process; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/cpu_step.csv"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.checkpoints[0])), flush=True)
        os._exit(0)  # a thread of vLLM 0.32 may abort the interpreter on its way out
    environment, version = os.environ | bench_serving.ENVIRONMENT | ENVIRONMENT, importlib.metadata.version("vllm")
    rows = []
    for name, _, folder in (one.partition("=") for one in args.checkpoints):
        command = [sys.executable, __file__, folder, "--measure"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"profile_serving: {name} ended with code {done.returncode}", file=sys.stderr)
            return 1
        for row in json.loads(done.stdout.splitlines()[-1]):
            rows.append({"name": name, **row, "vllm": version, **origin(1)})
            print({key: rows[-1][key] for key in COLUMNS[:-5]}, flush=True)
        write_rows(args.csv, COLUMNS, rows)
    return 0


def measured(folder: str) -> list[dict[str, str | float]]:
    """One row per workload."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)

    def steps(length: int, count: int, new: int) -> float:
        prompts = torch.randint(vocabulary, (count, length), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    rows = []
    for workload, (length, count, new) in WORKLOADS.items():
        steps(length, count, new)
        plain = min(steps(length, count, new) - (steps(length, count, 1) if new > 1 else 0) for _ in range(3))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            whole = steps(length, count, new)
        events = profile.key_averages()
        spent = {event.key: event.cpu_time_total / 1e6 for event in events}
        row: dict[str, str | float] = {"workload": workload, "milliseconds": 1e3 * plain / max(new - 1, 1)}
        row |= {part: sum(spent.get(op, 0) for op in ops) / whole for part, ops in PARTS.items()}
        row["layers"] = (
            sum(event.self_cpu_time_total / 1e6 for event in events if "CompiledFxGraph" in event.key) / whole
        )
        row["engine"] = 1 - sum(float(row[part]) for part in SHARES[:-1])
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
