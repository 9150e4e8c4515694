# SPDX-License-Identifier: Apache-2.0
"""``quip-vllm evaluate``: the figures of one model, as a stable JSON object."""

from pathlib import Path
from typing import Any

from quip_vllm import __version__
from quip_vllm.checkpoint.config import positions
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import CheckpointReader, local_folder
from quip_vllm.evaluation.loading import is_quantized, load_config, load_model, load_tokenizer
from quip_vllm.evaluation.windows import score, windows_of


def evaluate(
    model: str,
    text: str,
    reference: str | None = None,
    sequence_length: int = 2048,
    windows: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measures a model on a text: what the keys mean is in docs/evaluation.md.

    Args:
        model: folder or hub name.
        text: a UTF-8 file.
        reference: folder or hub name of the original model.
        sequence_length: tokens in a window.
        windows: how many of them; None for all.
        trust_remote_code: whether Python code among the models' files may run.

    Returns:
        ``perplexity``; ``kl_divergence`` (nats) and ``top1_agreement`` (0..1), None without a reference;
        ``bits_per_weight`` of the quantized layers; ``bytes`` of all tensors; then what was run.

    Raises:
        ValueError: bad input.
    """
    folders = {name: local_folder(name, trust_remote_code) for name in (model, reference) if name}
    for name, folder in folders.items():
        limit = positions(load_config(folder, trust_remote_code))
        if limit is not None and sequence_length > limit:
            raise ValueError(
                f"--sequence-length is {sequence_length}, but {name} has {limit} positions: give {limit} or less"
            )
    tokens = windows_of(text, load_tokenizer(folders[model], trust_remote_code), sequence_length, windows)
    loaded = load_model(str(folders[model]), trust_remote_code)
    other = load_model(str(folders[reference]), trust_remote_code) if reference else None
    if other is not None and other.config.vocab_size != loaded.config.vocab_size:
        raise ValueError(
            f"the reference has {other.config.vocab_size} tokens and the model {loaded.config.vocab_size}: "
            "a divergence needs one vocabulary; give the model that was quantized"
        )
    figures = score([loaded], tokens, other)[0]
    size = _size(folders[model], loaded)
    return {
        "perplexity": figures["perplexity"],
        "kl_divergence": figures.get("kl_divergence"),
        "top1_agreement": figures.get("top1_agreement"),
        "bits_per_weight": size["bits_per_weight"],
        "bytes": size["bytes"],
        "reference_perplexity": figures.get("reference_perplexity"),
        "model": model,
        "reference": reference,
        "text": text,
        "windows": tokens.shape[0],
        "sequence_length": tokens.shape[1],
        "quip_vllm": __version__,
    }


def _size(folder: Path, loaded: Any) -> dict[str, Any]:
    if is_quantized(folder):
        return inspect(folder)["totals"]
    count = sum(parameter.numel() for parameter in loaded.parameters())
    total = sum(CheckpointReader(folder).bytes_of.values())
    return {"bits_per_weight": round(8 * total / count, 4), "bytes": total}


def format_report(figures: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [f"perplexity        {figures['perplexity']:.4f}"]
    if figures["kl_divergence"] is not None:
        lines += [
            f"reference         {figures['reference_perplexity']:.4f}",
            f"KL divergence     {figures['kl_divergence']:.4f} nats",
            f"top-1 agreement   {100 * figures['top1_agreement']:.2f} %",
        ]
    lines += [
        f"bits per weight   {figures['bits_per_weight']:.3f}",
        f"bytes             {figures['bytes']:,}",
    ]
    return "\n".join(lines)
