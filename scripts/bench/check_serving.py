# SPDX-License-Identifier: Apache-2.0
"""Compares what vLLM serves with the dequantized model in transformers, by the log probabilities of a prompt.

Usage: python scripts/bench/check_serving.py CHECKPOINT [--dtype float32] [--text TEXT] [--eager] [--json FILE]

Both score the same tokens; for each position the 20 most likely tokens and the actual one are compared. Prints one JSON
object: max_difference and mean_difference (absolute, of log probabilities), positions, dtype.
"""

import argparse
import json
import os
import sys

import torch

TEXT = (
    "Paris is the capital and largest city of France. The Seine runs through it, and its museums, bridges and markets "
    "draw visitors from every part of the world. In 1889 a tower of iron was built there for an exhibition."
)


def served(folder: str, tokens: list[int], dtype: str, eager: bool) -> list[dict[int, float]]:
    """Token -> log probability at each position from the second on, from vLLM's offline engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype=dtype, max_model_len=len(tokens) + 1, enforce_eager=eager, gpu_memory_utilization=0.3, seed=0
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20)
    output = llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)[0]
    llm.llm_engine.engine_core.shutdown()
    return [{token: entry.logprob for token, entry in row.items()} for row in output.prompt_logprobs[1:]]


def main() -> None:
    """Prints the comparison of one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", help="write the figures there as well; vLLM logs to the same output")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    from quip_vllm.evaluation.loading import load_model

    tokens = AutoTokenizer.from_pretrained(args.checkpoint)(args.text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = load_model(args.checkpoint)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    rows = served(args.checkpoint, tokens, args.dtype, args.eager)
    differences = torch.tensor(
        [abs(value - float(expected[i, token])) for i, row in enumerate(rows) for token, value in row.items()]
    )
    figures = {
        "checkpoint": args.checkpoint,
        "dtype": args.dtype,
        "positions": len(rows),
        "max_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
    }
    print(json.dumps(figures))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file)
    # The engine is shut down. A thread of vLLM 0.32 that still watches it may abort the interpreter on its way out
    # ("terminate called without an active exception", seen once in ten runs), so leave without that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
