# SPDX-License-Identifier: Apache-2.0
"""EXL3 checkpoints (docs/imports.md): what config.json and the files' headers say, and a layer's tensors as ours.

Every shape is checked, against the others and against the model's sizes in config.json, before any tensor is read.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.published import (
    DAMAGED,
    HEAD,
    Published,
    dense_modules,
    leaves_of,
    natural,
    sizes_of,
    text_of,
)
from quip_vllm.checkpoint.store import Header
from quip_vllm.formats.exl3 import BLOCK, CODE_MARKS, SU_BITS, SUH, SV_BITS, SVH, TRELLIS, packed, signs
from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.tensors import SU, SV
from quip_vllm.formats.trellis_codes import MUL1, MUL1_HALF, PACKED

METHOD = "exl3"
"""`quant_method` in config.json."""

_CODES = ("3inst", *CODE_MARKS)
_SIDES = {SUH: SU.name, SU_BITS: SU.name, SVH: SV.name, SV_BITS: SV.name}
_VECTORS = {SUH: torch.float16, SU_BITS: torch.int16, SVH: torch.float16, SV_BITS: torch.int16}
EMBEDDING_IS_HEAD = ("gemma2", "cohere", "cohere2")
"""Models that tie the output head to the embedding, and whose vLLM code multiplies with that alone."""

LEAVES = (TRELLIS, *_VECTORS, *CODE_MARKS)
_SLICE = re.compile(r"\.slice\.\d+$")


@dataclass(frozen=True)
class Exl3Config(Published):
    """What an EXL3 checkpoint says of its layers; made by `read`.

    Attributes:
        raw: ``quantization_config`` of config.json.
        dense: modules that have an ordinary weight.
        unused: the quantized output head of a model of EMBEDDING_IS_HEAD.
    """

    raw: Mapping[str, Any] = field(default_factory=dict)
    dense: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()  # type: ignore[misc]  # of every config, and here of each

    @property
    def method(self) -> str:
        """exl3."""
        return METHOD

    def leaves(self, spec: LinearSpec) -> Iterable[str]:
        """See CheckpointConfig."""
        return LEAVES

    def tensors(self, name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See CheckpointConfig."""
        return dict(tensors(stored))

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return dict(self.raw)

    def renamed(self, rename: Callable[[str], str]) -> "Exl3Config":
        """The same with vLLM's module names."""
        return replace(
            self,
            layers={rename(name): stored for name, stored in self.layers.items()},
            shapes={rename(name): shape for name, shape in self.shapes.items()},
            dense=frozenset(map(rename, self.dense)),
        )


