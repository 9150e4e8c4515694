# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL divergence over windows of a text.

The text is tokenized whole, with nothing added, and cut into windows without overlap. Each window predicts its tokens
from the second on. Every figure is a mean over all predictions.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

CHUNK = 256  # positions whose full-vocabulary distributions are held at once


def windows_of(text_file: str, tokenizer: Any, length: int, count: int | None) -> Tensor:
    """Tokens, int64 [windows, length]. Raises ValueError if the text has fewer windows than one, or than ``count``."""
    if length < 2:
        raise ValueError(f"--sequence-length is {length}: a window predicts from its second token on; give at least 2")
    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text {text_file} cannot be read ({error}): give a UTF-8 file") from None
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    available = len(ids) // length
    if count is not None and count < 1:
        raise ValueError(f"--windows is {count}: give at least 1, or leave it away for all")
    if available < (count or 1):
        raise ValueError(f"{text_file} has {available} windows of {length} tokens: {count or 1} are asked for")
    available = count or available
    return ids[: available * length].view(available, length)


@torch.inference_mode()
def score(models: Sequence[Any], windows: Tensor, reference: Any | None = None) -> list[dict[str, float]]:
    """Perplexity of each model, and with a reference KL(reference || model) in nats and top-1 agreement.

    Args:
        models: causal LMs over one vocabulary.
        reference: another, to compare with.
        windows: int64 [windows, length].

    Returns:
        For each model ``perplexity`` and, with a reference, ``reference_perplexity``, ``kl_divergence``,
        ``top1_agreement``.
    """
    nll, divergence, agreement = ([0.0] * len(models) for _ in range(3))
    reference_nll = 0.0
    for window in tqdm(windows, desc="windows", unit="window"):
        hidden = [_hidden(model, window) for model in models]
        other = _hidden(reference, window) if reference is not None else None
        for start in range(0, len(window) - 1, CHUNK):
            targets = window[start + 1 : start + 1 + CHUNK, None]
            span = slice(start, start + len(targets))
            if other is not None:
                log_p = _log_probabilities(reference, other, span)
                reference_nll -= _total(log_p.gather(1, targets))
                p, best = log_p.exp(), log_p.argmax(1)
            for i, model in enumerate(models):
                log_q = _log_probabilities(model, hidden[i], span)
                nll[i] -= _total(log_q.gather(1, targets))
                if other is not None:
                    divergence[i] += _total((p * (log_p - log_q)).sum(1))
                    agreement[i] += int((best == log_q.argmax(1)).sum())
    if not all(math.isfinite(value) for value in (*nll, reference_nll)):
        raise ValueError("a model's logits hold a NaN or an infinity on this text: its weights are damaged")
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    figures = [{"perplexity": math.exp(value / predictions)} for value in nll]
    if reference is not None:
        for i, row in enumerate(figures):
            row["reference_perplexity"] = math.exp(reference_nll / predictions)
            row["kl_divergence"] = divergence[i] / predictions
            row["top1_agreement"] = agreement[i] / predictions
    return figures


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _hidden(model: Any, window: Tensor) -> Any:
    return model.base_model(window[None], use_cache=False)


def _log_probabilities(model: Any, hidden: Any, span: slice) -> Tensor:
    """Of a span of positions, by the model itself: some scale or cap their logits, each in a way of its own."""
    part = type(hidden)(last_hidden_state=hidden.last_hidden_state[:, span])
    with mock.patch.object(model.base_model, "forward", lambda *_, **__: part):
        logits = model(
            input_ids=torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.int64), use_cache=False
        ).logits
    return logits[0].float().log_softmax(-1)
