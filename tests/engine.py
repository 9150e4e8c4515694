# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine for tests, in a process of its own that starts one model after another: vLLM is imported once.

`Engine` is the tests' side of it. The other functions run in that process, in which vLLM runs whole.
"""

import gc
import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # it does not know the plugin's code: a stale graph could hide a change
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "QUIP_VLLM_ACTIVATIONS": "exact",
    "QUIP_VLLM_BACKEND": "cpu",
}
USUAL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.1,
    "enable_prefix_caching": False,
}
LIMIT_S = 300
HEADS = {"hidden_size": 128, "head_dim": 32}
"""Of a tiny model that vLLM's attention on a CPU serves."""
running = None


class Engine:
    """The process. A call runs a function of this module there; what it raises there, it raises here."""

    pool = None

    def __call__(self, function, *args, **kwargs):
        self.pool = self.pool or ProcessPoolExecutor(1, get_context("spawn"), prepare)
        return self.pool.submit(function, *args, **kwargs).result(LIMIT_S)

    def close(self):
        """Ends the process; the next call starts another."""
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def prepare():
    """What happens first in the process."""
    os.environ.update(ENVIRONMENT)


def start(folder, **options):
    """Serves a folder, in place of the one before."""
    global running
    from vllm import LLM

    stop()
    try:
        running = LLM(str(folder), **{**USUAL, **options})
    except Exception:  # of a kind that may not travel
        raise RuntimeError(traceback.format_exc()) from None


def stop():
    """Serves nothing."""
    global running
    from vllm.distributed import cleanup_dist_env_and_memory

    if running is not None:
        running.llm_engine.engine_core.shutdown()
    running = None
    gc.collect()
    cleanup_dist_env_and_memory()


def generated(prompts, adapters=None, schema=None, **sampling):
    """What greedy sampling says of prompts of token ids, all in one batch.

    Args:
        prompts: lists of token ids.
        adapters: a folder for each prompt, or None.
        schema: a JSON schema that the answers have to follow.
        sampling: more of vLLM's SamplingParams.

    Returns:
        For each prompt: token ids; text; log probabilities of the prompt's own tokens from the second one on and of
        the answer's, both empty unless asked for; how many of the prompt's tokens were cached.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    if schema is not None:
        sampling["structured_outputs"] = StructuredOutputsParams(json=schema)
    folders = list(dict.fromkeys(one for one in adapters or () if one))
    requests = {one: LoRARequest(str(one), 1 + i, str(one)) for i, one in enumerate(folders)}
    found = running.generate(
        [TokensPrompt(prompt_token_ids=list(one)) for one in prompts],
        SamplingParams(**{"temperature": 0, "ignore_eos": schema is None, **sampling}),
        use_tqdm=False,
        lora_request=None if adapters is None else [requests.get(one) for one in adapters],
    )

    def own(tokens, rows):
        return [row[token].logprob for token, row in zip(tokens, rows or (), strict=False) if row is not None]

    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "text": one.outputs[0].text,
            "prompt": own(one.prompt_token_ids, one.prompt_logprobs),
            "answer": own(one.outputs[0].token_ids, one.outputs[0].logprobs),
            "cached": one.num_cached_tokens,
        }
        for one in found
    ]


def scored(tokens):
    """Token -> log probability at each position of a prompt but the last, at the next one: its own and 20 more."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=20)
    (found,) = running.generate([TokensPrompt(prompt_token_ids=tokens)], sampling, use_tqdm=False)
    return [{token: one.logprob for token, one in row.items()} for row in found.prompt_logprobs[1:]]


def embedded(prompts):
    """The embedding of each prompt of token ids."""
    from vllm.inputs import TokensPrompt

    found = running.embed([TokensPrompt(prompt_token_ids=list(one)) for one in prompts], use_tqdm=False)
    return [one.outputs.embedding for one in found]


def called(name, *args, **kwargs):
    """Calls a method of vLLM's LLM; returns nothing."""
    try:
        getattr(running, name)(*args, **kwargs)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def metric(name):
    """The sum of a counter."""
    return sum(one.value for one in running.get_metrics() if one.name == name)