def read(model: Mapping[str, Any], headers: Mapping[str, Header]) -> Exl3Config:
    """Checks an EXL3 checkpoint's headers.

    Args:
        model: config.json.
        headers: of every tensor, by name.

    Raises:
        ValueError: something is damaged, contradicts config.json, or is not read here; it says which.
    """
    raw = model.get("quantization_config")
    if not isinstance(raw, Mapping) or raw.get("quant_method") != METHOD:
        raise ValueError(f"quantization_config is {raw!r:.200}: quant_method has to be {METHOD}")
    stated = raw.get("codebook")
    if stated is not None and stated not in _CODES:
        raise ValueError(f"codebook is {stated!r:.100}: EXL3's codes {', '.join(_CODES)} are read; upgrade quip_vllm")
    sizes = sizes_of(model)
    owned = leaves_of(headers)
    leaves = {name: own - {"bias"} for name, own in owned.items() if own & {TRELLIS, SUH, SVH}}
    for name in leaves:
        if is_slice(name) and re.search(r"\.experts\.\d+\.", name):
            raise ValueError(f"{name} is a slice of an expert, which is not read: take a checkpoint with whole experts")
    if not leaves:
        raise ValueError(f"no tensor is named trellis, but quant_method is {METHOD}: {DAMAGED}")
    specs = {name: _spec(name, leaves[name], headers, sizes) for name in sorted(leaves, key=natural)}
    specs |= _slices(specs, sizes)
    for name, spec in specs.items():
        first = stated or next(iter(specs.values())).code
        if _family(spec.code) != _family(first):
            raise ValueError(f"{name} has code {spec.code}, where the checkpoint has {first}: {DAMAGED}")
    text = text_of(model)
    tied = text.get("tie_word_embeddings", model.get("tie_word_embeddings", True))
    leave = tied and text.get("model_type") in EMBEDDING_IS_HEAD
    unused = frozenset(name for name in specs if leave and name.rpartition(".")[2] == HEAD)
    specs = {name: spec for name, spec in specs.items() if name not in unused}
    layers = {name: stored_format(spec.code, spec.bits) for name, spec in specs.items()}
    stored = {name: (spec.stored_outputs, spec.stored_in) for name, spec in specs.items()}
    shaped = {
        name: spec
        for name, spec in specs.items()
        if is_slice(name) or stored[name] != (spec.output_sizes, spec.in_features)
    }
    return Exl3Config(
        default=Counter(layers.values()).most_common(1)[0][0],
        hadamard_block=BLOCK,
        modules_to_not_convert=dense_modules(headers),
        layers=layers,
        shapes={name: (spec.out_features, spec.in_features) for name, spec in shaped.items()},
        raw=raw,
        specs=specs,
        dense=frozenset(name for name, own in owned.items() if "weight" in own),
        unused=unused,
    )


def stored_format(code: str, bits: int) -> LayerFormat:
    """How EXL3 stores a layer."""
    return LayerFormat(code, bits, TileOrder.MMA_SWAPPED, padded_to=BLOCK)


