# SPDX-License-Identifier: Apache-2.0
"""Whether what is served is what the checkpoint holds: log probabilities of a short prompt, by two programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quip_vllm.checkpoint.hub import SIDE_FILES, copy_files
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import dense_state, load_model

PROMPT_TOKENS = 48
TOLERANCE = 1e-3
"""Largest difference of log probabilities that rounding in float32 explains: 3.5e-5 was seen on SmolLM2-135M."""


@torch.inference_mode()
def expected_log_probabilities(folder: Path, trust_remote_code: bool = False) -> tuple[list[int], torch.Tensor]:
    """Runs a model, dequantized, in transformers in float32 on a prompt of random tokens drawn from a fixed seed.

    Returns:
        the prompt's tokens, and natural logs of probabilities [tokens, vocabulary].

    Raises:
        ValueError: see `load_model`.
    """
    model = load_model(str(folder), trust_remote_code)
    config = model.config.get_text_config()
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    special = {token for one in named for token in (one if isinstance(one, list) else [one])}  # several may end a text
    draw = torch.randint(0, config.vocab_size, (2 * PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens = [token for token in draw.tolist() if token not in special][:PROMPT_TOKENS]
    return tokens, model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)


def differences(expected: Tensor | Sequence[Mapping[int, float]], served: Sequence[Mapping[int, float]]) -> Tensor:
    """Between log probabilities of the tokens that both have at a position; NaN counts as infinitely far.

    Args:
        expected: [tokens, vocabulary], or as `served`.
        served: token -> log probability, at each position.

    Returns:
        Absolute differences in one dimension.
    """
    both = [
        (float(expected[i][token]), found)
        for i, row in enumerate(served)
        for token, found in row.items()
        if isinstance(expected, Tensor) or token in expected[i]
    ]
    return torch.tensor([abs(a - b) for a, b in both], dtype=torch.float64).nan_to_num(float("inf"))


def save_dense(folder: Path, out: Path) -> None:
    """Writes a checkpoint's model with its weights dequantized, in float32, and the other files into a new folder."""
    out.mkdir()
    copy_files(folder, out, [*SIDE_FILES, "*.py"], ("config.json",))
    config = read_json(folder / "config.json")
    write_json(out / "config.json", {name: value for name, value in config.items() if name != "quantization_config"})
    save_file(dense_state(folder), out / "model.safetensors", metadata={"format": "pt"})
