# SPDX-License-Identifier: Apache-2.0
"""Run as a program: what vLLM generates for two prompts on several ranks, each a process of its own.

Usage: python tests/ranks.py FILE.json CHECKPOINT TENSOR_PARALLEL PIPELINE_PARALLEL [CHECKPOINT ...]
"""

import gc
import json
import sys
from multiprocessing import get_context
from pathlib import Path

PROMPTS = [list(range(40, 60)), [7, 3, 250]]


def generated(folder: str, ranks: int, stages: int) -> list[list[int]]:
    """The token ids of each prompt's completion.

    A second stage makes its buffers while it warms up, which vLLM 0.32 leaves out on a CPU if it compiles nothing.
    """
    from vllm import LLM, SamplingParams
    from vllm.config import CompilationMode
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=stages == 1,
        compilation_config={} if stages == 1 else {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"},
        max_model_len=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.1,
        enable_prefix_caching=False,
        tensor_parallel_size=ranks,
        pipeline_parallel_size=stages,
        distributed_executor_backend="mp",
    )
    prompts = [TokensPrompt(prompt_token_ids=one) for one in PROMPTS]
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    found = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def main(file: str, *jobs: str) -> None:
    """Writes the completions of each job, by ranks that are forked: spawned, as vLLM has it, each would import vLLM."""
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: get_context("fork")
    described = zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True)
    found = [generated(folder, int(ranks), int(stages)) for folder, ranks, stages in described]
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
