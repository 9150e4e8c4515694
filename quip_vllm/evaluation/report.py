# SPDX-License-Identifier: Apache-2.0
"""``quip-vllm evaluate``: the figures of models on texts, as stable JSON objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quip_vllm import __version__
from quip_vllm.checkpoint.config import positions
from quip_vllm.checkpoint.hub import check_token, load_config, load_tokenizer, local_folder, tokenizer_of
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.evaluation.loading import is_quantized, load_model
from quip_vllm.evaluation.windows import PERCENTILES, documents_of, score, windows_of

FIGURES = ["perplexity", "perplexity_error", "kl_divergence", "kl_error", *PERCENTILES, "top1_agreement"]
FIGURES += ["reference_perplexity"]


def evaluate(
    models: Sequence[str],
    texts: Sequence[str],
    reference: str | None = None,
    sequence_length: int = 2048,
    windows: int | None = None,
    start_token: bool = False,
    document_start: str | None = None,
    noise_floor: bool = False,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measures models on texts: what the keys mean is in docs/evaluation.md.

    Args:
        models: folders or hub names; all have one tokenizer, which is the first one's.
        texts: UTF-8 files.
        reference: folder or hub name of the original model.
        sequence_length: tokens in a window.
        windows: how many of them, of each text; None for all.
        start_token: whether each window begins with the tokenizer's start token.
        document_start: see `documents_of`; None for texts without documents.
        noise_floor: whether the reference in bf16 is measured like one more model.
        trust_remote_code: whether Python code among the models' files may run.
        device: torch's name of where they run.

    Returns:
        ``results``, for each text and model ``model``, ``text``, ``dtype``, ``windows``; FIGURES, None where there is
        nothing to take them from; ``bits_per_weight`` of the quantized layers, ``bytes`` of all tensors and
        ``file_bytes`` of the files that hold them; then what was run.

    Raises:
        ValueError: bad input.
    """
    if noise_floor and reference is None:
        raise ValueError("--noise-floor compares the original model with itself: name it with --reference")
    folders = {name: local_folder(name, trust_remote_code) for name in (*models, reference) if name}
    for name, folder in folders.items():
        limit = positions(load_config(folder, trust_remote_code))
        if limit is not None and sequence_length > limit:
            raise ValueError(
                f"--sequence-length is {sequence_length}, but {name} has {limit} positions: give {limit} or less"
            )
    folder = folders[models[0]]
    published = "quip_params" in read_json(folder / "config.json")  # those have no tokenizer of their own
    tokenizer = load_tokenizer(tokenizer_of(folder) if published else folder, trust_remote_code)
    cut = [windows_of(text, tokenizer, sequence_length, windows, start_token) for text in texts]
    documents = [
        None if document_start is None else documents_of(text, tokenizer, document_start, tokens, start_token)
        for text, tokens in zip(texts, cut, strict=True)
    ]
    measured = [(name, torch.float32) for name in models]
    if reference is not None and noise_floor:
        measured.append((reference, torch.bfloat16))
    loaded = [load_model(str(folders[name]), trust_remote_code, dtype, device) for name, dtype in measured]
    other = load_model(str(folders[reference]), trust_remote_code, device=device) if reference else None
    first = loaded[0] if other is None else other
    for (name, _), model in zip(measured, loaded, strict=True):
        if model.config.vocab_size != first.config.vocab_size:
            raise ValueError(
                f"{reference or models[0]} has {first.config.vocab_size} tokens and {name} {model.config.vocab_size}: "
                "models can be compared over one vocabulary; give the model that was quantized"
            )
    for tokens in cut:
        check_token(folder, int(tokens.max()), first.config.get_text_config().vocab_size)
    sizes = [_size(folders[name], model) for (name, _), model in zip(measured, loaded, strict=True)]
    results = [
        {"model": name, "text": text, "dtype": str(dtype).removeprefix("torch."), "windows": len(tokens)}
        | dict.fromkeys(FIGURES)
        | figures
        | size
        for text, tokens, starts in zip(texts, cut, documents, strict=True)
        for (name, dtype), size, figures in zip(measured, sizes, score(loaded, tokens, other, starts), strict=True)
    ]
    return {
        "results": results,
        "reference": reference,
        "sequence_length": sequence_length,
        "start_token": start_token,
        "document_start": document_start,
        "quip_vllm": __version__,
    }


def _size(folder: Path, loaded: Any) -> dict[str, Any]:
    reader = CheckpointReader(folder)
    total = sum(reader.bytes_of.values())
    if is_quantized(folder):
        bits = inspect(folder)["totals"]["bits_per_weight"]
    else:
        bits = round(8 * total / sum(parameter.numel() for parameter in loaded.parameters()), 4)
    files = sum(file.stat().st_size for file in set(reader.file_of.values()))
    return {"bits_per_weight": bits, "bytes": total, "file_bytes": files}


def format_report(results: Sequence[dict[str, Any]]) -> str:
    """A table for a person."""
    lines = [["model", "text", "perplexity", "+-", "reference", "KL", "+-", "median", "p90", "p99", "p99.9", "top-1"]]
    lines[0] += ["bits", "bytes"]
    order = ["perplexity", "perplexity_error", "reference_perplexity", "kl_divergence", "kl_error", *PERCENTILES]
    for row in results:
        name = row["model"] + (" in bf16" if row["dtype"] == "bfloat16" else "")
        figures = ["-" if row[key] is None else f"{row[key]:.4f}" for key in order]
        same = "-" if row["top1_agreement"] is None else f"{100 * row['top1_agreement']:.2f} %"
        lines.append([name, row["text"], *figures, same, f"{row['bits_per_weight']:.3f}", f"{row['file_bytes']:,}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
