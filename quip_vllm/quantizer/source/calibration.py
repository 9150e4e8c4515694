# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: from the bundled text, from a text file, from a data set, or written by the model itself."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.hub import brief, check_token, load_tokenizer, token_ids, token_rows
from quip_vllm.quantizer.settings import BUNDLE, SELF, Settings
from quip_vllm.quantizer.source.documents import bundled_documents, document_ids
from quip_vllm.quantizer.source.self_text import self_written

MINIMUM_TOKENS = 4096
"""A text that has fewer, and fewer than are asked for, is refused: they say too little of layers of usual widths."""

_LOG = logging.getLogger(__name__)


def calibration_tokens(settings: Settings, folder: Path, vocabulary: int) -> Tensor:
    """int64 [sequences, sequence_length]; fewer sequences, which a warning says, where a text has no more.

    Each of several sources has an equal share of the sequences, the first ones one more where they do not divide.

    Args:
        settings: sources, sequences, sequence_length and seed.
        folder: the model's.
        vocabulary: the model knows the tokens below it.

    Raises:
        ValueError: a text is too short, its source cannot be read, or its tokens are not the model's.
    """
    count, more = divmod(settings.sequences, len(settings.sources))
    parts: dict[int, Tensor] = {}
    for index, source in sorted(enumerate(settings.sources), key=lambda one: one[1] == SELF):  # what takes long is last
        own = replace(settings, calibration=source, sequences=count + (index < more))
        parts[index] = (self_written if source == SELF else _read)(own, folder, vocabulary)
    return torch.cat([parts[index] for index in sorted(parts)])


def _read(settings: Settings, folder: Path, vocabulary: int) -> Tensor:
    """The sequences of one source that is a text."""
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    source, length, wanted = settings.calibration, settings.sequence_length, settings.sequences
    generator = torch.Generator().manual_seed(settings.seed)
    if source == BUNDLE:
        rows, total = _bundle_rows(tokenizer, length, wanted, generator)
    else:
        text = _hub_text(source) if source.startswith("hub:") else _file_text(source)
        ids = token_ids(tokenizer, text)["input_ids"]
        rows, total = token_rows(ids, length, tokenizer.bos_token_id if length > 1 else None), len(ids)
        rows = rows[torch.randperm(len(rows), generator=generator)]
    if len(rows) < wanted:
        if rows.numel() < MINIMUM_TOKENS:
            raise ValueError(
                f"{source} has {total} tokens, hence {len(rows)} sequences of {length}: give a text "
                f"that makes at least {MINIMUM_TOKENS} tokens of them, or smaller --sequences or --sequence-length"
            )
        _LOG.warning("%s has %d sequences of %d tokens, not %d: all are used", source, len(rows), length, wanted)
    check_token(folder, int(rows.max()), vocabulary)
    return rows[:wanted].clone()


def _bundle_rows(tokenizer: Any, length: int, wanted: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """At most `wanted` sequences, int64 [sequences, length], and the tokens of all documents that were read for them.

    Each sequence begins with a document, and takes more of them until it is full; the last one's rest is left out.
    """
    documents = bundled_documents()
    rows: list[list[int]] = []
    row: list[int] = []
    total = 0
    for index in torch.randperm(len(documents), generator=generator).tolist():
        if len(rows) == wanted:
            break
        ids = document_ids(tokenizer, documents[index])
        total += len(ids)
        row += ids
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows, dtype=torch.int64).view(-1, length), total


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"calibration file {path} cannot be read ({brief(error)}): give a UTF-8 text, hub:DATASET, bundle or self"
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
