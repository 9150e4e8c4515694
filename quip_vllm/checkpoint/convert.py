# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other programs written as ours: bits are permuted, nothing is rounded again (docs/imports.md)."""

import hashlib
import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm import __version__
from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.hub import SIDE_FILES, TOKENIZER, copy_files, tokenizer_folder, tokenizer_of, travelling
from quip_vllm.checkpoint.layers import layer_specs, others_of, read_config, read_layer, stored_names
from quip_vllm.checkpoint.published import HEAD, Published, natural
from quip_vllm.checkpoint.shards import check_room, plan_shards, shard_name, write_index, write_shard
from quip_vllm.checkpoint.store import CheckpointReader, read_json, write_json
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import Follows, check, tensor_specs

SHARD_BYTES = 1_000_000_000
"""Of the source that become one shard: that much is in memory."""
STATE = ".convert.json"
_LOG = logging.getLogger(__name__)
TILES = 3
"""Layers of which a tile is compared at the end."""


def convert(source: Path, out: Path, tokenizer: str | None = None, resume: bool = False) -> dict[str, int]:
    """Writes a checkpoint of ours with the weights of another program's.

    Args:
        source: its folder.
        out: the new folder.
        tokenizer: folder or hub name of its tokenizer; None for that of the source, or of the local folder that the
            source's config.json names as its origin.
        resume: whether to go on with what an earlier call has left in `out`.

    Returns:
        ``layers`` and ``shards``, how many were written.

    Raises:
        ValueError: the source is no such checkpoint, is damaged, or holds what is not read here; or `out` is not what
            the arguments say.
    """
    config, reader = read_config(source), CheckpointReader(source)
    if not isinstance(config, Published):
        raise ValueError(f"{source} is a checkpoint of quip_vllm already: there is nothing to convert")
    if any(spec.tile_order not in spec.format.kernel_orders for spec in config.specs.values()):
        _LOG.warning("HYB at 1 bit runs on CPUs, with activations in floats, and on GPUs with Triton alone")
    tokens = tokenizer_of(source) if tokenizer is None else tokenizer_folder(tokenizer)
    travelling(source, out, SIDE_FILES)  # refuses links
    travelling(tokens, out, TOKENIZER, below=False)
    _open(out, _identity(source, reader, config), resume)
    specs = layer_specs(reader, config)
    sizes = {
        name: sum(reader.bytes_of[one] for one in stored_names(reader, config, name, specs[name])) for name in specs
    }
    sizes |= {name: reader.bytes_of[name] for name in others_of(reader, config, specs)}
    check_room(out, sum(sizes.values()), "give --resume")
    shards = plan_shards(dict(sorted(sizes.items(), key=lambda item: natural(item[0]))), SHARD_BYTES)
    for i, names in enumerate(tqdm(shards, desc="convert", unit="shard")):
        file = out / shard_name(i, len(shards))
        if not file.exists():
            write_shard(file, {full: one for name in names for full, one in _unit(reader, config, specs, name).items()})
    write_index(out, len(shards))
    _finish(source, out, config, tokens)
    return {"layers": len(specs), "shards": len(shards)}


def _unit(reader: CheckpointReader, config: Published, specs: dict[str, LinearSpec], name: str) -> dict[str, Tensor]:
    """The tensors that a layer becomes, or one tensor that is no layer's."""
    if name not in specs:
        tensor = reader.read([name])[name]
        layer, _, leaf = name.rpartition(".")
        return {name: tensor[: specs[layer].out_features] if leaf == "bias" and layer in specs else tensor}
    tensors = read_layer(reader, config, name, specs[name])
    try:
        check(specs[name], tensors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {f"{name}.{leaf}": one for leaf, one in tensors.items()}


def _identity(source: Path, reader: CheckpointReader, config: Published) -> dict[str, Any]:
    """What has to be the same when a conversion goes on."""
    files = {file: file.stat() for file in set(reader.file_of.values())}
    found = sorted((file.name, one.st_size, one.st_mtime_ns) for file, one in files.items())
    raw = (source / "config.json").read_bytes() + json.dumps(found).encode()
    return {"quip_vllm": __version__, "source": hashlib.sha256(raw).hexdigest()[:32], "shard_bytes": SHARD_BYTES}


def _open(out: Path, wanted: dict[str, Any], resume: bool) -> None:
    """Makes the folder, or finds in it an unfinished conversion of the same source."""
    state = out / STATE
    if (out / "config.json").exists():
        raise ValueError(f"{out} is finished: give a new folder")
    if resume:
        if not state.exists() or read_json(state) != wanted:
            raise ValueError(
                f"{out} holds no unfinished conversion of this source: leave --resume away, or mend the path"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: give a new folder, or --resume to go on with an unfinished conversion")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(state, wanted)
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}): give a new folder on another disk") from None


def _finish(source: Path, out: Path, config: Published, tokens: Path) -> None:
    """Copies what travels with the weights, compares some tiles, and writes config.json last."""
    model: dict[str, Any] = read_json(source / "config.json")
    copy_files(source, out, SIDE_FILES, ("config.json", "quantization_config.json"))
    if tokens != source:
        copy_files(tokens, out, TOKENIZER, below=False)
    origin = {key: model.pop(key) for key in ("quip_params", "quantization_config") if key in model}
    described = config.converted().to_dict()
    if any(name.rpartition(".")[2] == HEAD for name in config.specs):  # of its own, although the model may tie it
        for one in (model, model.get("text_config")):
            if isinstance(one, dict):
                one["tie_word_embeddings"] = False
    snapshot = source.resolve()
    origin |= {"revision": snapshot.name} if snapshot.parent.name == "snapshots" else {}
    origin |= {"name": snapshot.parent.parent.name if "revision" in origin else snapshot.name}
    compare(source, config, out, CheckpointConfig.from_dict(json.loads(json.dumps(described))))
    write_json(out / "config.json", {**model, "quantization_config": {**described, "converted_from": origin}})
    (out / STATE).unlink()


def compare(source: Path, config: CheckpointConfig, out: Path, written: CheckpointConfig) -> None:
    """Raises ValueError unless random tiles of some layers, and their vectors, are the same in both folders."""
    before, after = CheckpointReader(source), CheckpointReader(out)
    specs, found = layer_specs(before, config), layer_specs(after, written)
    draw = random.Random(len(specs))
    for name in draw.sample(sorted(specs), min(TILES, len(specs))):
        spec = specs[name]
        one, other = read_layer(before, config, name, spec), read_layer(after, written, name, found[name])
        row = draw.randrange(-(-spec.stored_outputs[0] // 16))
        same = set(one) == set(other) and spec == replace(found[name], vector_dtype=spec.vector_dtype)
        same = same and torch.equal(_tiles(spec, one, row), _tiles(found[name], other, row))
        if not same or not all(torch.equal(one[vector], other[vector]) for vector in ("su", "sv")):
            raise ValueError(f"{name} is not the same in {out} as in {source}: report this, and do not use {out}")


def _tiles(spec: LinearSpec, tensors: dict[str, Tensor], row: int) -> Tensor:
    """The rotated weight of a row of tiles, float32 [16, stored k]."""
    cut = {
        one.name: tensors[one.name][16 // one.outputs_per_row * row :][: 16 // one.outputs_per_row]
        for one in tensor_specs(spec)
        if one.follows is Follows.BOTH
    }
    return spec.format.decode({**tensors, **cut}, spec.bits, spec.tile_order)
