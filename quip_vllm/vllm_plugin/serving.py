# SPDX-License-Identifier: Apache-2.0
"""What vLLM computes for a prompt, without a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

MEMORY = 0.2
"""The share of the machine's memory that vLLM may take: little beyond a model's weights is needed."""
CANDIDATES = 5


def prompt_log_probabilities(
    folder: Path,
    tokens: Sequence[int],
    memory: float = MEMORY,
    trust_remote_code: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
) -> list[dict[int, float]]:
    """Loads a checkpoint in vLLM and runs one prompt.

    Args:
        folder: the checkpoint.
        tokens: the prompt.
        memory: vLLM's ``gpu_memory_utilization``, on a CPU a share of its memory as well.
        trust_remote_code: whether Python code among the checkpoint's files may run.
        dtype: of activations, as vLLM names it.
        compiled: whether torch.compile is on, as vLLM serves by default.

    Returns:
        For each position but the last, token -> natural log of its probability at the next one: of the most probable
        tokens and of the prompt's own.

    Raises:
        RuntimeError: vLLM does not start, or dies.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=CANDIDATES)
    try:
        llm = LLM(
            str(folder),
            dtype=dtype,
            enforce_eager=not compiled,
            max_model_len=len(tokens) + 1,
            max_num_seqs=1,
            gpu_memory_utilization=memory,
            enable_prefix_caching=False,
            trust_remote_code=trust_remote_code,
        )
        found = llm.generate(TokensPrompt(prompt_token_ids=list(tokens)), sampling, use_tqdm=False)[0].prompt_logprobs
        llm.llm_engine.engine_core.shutdown()  # at the interpreter's end it would race with that, which can abort
    except Exception as error:  # vLLM raises many kinds; the cause is in the log of its own process
        said = " ".join(str(error).split())
        raise RuntimeError(f"vLLM cannot run {folder} ({said:.300}): its lines above say why") from None
    assert found is not None  # it was asked for
    return [{token: one.logprob for token, one in (row or {}).items()} for row in list(found)[1:]]
