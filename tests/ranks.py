# SPDX-License-Identifier: Apache-2.0
"""Run as a program: what vLLM generates for two prompts on several tensor-parallel ranks.

Usage: python tests/ranks.py CHECKPOINT RANKS FILE.json
"""

import json
import sys
from pathlib import Path

PROMPTS = [list(range(40, 60)), [7, 3, 250]]


def main(folder: str, ranks: str, file: str) -> None:
    """Writes the token ids of each prompt's completion."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.1,
        enable_prefix_caching=False,
        tensor_parallel_size=int(ranks),
        distributed_executor_backend="mp",
    )
    prompts = [TokensPrompt(prompt_token_ids=one) for one in PROMPTS]
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    found = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling, use_tqdm=False)]
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
