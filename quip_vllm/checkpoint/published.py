# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other programs (docs/imports.md): what their readers share.

A reader checks every header, against the others and against the model's sizes in config.json, before a tensor is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.checkpoint.store import Header
from quip_vllm.formats.spec import LinearSpec

HEAD = "lm_head"
_NEUTRAL = ("codesz", "idx_dtype", "packsz", "train_mode", "fused", "model_version")
"""Keys of ``quip_params`` that say nothing which the tensors do not say."""
DAMAGED = "the files are damaged, or config.json belongs to another checkpoint; fetch it again"

# Models whose layers have the sizes of sizes_of; those of others are what their files say.
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text")

_MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""The same but for the MLPs, of which experts have other sizes than dense layers."""

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LINEAR = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_IN_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.")

_HEAD_WIDTHS = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3": 256, "gemma3_text": 256}
"""What transformers takes for a head_dim that config.json leaves out."""


@dataclass(frozen=True)
class Published(CheckpointConfig):
    """What a checkpoint of another program says of its layers. `layers` names every quantized one.

    Attributes:
        specs: module name on disk -> the layer, in natural order.
    """

    specs: Mapping[str, LinearSpec] = field(default_factory=dict)

    def layer_format(self, name: str) -> LayerFormat | None:
        """See CheckpointConfig."""
        return self.layers.get(name)

    def converted(self) -> CheckpointConfig:
        """What config.json says once the layers are stored as ours."""
        return CheckpointConfig(**{one.name: getattr(self, one.name) for one in fields(CheckpointConfig)})


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    numbers = (part.isascii() and part.isdecimal() and len(part) < 10 for part in name.split("."))
    return [(int(part), "") if is_one else (-1, part) for part, is_one in zip(name.split("."), numbers, strict=True)]


def leaves_of(names: Iterable[str]) -> dict[str, set[str]]:
    """Module -> the last parts of the names of its tensors."""
    found: dict[str, set[str]] = {}
    for full in names:
        name, _, leaf = full.rpartition(".")
        found.setdefault(name, set()).add(leaf)
    return found


def dense_modules(headers: Mapping[str, Header]) -> tuple[str, ...]:
    """The modules that have an ordinary weight of two or more dimensions."""
    dense = (full for full, one in headers.items() if full.endswith(".weight") and len(one.shape) > 1)
    return tuple(sorted((full.removesuffix(".weight") for full in dense), key=natural))


def check_parameters(parameters: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises ValueError for a parameter of ``quip_params`` that is set and neither known nor neutral."""
    for key, value in parameters.items():
        if value and key not in (*known, *_NEUTRAL):
            raise ValueError(f"quip_params has {key} {value!r:.100}, which changes what is stored: it is not read here")


def check_layers(model: Mapping[str, Any], owned: Mapping[str, set[str]], quantized: set[str]) -> None:
    """Checks that no layer of a model that is known here is missing, or is there twice.

    Args:
        model: config.json.
        owned: see `leaves_of`.
        quantized: full names of the layers of the model that are quantized, each alone or as a part.

    Raises:
        ValueError: one is.
    """
    text = text_of(model)
    if text.get("model_type") not in _KNOWN:
        return
    layers = {(found[1], int(found[2])) for name in owned if (found := _IN_LAYER.match(name))}
    groups, count = {group for group, _ in layers}, text.get("num_hidden_layers")
    if len(groups) != 1 or type(count) is not int or {i for _, i in layers} != set(range(min(count, len(layers) + 1))):
        raise ValueError(
            f"config.json has num_hidden_layers {count!r:.100}, but the files hold layers {sorted(layers)!r:.200}: "
            f"{DAMAGED}"
        )
    for name in (f"{group}.{i}.{leaf}" for group, i in sorted(layers) for leaf in _LINEAR):
        dense = "weight" in owned.get(name, ())
        if dense == (name in quantized):
            raise ValueError(f"{name} is in the files {'twice' if dense else 'neither quantized nor dense'}: {DAMAGED}")


def vector_of(tensor: Tensor) -> Tensor:
    """A vector in fp16 where that has its numbers exactly, else in fp32."""
    single, half = tensor.float(), tensor.half()
    return half if bool((half.float() == single).all()) else single


def text_of(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the language model."""
    text = model.get("text_config")
    return text if isinstance(text, Mapping) else model


def sizes_of(model: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers of a model that is known here, by the last part of their names."""
    text = text_of(model)
    if text.get("model_type") not in (*_KNOWN, *_MIXTURES):
        return {}

    def number(key: str, default: int | None = None) -> int:
        value = text.get(key) if text.get(key) is not None else default
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json has {key} {value!r:.100}: it must be a positive integer")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    vocabulary = number("vocab_size")
    width = number("head_dim", _HEAD_WIDTHS.get(text["model_type"], hidden // heads))
    queries, keys = heads * width, number("num_key_value_heads", heads) * width
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        HEAD: (hidden, vocabulary),
    }
    if text["model_type"] in _MIXTURES:
        return sizes
    middle = number("intermediate_size")
    return sizes | {"gate_proj": (hidden, middle), "up_proj": (hidden, middle), "down_proj": (middle, hidden)}
