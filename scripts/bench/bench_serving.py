# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of checkpoints in vLLM's offline engine: decoding at several batch sizes, and one prefill.

Usage: python scripts/bench/bench_serving.py NAME=FOLDER|NAME=FILE.gguf ... [--csv docs/benchmarks/cpu_serving.csv]
           [--rounds 2]

Activations are bfloat16, or those of NAME=FOLDER@float32: a CPU without bf16 instructions may be faster with these.
Each checkpoint runs in a process of its own, one after the other; --rounds N goes over all checkpoints N times, so that
a slow spell of the machine does not hit one of them alone. The time of decoding is that of 33 new tokens less that of
1. Each figure is the median over --repeats and rounds, with fresh prompts. Ratios are to the checkpoints named
bf16 and gptq-int4 (--bf16, --int4). The CSV is written again after each process; a failure is a row with its error.
A GGUF file runs in llama.cpp (pip install llama-cpp-python, which compiles it for this machine) on as many threads as
vLLM computes on, with random tokens and without a sampler. vLLM's compile cache does not know the plugin's code, so it
is off unless VLLM_DISABLE_COMPILE_CACHE says otherwise.
"""

import argparse
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarking import ORIGIN, origin, write_rows

from quip_vllm.checkpoint.store import CheckpointReader, read_json

PROMPT, NEW = 32, 32
BIND = "VLLM_CPU_OMP_THREADS_BIND"
COLUMNS = ["name", "phase", "batch", "tokens_per_s", "lowest", "highest", "over_bf16", "over_int4", "samples"]
COLUMNS += ["weights_bytes", "vllm", *ORIGIN, "error"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DISABLE_COMPILE_CACHE": "1"}

Rates = dict[str, list[float]]
"""Workload ("decode 16", "prefill 1") -> tokens per second, one figure per repeat."""


def main() -> int:
    """Runs all, or one checkpoint's process; returns the exit code: 1 if a process failed."""
    args = _parser().parse_args()
    if args.measure:
        _measure(args)
    try:
        folders, dtypes = {}, {}
        for name, _, place in (item.rpartition("=") for item in args.checkpoints):
            folder, _, dtypes[name] = place.partition("@")
            folders[name] = Path(folder)
        if "" in folders or len(folders) < len(args.checkpoints):
            raise ValueError(f"checkpoints are {args.checkpoints}: give NAME=FOLDER with a name of its own each")
        if unknown := set(dtypes.values()) - {"", "bfloat16", "float32"}:
            raise ValueError(f"the dtype of a checkpoint is {unknown.pop()}: give @float32, @bfloat16 or nothing")
        size = {name: _bytes(folder) for name, folder in folders.items()}
    except (ValueError, OSError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    found: dict[str, Rates] = {name: {} for name in folders}
    errors = dict.fromkeys(folders, "")
    shared = {"vllm": importlib.metadata.version("vllm"), **origin(os.environ.get(BIND, "vLLM's default"))}
    for turn in range(args.rounds):
        for name, folder in folders.items():
            print(f"== round {turn + 1} of {args.rounds}: {name}", flush=True)
            rates, failure = _run(args, folder, dtypes[name] or "bfloat16", seed=turn)
            for workload, values in rates.items():
                found[name].setdefault(workload, []).extend(values)
                print(f"   {workload}: {median(values):.1f} tokens/s", flush=True)
            if failure:
                errors[name] = failure
                print(f"   {failure}", file=sys.stderr, flush=True)
            rows = table(found, errors, args.bf16, args.int4)
            write_rows(args.csv, COLUMNS, [{**row, "weights_bytes": size[row["name"]], **shared} for row in rows])
    return int(any(errors.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER[@DTYPE]")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prefill", type=int, default=400, help="tokens of the prefill's prompt (default 400)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/cpu_serving.csv"))
    parser.add_argument("--logs", type=Path, help="keep each engine's log there")
    parser.add_argument("--bf16", default="bf16", metavar="NAME", help="which checkpoint is the bf16 one")
    parser.add_argument("--int4", default="gptq-int4", metavar="NAME", help="which checkpoint is the int4 one")
    parser.add_argument("--memory", type=float, default=0.4, help="vLLM's gpu_memory_utilization: share of the RAM")
    parser.add_argument("--limit", type=float, default=1800, metavar="S", help="seconds a process may take")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, metavar="JSON", help=argparse.SUPPRESS)
    return parser


def table(found: dict[str, Rates], errors: dict[str, str], bf16: str, int4: str) -> list[dict[str, Any]]:
    """One row per checkpoint and workload: median, range, ratios to the two baselines; one more row for an error."""
    rows: list[dict[str, Any]] = []
    for name, rates in found.items():
        for workload, values in rates.items():
            phase, batch = workload.split()
            row = {"name": name, "phase": phase, "batch": int(batch), "samples": len(values)}
            row |= {"tokens_per_s": median(values), "lowest": min(values), "highest": max(values)}
            for column, baseline in (("over_bf16", bf16), ("over_int4", int4)):
                if workload in found.get(baseline, {}):
                    row[column] = median(values) / median(found[baseline][workload])
            rows.append(row)
        if errors[name]:
            rows.append({"name": name, "error": errors[name]})
    return rows


