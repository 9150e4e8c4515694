# SPDX-License-Identifier: Apache-2.0
"""The one way from a checkpoint's folder to its quantized layers: name, LinearSpec, tensors.

Headers are read and checked first, all of them; the tensors follow layer by layer, when they are asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import Tensor

from quip_vllm.checkpoint import exl3, qtip, quip_sharp
from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.published import Published, leaves_of, natural
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.formats.spec import FORMATS, LinearSpec
from quip_vllm.formats.tensors import FLOATS, SU, SV, layout

DAMAGED = "the files are damaged, or config.json belongs to another checkpoint; fetch or quantize it again"


def read_config(folder: Path) -> CheckpointConfig:
    """What config.json says of a quantized checkpoint. Raises ValueError for any other."""
    model = read_json(folder / "config.json")
    raw = model.get("quantization_config")
    if isinstance(raw, dict) and raw.get("quant_method") == exl3.METHOD:
        return exl3.read(model, CheckpointReader(folder).headers())
    if isinstance(raw, dict):
        return CheckpointConfig.from_dict(raw)
    for source in (quip_sharp, qtip):
        if source.recognises(model):
            return source.read(model, CheckpointReader(folder))
    raise ValueError(f"{folder / 'config.json'} has no quantization_config: this is not a quantized checkpoint")


def read_layers(folder: Path) -> Iterator[tuple[str, LinearSpec, dict[str, Tensor]]]:
    """Yields every quantized layer of a folder, in order: its name, what it is, and its tensors without their prefix.

    One layer's tensors are read at a time; a bias is not among them.

    Raises:
        ValueError: as `layer_specs`.
    """
    reader, config = CheckpointReader(folder), read_config(folder)
    for name, spec in layer_specs(reader, config).items():
        yield name, spec, read_layer(reader, config, name, spec)


def layer_specs(reader: CheckpointReader, config: CheckpointConfig) -> dict[str, LinearSpec]:
    """Name -> spec of every quantized layer, in order, from the headers alone.

    Raises:
        ValueError: a layer's tensors are not those of the code and bits that `config` gives it, or `config` names a
            layer that the files do not hold.
    """
    if isinstance(config, Published):
        return dict(config.specs)  # whose readers have checked the biases
    leaves = {name: own - {"bias"} for name, own in leaves_of(reader.names()).items() if own & tensor_names()}
    named = [*config.layers, *config.parts, *(rows.module for rows in config.token_rows)]
    for name in named:
        if name not in leaves:
            raise ValueError(f"{name} is quantized by config.json, but its tensors are not there: {DAMAGED}")
    return {name: _spec(reader, config, name, leaves[name]) for name in sorted(leaves, key=natural)}


def read_layer(reader: CheckpointReader, config: CheckpointConfig, name: str, spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of one layer, named as `formats.tensors.layout` names them."""
    stored = reader.read(stored_names(reader, config, name, spec))
    return config.tensors(name, {full.rpartition(".")[2]: one for full, one in stored.items()})


def stored_names(reader: CheckpointReader, config: CheckpointConfig, name: str, spec: LinearSpec) -> list[str]:
    """The names on disk of a layer's tensors, without its bias."""
    return [f"{name}.{leaf}" for leaf in config.leaves(spec) if f"{name}.{leaf}" in reader]


def others_of(reader: CheckpointReader, config: CheckpointConfig, specs: Mapping[str, LinearSpec]) -> list[str]:
    """The names of all tensors that belong to no quantized layer, and of the layers' biases; `specs` of all layers."""
    quantized = {full for name, spec in specs.items() for full in stored_names(reader, config, name, spec)}
    return [name for name in reader.names() if name not in quantized and name.rpartition(".")[0] not in config.unused]


def _spec(reader: CheckpointReader, config: CheckpointConfig, name: str, leaves: set[str]) -> LinearSpec:
    stored = config.layer_format(name)
    if stored is None:
        raise ValueError(f"{name} holds quantized tensors, but config.json says that it has none: {DAMAGED}")
    for vector in (SU.name, SV.name):
        if len(reader.shapes.get(f"{name}.{vector}", ())) != 1:
            raise ValueError(f"{name} has no vector {vector}: {DAMAGED}")
    n, k = (reader.shapes[f"{name}.{vector}"][0] for vector in (SV.name, SU.name))
    dtype = reader.dtypes[f"{name}.{SU.name}"]
    rows = sum(size for _, size in config.parts_of(name))
    if rows not in (0, n):
        raise ValueError(f"{name} has {n} outputs, but its parts in config.json have {rows}: {DAMAGED}")
    stored_n, stored_k = n, k
    n, k = config.shapes.get(name, (n, k))
    if n > stored_n or k > stored_k:
        raise ValueError(f"{name} is {n} x {k} in config.json, but {stored_n} x {stored_k} in the files: {DAMAGED}")
    spec = stored.spec(k, (n,), config.hadamard_block, rotate_output=not config.has_token_rows(name))
    spec = replace(spec, vector_dtype=dtype) if dtype in FLOATS else spec
    try:
        wanted = layout(spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    described = f"{name}, said to be {stored.code} at {stored.bits} bits,"
    if leaves != set(wanted):
        raise ValueError(f"{described} has tensors {sorted(leaves)} in place of {sorted(wanted)}: {DAMAGED}")
    for leaf, one in wanted.items():
        shape, dtype = reader.shapes[f"{name}.{leaf}"], reader.dtypes[f"{name}.{leaf}"]
        if shape != one.shape or dtype not in one.dtypes:
            kinds = " or ".join(map(str, one.dtypes))
            raise ValueError(f"{described} has {leaf} {dtype} {shape} in place of {kinds} {one.shape}: {DAMAGED}")
    if f"{name}.bias" in reader:
        shape, dtype = reader.shapes[f"{name}.bias"], reader.dtypes[f"{name}.bias"]
        if shape not in ((n,), (stored_n,)) or dtype not in FLOATS:
            raise ValueError(f"{name} has a bias {dtype} {shape} in place of a float of {(n,)}: {DAMAGED}")
    return spec


@cache
def tensor_names() -> set[str]:
    """Names of all tensors that some format has."""
    specs = (one for format in FORMATS.values() for bits in format.bits for one in format.tensors(bits))
    return {SU.name, SV.name, *(one.name for one in specs)}
