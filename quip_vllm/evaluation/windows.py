# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL divergence over windows of a text.

The text is tokenized whole, with nothing added but a start token where it is asked for, and cut into windows without
overlap. Each window predicts its tokens from the second on.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from quip_vllm.checkpoint.hub import token_ids, token_rows

CHUNK = 256  # positions whose full-vocabulary distributions are held at once
PERCENTILES = {"kl_median": 50, "kl_p90": 90, "kl_p99": 99, "kl_p99.9": 99.9}


def windows_of(text_file: str, tokenizer: Any, length: int, count: int | None, start_token: bool = False) -> Tensor:
    """Tokens, int64 [windows, length]; with `start_token` the first of each is the tokenizer's, the others the text's.

    Raises:
        ValueError: the text has fewer windows than one, or than `count`, or the tokenizer has no start token.
    """
    if start_token and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no start token: leave --start-token away")
    if length < 2:
        raise ValueError(f"--sequence-length is {length}: a window predicts from its second token on; give at least 2")
    text = _read(text_file)
    ids = token_ids(tokenizer, text)["input_ids"]
    rows = token_rows(ids, length, tokenizer.bos_token_id if start_token else None)
    if count is not None and count < 1:
        raise ValueError(f"--windows is {count}: give at least 1, or leave it away for all")
    if len(rows) < (count or 1):
        raise ValueError(f"{text_file} has {len(rows)} windows of {length} tokens: {count or 1} are asked for")
    return rows[:count]


def documents_of(text_file: str, tokenizer: Any, start: str, windows: Tensor, start_token: bool = False) -> Tensor:
    """The number of the document in which each token of `windows` begins, int64 [windows, length].

    Args:
        text_file: that of `windows_of`.
        tokenizer: that of `windows_of`.
        start: a regular expression for how the lines begin with which documents begin.
        windows: what `windows_of` gave.
        start_token: that of `windows_of`; a start token belongs to the document 0.

    Raises:
        ValueError: the expression is none or matches nothing, or the tokenizer cannot tell where its tokens begin.
    """
    text = _read(text_file)
    try:
        starts = [match.start() for match in re.finditer(f"^(?:{start})", text, re.MULTILINE)]
        offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    except re.error as error:
        raise ValueError(f"--document-start {start!r} is not a regular expression ({error}): mend it") from None
    except NotImplementedError:
        raise ValueError("the tokenizer does not say where tokens begin: leave --document-start away") from None
    if not starts:
        raise ValueError(f"--document-start {start!r} matches nothing in {text_file}: mend it, or leave it away")
    count, step = len(windows), windows.shape[1] - start_token
    begins = torch.tensor([begin for begin, _ in offsets["offset_mapping"][: count * step]])
    rows = torch.bucketize(begins, torch.tensor(starts), right=True).view(count, step)
    return functional.pad(rows, (int(start_token), 0))


def _read(text_file: str) -> str:
    try:
        return Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text {text_file} cannot be read ({error}): give a UTF-8 file") from None


@torch.inference_mode()
def score(
    models: Sequence[Any], windows: Tensor, reference: Any | None = None, documents: Tensor | None = None
) -> list[dict[str, float | None]]:
    """Perplexity of each model, and with a reference KL(reference || model) in nats and top-1 agreement.

    The reference runs once for all models. Distributions over the vocabulary are held for CHUNK positions.

    Args:
        models: causal LMs over one vocabulary.
        reference: another, to compare with.
        windows: int64 [windows, length].
        documents: int64 [windows, length], a number for all tokens that are not independent of one another; without
            it those are the tokens of a window.

    Returns:
        For each model ``perplexity`` and ``perplexity_error`` and, with a reference, ``reference_perplexity``,
        ``kl_divergence``, ``kl_error``, PERCENTILES of the divergence at single tokens, and ``top1_agreement``. An
        error is a standard error; it is None where there is but one window or document.
    """
    nll, divergence, agreement = (defaultdict[int, list[Tensor]](list) for _ in range(3))
    reference_nll: list[Tensor] = []
    for window in tqdm(windows.to(models[0].device), desc="windows", unit="window"):
        hidden = [_hidden(model, window) for model in models]
        other = _hidden(reference, window) if reference is not None else None
        for start in range(0, len(window) - 1, CHUNK):
            targets = window[start + 1 : start + 1 + CHUNK, None]
            span = slice(start, start + len(targets))
            if other is not None:
                log_p = _log_probabilities(reference, other, span)
                reference_nll.append(-log_p.gather(1, targets)[:, 0])
                p, best = log_p.exp(), log_p.argmax(1)
            for i, model in enumerate(models):
                log_q = _log_probabilities(model, hidden[i], span)
                nll[i].append(-log_q.gather(1, targets)[:, 0])
                if other is not None:
                    agreement[i].append(best == log_q.argmax(1))
                    divergence[i].append(log_q.sub_(log_p).mul_(p).sum(1).neg_())
    if documents is None:
        documents = torch.arange(len(windows))[:, None].expand_as(windows)
    clusters = documents[:, 1:].flatten().unique(return_inverse=True)[1]
    figures: list[dict[str, float | None]] = []
    for i in range(len(models)):
        loss, error = _mean(nll[i], clusters)
        row = {"perplexity": math.exp(loss), "perplexity_error": error and math.exp(loss) * error}
        if reference is not None:
            row["reference_perplexity"] = math.exp(_mean(reference_nll, clusters)[0])
            row["kl_divergence"], row["kl_error"] = _mean(divergence[i], clusters)
            values = numpy.percentile(torch.cat(divergence[i]).cpu().numpy(), list(PERCENTILES.values()))
            row |= dict(zip(PERCENTILES, values.tolist(), strict=True))
            row["top1_agreement"] = _mean(agreement[i], clusters)[0]
        figures.append(row)
    return figures


def _mean(parts: list[Tensor], clusters: Tensor) -> tuple[float, float | None]:
    """The mean of all values and its standard error, with the values of a cluster as one draw.

    Raises:
        ValueError: a value is not finite.
    """
    values = torch.cat(parts).double().cpu()
    mean = values.mean()
    if not torch.isfinite(mean):
        raise ValueError("a model's logits hold a NaN or an infinity on this text: its weights are damaged")
    count = int(clusters.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, clusters, values - mean)
    error = float((sums.square().sum() * count / (count - 1)).sqrt()) / len(values) if count > 1 else None
    return float(mean), error


def _hidden(model: Any, window: Tensor) -> Any:
    return model.base_model(window[None], use_cache=False)


def _log_probabilities(model: Any, hidden: Any, span: slice) -> Tensor:
    """Of a span of positions, by the model itself: some scale or cap their logits, each in a way of its own."""
    part = type(hidden)(last_hidden_state=hidden.last_hidden_state[:, span])
    with mock.patch.object(model.base_model, "forward", lambda *_, **__: part):
        logits = model(
            input_ids=torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.int64, device=model.device),
            use_cache=False,
        ).logits
    return logits[0].float().log_softmax(-1)
