# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: from a text file, from a data set, or written by the model itself."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from quip_vllm.quantizer.settings import SELF, Settings
from quip_vllm.quantizer.source.architecture import brief, check_token, load_tokenizer
from quip_vllm.quantizer.source.self_text import self_written

MINIMUM_TOKENS = 4096
"""A text that has fewer, and fewer than are asked for, is refused: they say too little of layers of usual widths."""

_LOG = logging.getLogger(__name__)


def calibration_tokens(settings: Settings, folder: Path, vocabulary: int) -> Tensor:
    """int64 [sequences, sequence_length]; fewer sequences, which a warning says, where the text has no more.

    Args:
        settings: source, sequences, sequence_length and seed.
        folder: the model's.
        vocabulary: the model knows the tokens below it.

    Raises:
        ValueError: the text is too short, its source cannot be read, or its tokens are not the model's.
    """
    if settings.calibration == SELF:
        return self_written(settings, folder, vocabulary)
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    text = (
        _hub_text(settings.calibration) if settings.calibration.startswith("hub:") else _file_text(settings.calibration)
    )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    length, wanted = settings.sequence_length, settings.sequences
    available = len(ids) // length
    if available < wanted:
        if available * length < MINIMUM_TOKENS:
            raise ValueError(
                f"{settings.calibration} has {len(ids)} tokens, hence {available} sequences of {length}: give a text "
                f"that makes at least {MINIMUM_TOKENS} tokens of them, or smaller --sequences or --sequence-length"
            )
        _LOG.warning(
            "%s has %d sequences of %d tokens, not %d: all are used", settings.calibration, available, length, wanted
        )
    check_token(folder, int(ids.max()), vocabulary)
    windows = ids[: available * length].view(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(settings.seed))
    return windows[order[:wanted]].clone()


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"calibration file {path} cannot be read ({brief(error)}): give a UTF-8 text, hub:DATASET or self"
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
        raise ValueError(
            f"data set {source} cannot be read ({brief(error)}): check its name, split and column"
        ) from None
