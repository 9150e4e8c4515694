# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: from a text file, from a data set, or written by the model itself."""

from pathlib import Path

import torch
from torch import Tensor

from quip_vllm.quantizer.settings import SELF, Settings
from quip_vllm.quantizer.source.self_text import self_written


def calibration_tokens(settings: Settings, model_path: str) -> Tensor:
    """int64 [sequences, sequence_length].

    Raises:
        ValueError: the text is too short, or its source cannot be read.
    """
    from transformers import AutoTokenizer

    if settings.calibration == SELF:
        return self_written(settings, model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    text = (
        _hub_text(settings.calibration) if settings.calibration.startswith("hub:") else _file_text(settings.calibration)
    )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    length = settings.sequence_length
    available = len(ids) // length
    if available < settings.sequences:
        raise ValueError(
            f"{settings.calibration} has {len(ids)} tokens: {settings.sequences} sequences of {length} need "
            f"{settings.sequences * length}; give a longer text or smaller --sequences or --sequence-length"
        )
    windows = ids[: available * length].view(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(settings.seed))
    return windows[order[: settings.sequences]].clone()


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"calibration file {path} cannot be read ({error}): give a UTF-8 text, hub:DATASET or self"
        ) from None


def _hub_text(source: str) -> str:
    """hub:DATASET[:SPLIT[:COLUMN]]; split train and column text unless named."""
    name, split, column, *rest = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ValueError(f"{source} needs the package datasets: pip install 'quip-vllm[quantize]'") from None
    try:
        rows = load_dataset(name, split=split or "train")
        return "\n\n".join(rows[column or "text"])
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data set {source} cannot be read ({error}): check its name, split and column") from None
