# SPDX-License-Identifier: Apache-2.0
"""The documents of the calibration text that the package carries, and their tokens."""

import json
import lzma
from importlib import resources
from typing import Any

from quip_vllm.checkpoint.hub import brief, token_ids


def bundled_documents() -> list[Any]:
    """The documents of the bundled text: strings, and dialogues as lists of {"role": ..., "content": ...}."""
    packed = resources.files("quip_vllm.quantizer.source").joinpath("bundle", "calibration.jsonl.xz").read_bytes()
    return [json.loads(line) for line in lzma.decompress(packed).decode().splitlines()]


def document_ids(tokenizer: Any, document: Any) -> list[int]:
    """A bundled document's tokens, behind the tokenizer's first token if it has one.

    A dialogue goes through the chat template where there is one, and is written as "User: ..." otherwise; one that ends
    with a question is left open for the answer.

    Raises:
        ValueError: the chat template cannot be applied.
    """
    if isinstance(document, str):
        text = document
    elif tokenizer.chat_template:
        try:
            asks = document[-1]["role"] == "user"
            text = tokenizer.apply_chat_template(document, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # what a template can raise has no end
            raise ValueError(
                f"the model's chat template cannot be applied ({brief(error)}): mend it, or give a text (--calibration)"
            ) from None
    else:
        text = "\n\n".join(f"{message['role'].title()}: {message['content']}" for message in document)
    ids: list[int] = token_ids(tokenizer, text)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return ids if ids[:1] == first else first + ids
