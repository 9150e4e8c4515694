# SPDX-License-Identifier: Apache-2.0
"""QuIP# checkpoints (docs/imports.md): what config.json and the files' headers say, and a layer's tensors as ours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.published import (
    DAMAGED,
    Published,
    check_layers,
    check_parameters,
    dense_modules,
    leaves_of,
    natural,
    sizes_of,
    vector_of,
)
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.formats.e8p_residual import CODES, RESIDUAL_CODES, RESIDUAL_SCALE
from quip_vllm.formats.relaxml import lattice_codes, residual_bytes
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV

_LEAVES = ("Qidxs", "SU", "SV", "Wscale", "fuse_scales", "scaleWH", "codebook_id")
_WORDS, _SU, _SV, _SCALE, _PART_SCALES, _INPUT_SCALES, _ID = _LEAVES
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
"""The layers of the model that one of the files is, in the order of its rows."""

_CODEBOOKS = {"E8P12": (2, 1, 7), "E8P12RVQ3B": (3, 0, 18), "E8P12RVQ4B": (4, 1, 17)}
"""Name in config.json -> bits, version, and the number in the files."""

_KNOWN = ("codebook", "codebook_version", "resid_scale_override", "rescale_WH")
"""Parameters that are read."""


@dataclass(frozen=True)
class QuipSharpConfig(Published):
    """What a QuIP# checkpoint says of its layers; made by `read`.

    Attributes:
        codebook_id: the number of the codebook in the files.
    """

    codebook_id: int = 0

    def leaves(self, spec: LinearSpec) -> Iterable[str]:
        """See CheckpointConfig."""
        return _LEAVES

    def tensors(self, name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See CheckpointConfig. Every scale is multiplied into a vector in float32."""
        if _ID in stored and int(stored[_ID]) != self.codebook_id:
            raise ValueError(f"{name} has codebook_id {int(stored[_ID])} in place of {self.codebook_id}: {DAMAGED}")
        su, sv, words = stored[_SU].float(), stored[_SV].float(), stored[_WORDS]
        if _INPUT_SCALES in stored:
            su = su / stored[_INPUT_SCALES].float()
        if _SCALE in stored:
            sv = sv * stored[_SCALE].float()
        if _PART_SCALES in stored:
            rows = torch.tensor([rows for _, rows in self.parts[name]])
            sv = sv * stored[_PART_SCALES].float().repeat_interleave(rows)
        first = words[:, : len(su) // 32]
        tensors = {CODES: lattice_codes(first.contiguous()), SU.name: vector_of(su), SV.name: vector_of(sv)}
        if self.default.bits == 3:
            tensors[RESIDUAL_CODES] = residual_bytes(words[:, first.shape[1] :])
        elif self.default.bits == 4:
            tensors[RESIDUAL_CODES] = lattice_codes(words[:, first.shape[1] :].contiguous())
        return tensors


def recognises(model: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a QuIP# checkpoint, one that is not read here included."""
    parameters = model.get("quip_params")
    return isinstance(parameters, Mapping) and parameters.get("codebook") != "bitshift"


def read(model: Mapping[str, Any], reader: CheckpointReader) -> QuipSharpConfig:
    """Checks a QuIP# checkpoint's headers.

    Raises:
        ValueError: something is damaged, contradicts config.json, or is not read here; it says which.
    """
    parameters = model["quip_params"]
    codebook = parameters.get("codebook")
    if not isinstance(codebook, str) or codebook not in _CODEBOOKS:
        raise ValueError(f"codebook is {codebook!r:.100}: QuIP#'s {', '.join(_CODEBOOKS)} are read")
    bits, version, number = _CODEBOOKS[codebook]
    check_parameters(parameters, _KNOWN)
    if parameters.get("codebook_version") != version:
        raise ValueError(
            f"codebook_version is {parameters.get('codebook_version')!r:.100}: of {codebook} version {version} is "
            "read; files of before 2024 have other codes, fetch the newest revision"
        )
    override = parameters.get("resid_scale_override", -1)
    if not isinstance(override, int | float) or override > 0 and override != RESIDUAL_SCALE.get(bits, override):
        raise ValueError(
            f"resid_scale_override is {override!r:.100}: the second stage of {codebook} is read with a scale of "
            f"{RESIDUAL_SCALE.get(bits)} only"
        )
    owned = leaves_of(reader.names())
    names = [name for name, own in owned.items() if own & set(_LEAVES)]
    sizes, scaled = sizes_of(model), bool(parameters.get("rescale_WH"))
    if not names or not sizes:
        raise ValueError(
            f"no tensor is named {_WORDS}: {DAMAGED}"
            if not names
            else f"model_type is {model.get('model_type')!r:.100}: the sizes of its layers are not known here, which "
            "QuIP#'s fused layers need"
        )
    parts: dict[str, tuple[tuple[str, int], ...]] = {}
    specs: dict[str, LinearSpec] = {}
    stored = LayerFormat("e8p", bits)
    for name in sorted(names, key=natural):
        leaf = name.rpartition(".")[2]
        if any(part not in sizes for part in _PARTS.get(leaf, (leaf,))):
            raise ValueError(f"{name} is no layer of the model that config.json describes: {DAMAGED}")
        rows = [sizes[part][1] for part in _PARTS.get(leaf, (leaf,))]
        specs[name] = stored.spec(sizes[_PARTS.get(leaf, (leaf,))[0]][0], (sum(rows),), None)
        if leaf in _PARTS:
            parts[name] = tuple(zip(_PARTS[leaf], rows, strict=True))
        _check(reader, name, owned[name], specs[name], len(parts.get(name, ())), scaled)
    config = QuipSharpConfig(
        stored,
        modules_to_not_convert=dense_modules(reader.headers()),
        layers=dict.fromkeys(specs, stored),
        parts=parts,
        specs=specs,
        codebook_id=number,
    )
    check_layers(model, owned, {part for name in specs for part, _ in config.parts_of(name) or [(name, 0)]})
    return config


def _check(reader: CheckpointReader, name: str, leaves: set[str], spec: LinearSpec, count: int, scaled: bool) -> None:
    """Raises ValueError unless a layer has the tensors of its size."""
    n, k = spec.out_features, spec.in_features
    if n % 16 or k % 64:
        raise ValueError(f"{name} has {n} outputs and {k} inputs: QuIP# stores multiples of 16 and 64; {DAMAGED}")
    wanted: dict[str, tuple[int, ...]] = {_WORDS: (n, k * spec.bits // 64), _SU: (k,), _SV: (n,)}
    if scaled:
        wanted[_INPUT_SCALES] = (k,)
    if count:
        wanted[_PART_SCALES] = (count,)
    if not set(wanted) <= leaves or leaves - set(wanted) - {_SCALE, _ID}:
        raise ValueError(
            f"{name} has tensors {', '.join(sorted(leaves)):.200}, where {', '.join(wanted)} and at most {_SCALE} and "
            f"{_ID} are wanted: {DAMAGED}"
        )
    for leaf in leaves:
        found, dtype = reader.shapes[f"{name}.{leaf}"], reader.dtypes[f"{name}.{leaf}"]
        right = dtype is torch.int64 if leaf in (_WORDS, _ID) else dtype.is_floating_point and dtype.itemsize > 1
        if not right or (found != wanted[leaf] if leaf in wanted else found not in ((), (1,))):
            kind = "int64" if leaf in (_WORDS, _ID) else "a float"
            raise ValueError(f"{name} has {leaf} {dtype} {found} in place of {kind} {wanted.get(leaf, ())}: {DAMAGED}")