def _bytes(place: Path) -> int:
    return place.stat().st_size if place.suffix == ".gguf" else sum(CheckpointReader(place).bytes_of.values())


def _run(args: argparse.Namespace, folder: Path, dtype: str, seed: int) -> tuple[Rates, str]:
    """Measures one checkpoint in a process of its own: what it got done, and what went wrong ("" for nothing)."""
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch) / "rates.json", (args.logs or Path(scratch)) / f"{folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            __file__,
            str(folder),
            "--measure",
            str(result),
            "--seed",
            str(seed),
            "--dtype",
            dtype,
        ]
        command += ["--batches", *map(str, args.batches), "--prefill", str(args.prefill)]
        command += ["--repeats", str(args.repeats), "--memory", str(args.memory)]
        environment = {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
        with open(log, "w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        error = ""
        try:
            if process.wait(args.limit):
                error = f"ended with code {process.returncode}: {_last_error(log)}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {args.limit:.0f} s"
        finally:
            if process.poll() is None or error:  # the engine is a child of its own, and may outlive its parent
                _kill_group(process)
        rates = read_json(result) if result.exists() else {}
    return rates, error


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or ["no output"])[-1][-300:]


def _measure(args: argparse.Namespace) -> None:
    """The process of one checkpoint. Writes the rates after each workload and does not return."""
    engine = LlamaCpp if args.checkpoints[0].endswith(".gguf") else Vllm
    served, draw = engine(args), random.Random(args.seed)

    def generate(count: int, length: int) -> Callable[[int], float]:
        """The same prompts for different numbers of new tokens: new tokens -> seconds."""
        prompts = [draw.sample(range(served.vocabulary), length) for _ in range(count)]

        def run(new: int) -> float:
            begin = time.perf_counter()
            served.generate(prompts, new)
            return time.perf_counter() - begin

        return run

    def rate(phase: str, batch: int, length: int) -> float:
        run = generate(batch, length)
        before = run(1)
        return batch * length / before if phase == "prefill" else batch * NEW / (run(NEW + 1) - before)

    rates: Rates = {}
    for phase, batch, length in (*(("decode", batch, PROMPT) for batch in args.batches), ("prefill", 1, args.prefill)):
        generate(batch, length)(2)  # warm-up
        rates[f"{phase} {batch}"] = [rate(phase, batch, length) for _ in range(args.repeats)]
        args.measure.write_text(json.dumps(rates))
    served.close()
    # A thread of vLLM 0.32 that still watches the engine may abort the interpreter on its way out: leave without that.
    sys.stdout.flush()
    os._exit(0)


class Vllm:
    """A checkpoint in vLLM's offline engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        self.folder = args.checkpoints[0]
        self.vocabulary = read_json(Path(self.folder) / "config.json")["vocab_size"]
        self.llm = LLM(
            self.folder,
            dtype=args.dtype,
            max_model_len=1024,
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=max(2048, PROMPT * max(args.batches)),  # the largest batch is one prefill step
            gpu_memory_utilization=args.memory,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """Generates ``new`` tokens for each prompt, greedily."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        if not all(len(output.outputs[0].token_ids) == new for output in outputs):
            raise RuntimeError(f"{self.folder}: vLLM did not give {new} tokens to each of {len(prompts)} prompts")

    def close(self) -> None:
        """Ends the engine's process."""
        self.llm.llm_engine.engine_core.shutdown()


class LlamaCpp:
    """A GGUF file in llama.cpp, by its C interface: all prompts in one batch, then one batch per step."""

    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            args.checkpoints[0].encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {args.checkpoints[0]}: its lines above say why")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = max(args.batches)
        options.n_batch = max(2048, PROMPT * max(args.batches))
        options.n_ctx = max(args.batches) * max(args.prefill, PROMPT + NEW + 1)
        options.kv_unified = True  # else a sequence gets its share of n_ctx only
        options.n_threads = options.n_threads_batch = threads()
        self.context = llama_cpp.llama_init_from_model(model, options)
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        print(llama_cpp.llama_print_system_info().decode(), flush=True)

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """Evaluates the prompts and ``new`` - 1 steps more; the tokens of the steps are those of the prompts."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self._decode([(token, at, which, at + 1 == len(prompt)) for which, prompt in enumerate(prompts)
                      for at, token in enumerate(prompt)])  # fmt: skip
        for step in range(new - 1):
            self._decode([(prompt[step % len(prompt)], len(prompt) + step, which, True)
                          for which, prompt in enumerate(prompts)])  # fmt: skip

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama.cpp could not evaluate a batch of {len(tokens)} tokens")
        self.api.llama_get_logits(self.context)  # waits for the result

    def close(self) -> None:
        """Nothing to end: the process leaves."""


def threads() -> int:
    """The threads on which vLLM computes where nothing is said: all cores but one, which its server keeps."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


if __name__ == "__main__":
    sys.exit(main())
