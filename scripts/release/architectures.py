# SPDX-License-Identifier: Apache-2.0
"""Every causal architecture of transformers: a tiny random model of it is quantized, served by vLLM and verified.

    python scripts/release/architectures.py RECORD.jsonl [--only llama falcon] [--table docs/architectures.md]

Each architecture runs in a process of its own and adds one line to RECORD.jsonl; those that are there are not run
again. --table writes docs/architectures.md from the record. Nothing is downloaded.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tiny_architectures import IGNORE, save

from quip_vllm.evaluation.verification import TOLERANCE, differences, expected_log_probabilities, save_dense
from quip_vllm.vllm_plugin.serving import prompt_log_probabilities

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 480


def verify(model_type):
    """The result of one architecture: status, what was said, and the largest difference."""
    from quip_vllm.quantizer.run import quantize
    from quip_vllm.quantizer.settings import Settings

    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        source.mkdir()
        try:
            save(source, model_type)
        except Exception as error:  # of any kind: the architecture's own code
            return {"status": "no tiny model", "why": words(error)}
        settings = Settings(
            str(source),
            "e8p",
            4,
            calibration=str(source / "text.txt"),
            sequences=8,
            sequence_length=64,
            ignore=IGNORE.get(model_type, ()),
        )
        try:
            quantize(settings, out)
        except ValueError as error:
            return {"status": "refused", "why": words(error).replace(str(source), "MODEL")}
        return compared(out, Path(name) / "dense")


def compared(out, dense):
    """How far a quantized model in vLLM is from the dequantized one in transformers, or else in vLLM.

    `dense` is the folder for the latter. vLLM runs float32, or bfloat16 where it says that it must.
    """
    try:
        tokens, expected = expected_log_probabilities(out)
    except ValueError as error:
        return {"status": "no reference", "why": words(error).replace(str(out), "OUT")}
    in_bf16 = {}
    try:
        try:
            served = prompt_log_probabilities(out, tokens)
        except RuntimeError as error:
            if not re.search("bf16|bfloat16", str(error), re.IGNORECASE):
                raise
            in_bf16 = {"dtype": "bfloat16"}
            served = prompt_log_probabilities(out, tokens, **in_bf16)
    except Exception as error:  # vLLM raises many kinds
        said = words(error).replace(str(out), "OUT")
        if "failed to be inspected" in said:  # of which vLLM's log has the cause
            said = import_problem(json.loads((out / "config.json").read_text())["architectures"][0])
        status = "not in vLLM" if "not supported" in said and "architecture" in said else "refused by vLLM"
        return {"status": status, "why": said}
    found = {"difference": float(differences(expected, served).max()), **in_bf16}
    if found["difference"] <= TOLERANCE:
        return {"status": "same", **found}
    try:
        save_dense(out, dense)
        theirs = prompt_log_probabilities(dense, tokens, **in_bf16)
    except Exception as error:
        said = words(error).replace(str(dense), "DENSE")
        return {"status": "failed", "why": f"off by {found['difference']:.2g}, and the dequantized model: {said}"}
    without, between = float(differences(expected, theirs).max()), float(differences(theirs, served).max())
    found |= {"without": without, "between": between}
    same = between <= (without if in_bf16 else TOLERANCE)  # in bf16 both are off by rounding, in ways of their own
    return {"status": "same in vLLM" if same else "different", **found}


def import_problem(architecture):
    """Why vLLM's code of an architecture cannot be imported."""
    from vllm.model_executor.models import ModelRegistry

    try:
        return f"{ModelRegistry.models[architecture].load_model_cls()} can be imported"
    except Exception as error:
        return words(error)


def words(error):
    """An error in one line of whole words, without what pydantic puts around it."""
    said = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
    said = re.sub(r"^ValidationError: .*? Value error, ", "", said).split(" [type=")[0]
    return said if len(said) <= 300 else said[:300].rpartition(" ")[0] + " ..."