def tensors(stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor of ours for each of a layer's tensors, named as on disk; marks of codes are left out.

    Raises:
        ValueError: a mark has another value than its code's multiplier.
    """
    for leaf, one in stored.items():
        if leaf in CODE_MARKS and (multiplier := int(one) & 0xFFFFFFFF) != CODE_MARKS[leaf]:
            raise ValueError(
                f"the multiplier of {leaf} is {multiplier:#x}, where EXL3's is {CODE_MARKS[leaf]:#x}: take a "
                "checkpoint that exllamav3 has written since October 2025"
            )
        if leaf == TRELLIS:
            yield PACKED, packed(one)
        elif leaf in _VECTORS:
            yield _SIDES[leaf], signs(one) if leaf in (SU_BITS, SV_BITS) else one


def _family(code: str) -> str:
    """The name that config.json has for a code."""
    return MUL1.name if code == MUL1_HALF.name else code


def slices(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> the modules that are slices of it, in order; layers that are not cut are left out."""
    found: dict[str, list[str]] = {}
    for name in sorted(filter(is_slice, names), key=natural):
        found.setdefault(_SLICE.sub("", name), []).append(name)
    return found


def is_slice(name: str) -> bool:
    """Whether a module of the files is a slice of a layer."""
    return _SLICE.search(name) is not None


def cuts_inputs(layer: str) -> bool:
    """Whether slices of a layer have its inputs, and their products are summed, or its outputs."""
    return layer.rpartition(".")[2] == "down_proj"


def joined(layer: str, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """[n, k] of a layer, of those of its slices."""
    n, k = zip(*shapes, strict=True)
    return (max(n), sum(k)) if cuts_inputs(layer) else (sum(n), max(k))


def _spec(
    name: str, leaves: set[str], headers: Mapping[str, Header], sizes: Mapping[str, tuple[int, int]]
) -> LinearSpec:
    """One layer. Raises ValueError unless its tensors are those of a layer, of the sizes that the model has."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"{name} {what}: {DAMAGED}")

    marks = leaves & set(CODE_MARKS)
    inputs, outputs = leaves & {SUH, SU_BITS}, leaves & {SVH, SV_BITS}
    if TRELLIS not in leaves or len(inputs) != 1 or len(outputs) != 1 or len(marks) > 1 or leaves - set(LEAVES):
        raise refuse(
            f"has tensors {', '.join(sorted(leaves)):.200}, where trellis, suh or su, svh or sv, and at most one of "
            "mcg and mul1 are wanted"
        )
    for mark in marks:
        if math.prod(headers[f"{name}.{mark}"].shape) != 1:
            raise refuse(f"has {mark} {headers[f'{name}.{mark}'].shape}, where one number is wanted")
    trellis = headers[f"{name}.{TRELLIS}"]
    code = next(iter(marks), _CODES[0])
    words = trellis.shape[-1] if len(trellis.shape) == 3 else 0
    bits, rest = divmod(words, 16)
    if rest == 8 and code == MUL1.name and bits + 1 in MUL1_HALF.bits:
        code, bits, rest = MUL1_HALF.name, bits + 1, 0
    if trellis.dtype is not torch.int16 or rest or not 1 <= bits <= 8:
        raise refuse(
            f"has a trellis {trellis.dtype} {trellis.shape}, where int16 [k/16, n/16, 16 K] is wanted with K = 1 to 8, "
            "and of mul1 1.5, 2.5 or 3.5 as well"
        )
    k, n = 16 * trellis.shape[0], 16 * trellis.shape[1]
    if k % BLOCK or n % BLOCK or not k or not n:
        raise refuse(f"has a trellis of {k} inputs and {n} outputs, which have to be multiples of {BLOCK}")
    for leaf, size in ((next(iter(inputs)), k), (next(iter(outputs)), n)):
        found, dtype = headers[f"{name}.{leaf}"], _VECTORS[leaf]
        wanted = (size,) if dtype is torch.float16 else (size // 16,)
        if found != Header(wanted, dtype):
            raise refuse(f"has {leaf} {found.dtype} {found.shape} in place of {dtype} {wanted}")
    leaf = name.rpartition(".")[2]
    served_in, served_out = sizes.get(leaf, (k, n))
    if (served_in + -served_in % BLOCK, served_out + -served_out % BLOCK) != (k, n):
        raise refuse(
            f"is stored with {k} inputs and {n} outputs, but config.json gives it {served_in} and {served_out}"
        )
    bias = headers.get(f"{name}.bias")
    if bias is not None and (is_slice(name) or bias.shape not in ((served_out,), (n,))):
        instead = "which a slice has not" if is_slice(name) else f"in place of {(served_out,)}"
        raise refuse(f"has a bias {bias.shape}, {instead}")
    return stored_format(code, bits).spec(served_in, (served_out,), BLOCK)


def _slices(specs: Mapping[str, LinearSpec], sizes: Mapping[str, tuple[int, int]]) -> dict[str, LinearSpec]:
    """The slices of layers without their padding. Raises ValueError unless they make up the whole layer."""
    found = {}
    for layer, names in slices(specs).items():
        own, inner = [specs[name] for name in names], cuts_inputs(layer)
        across = {one.out_features if inner else one.in_features for one in own}
        along = [one.in_features if inner else one.out_features for one in own]
        k, n = sizes.get(layer.rpartition(".")[2], (0, 0))
        cut, other = (k, n) if inner else (n, k)
        cut, other = cut or sum(along), other or max(across)
        unused = sum(along) - cut
        numbers = [int(name.rpartition(".")[2]) for name in names]
        if numbers != list(range(len(own))) or across != {other + -other % BLOCK} or not 0 <= unused < BLOCK:
            raise ValueError(
                f"{layer} is stored in slices {numbers} of {along} {'inputs' if inner else 'outputs'}, which do not "
                f"make up {cut} by {other}: {DAMAGED}"
            )
        along[-1] -= unused
        for name, one, size in zip(names, own, along, strict=True):
            pair = (size, other) if inner else (other, size)
            found[name] = replace(one, in_features=pair[0], output_sizes=(pair[1],))
    return found