def model_types():
    """Every causal architecture that transformers knows, with the class of its model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        kind: name if isinstance(name, str) else name[0] for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }


def in_vllm():
    """The architectures that vLLM has code for, its adapters for any model of transformers aside."""
    from vllm.model_executor.models import ModelRegistry

    return set(ModelRegistry.get_supported_archs())


def missing(architecture):
    """The result of an architecture that vLLM has no code for."""
    from vllm.model_executor.models import registry

    last = getattr(registry, "_PREVIOUSLY_SUPPORTED_MODELS", {}).get(architecture)
    return {"status": "not in vLLM"} | ({"why": f"it was until {last}"} if last else {})


def run(record, only):
    """Adds what is missing to the record: first what vLLM has code for."""
    known, all_types = in_vllm(), model_types()
    unknown = set(only) - set(all_types)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: transformers knows no such causal architecture")
    done = {one["model_type"] for one in read(record)}
    todo = [kind for kind in sorted(all_types, key=lambda kind: all_types[kind] not in known) if kind not in done]
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "QUIP_VLLM_ACTIVATIONS": "exact",  # in bf16, too
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    for kind in [kind for kind in todo if not only or kind in only]:
        start, found = time.time(), {"status": "not in vLLM"}
        if all_types[kind] in known:
            command = [sys.executable, str(Path(__file__).resolve()), "--one", kind]
            try:
                done_ = subprocess.run(
                    command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=LIMIT_SECONDS
                )
                last = [line for line in done_.stdout.splitlines() if line.startswith("RESULT ")]
                tail = (done_.stderr.strip().splitlines() or ["no output"])[-1][:300]
                found = json.loads(last[-1].removeprefix("RESULT ")) if last else {"status": "failed", "why": tail}
            except subprocess.TimeoutExpired:
                found = {"status": "failed", "why": f"more than {LIMIT_SECONDS} seconds"}
        line = {"model_type": kind, "architecture": all_types[kind], **found}
        line |= {"seconds": round(time.time() - start), "processor": processor()}
        print(json.dumps(line), flush=True)
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(record):
    """The record's lines."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def processor():
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return (models or [platform.machine()])[0]


def machine(processors):
    """The processors, the versions and the commit."""
    import transformers
    import vllm

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        f"{' and '.join(processors)}, vLLM {vllm.__version__}, transformers {transformers.__version__}, "
        f"{datetime.date.today()}. The page was written at commit {commit.strip()}, its rows were run at it or before"
    )


def write_table(record, file):
    """docs/architectures.md from the record."""
    found, known, all_types = {one["model_type"]: one for one in read(record)}, in_vllm(), model_types()
    nothing = {kind: {"status": "not run yet"} if name in known else missing(name) for kind, name in all_types.items()}
    rows = [
        {"model_type": kind, "architecture": all_types[kind], **nothing[kind], **found.get(kind, {})}
        for kind in nothing
    ]
    rows.sort(key=lambda one: (one["architecture"], one["model_type"]))
    counts = Counter(one["status"] for one in rows)
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# Architectures",
        "",
        "For each causal architecture that transformers knows, a tiny random model was quantized at 4 bits with `e8p`",
        "and loaded in vLLM in float32. Its log probabilities of a short prompt were compared with those of the",
        "dequantized model in transformers. `scripts/release/architectures.py` does it and writes this page;",
        "`quip-vllm verify OUT` does it for a checkpoint of yours.",
        "",
        "* *same*: the two agree to the difference that is given.",
        "* *same in vLLM*: the quantized and the dequantized model agree in vLLM to the first number; vLLM and",
        "  transformers disagree about the dequantized one, by the second. Where bf16 stands behind them, vLLM takes",
        "  no float32.",
        "* *refused*: `quip-vllm quantize` says why. *refused by vLLM*: the model does not start there.",
        "* *not in vLLM*: vLLM has no code of its own for it. *no tiny model*, *no reference*: transformers could not",
        "  make one, or could not load the checkpoint. *failed*: the process ended without a result.",
        "",
        "Convolutions and what else is no matrix keep their weights. Experts that transformers does not stack as it",
        "does Qwen3-MoE's, GPT-OSS's, Nemotron-H's or Llama 4's are refused; the sentence names the tensor. Models",
        "with latent attention were quantized with `--ignore kv_b_proj`, those of Mamba's first version with",
        "`--ignore dt_proj`. vLLM's code of some models reads keys that the config of transformers lacks.",
        "",
        f"Machine: {machine(sorted({one['processor'] for one in found.values() if 'processor' in one}))}.",
        "",
        f"transformers knows {len(rows)} causal architectures, and vLLM {len(rows) - counts['not in vLLM']} of them; "
        f"{len(rows) - counts['not in vLLM'] - counts['not run yet']} were run. Results: "
        + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        + ".",
        "",
        "| architecture | model type | result |",
        "|---|---|---|",
    ]
    for one in rows:
        said = f" to {one['difference']:.1g}" if "difference" in one else f": {one['why']}" if "why" in one else ""
        if "between" in one:
            said = f" to {one['between']:.1g}, {one['without']:.1g}" + (", bf16" if "dtype" in one else "")
        result = (one["status"] + said).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {one['architecture']} | `{one['model_type']}` | {result} |")
    file.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL_TYPE")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(verify(args.one)), flush=True)
        os._exit(0)  # an engine may leave threads behind
    if args.record is None:
        parser.error("give RECORD.jsonl")
    run(args.record, args.only)
    if args.table:
        write_table(args.record, args.table)


if __name__ == "__main__":
    main()
