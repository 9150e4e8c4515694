# SPDX-License-Identifier: Apache-2.0
"""Reading and writing sharded safetensors checkpoints. A file is there whole or not at all."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]


def local_folder(model: str) -> Path:
    """The folder of a local model, or the hub's snapshot of a hub name (fetches what is missing; safetensors only).

    Raises:
        ValueError: neither exists.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ValueError(
            f"model {model} is not a folder: give a folder with config.json and *.safetensors, or a hub name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {model} is no folder, and the hub does not give it ({error}): check the name"
        ) from None


class CheckpointReader:
    """The tensors of a local safetensors checkpoint by name; each is read when it is asked for.

    Attributes:
        folder: where the files are.
        shapes, dtypes, bytes_of: from the headers, by name.

    Raises:
        ValueError: no safetensors file is there, or one is truncated; the message names the file and the remedy.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        single = folder / SINGLE_NAME  # beside it some models hold the same weights under other names
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        index = folder / INDEX_NAME
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map object: fetch the model again")
            names = {str(name) for name in weight_map.values()}
            files = [folder / name for name in sorted(names)]
            for name in names:
                if Path(name).name != name:
                    raise ValueError(
                        f"{index} names {name!r}: a shard must be a plain file name; fetch the model again"
                    )
        if not files:
            raise ValueError(
                f"{folder} has no *.safetensors file: give a folder with safetensors weights (never pickles)"
            )
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.bytes_of: dict[str, int] = {}
        for file in files:
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118  # not a dict
                    self._file_of[name] = file
                    self.shapes[name], self.dtypes[name] = _header(handle, file, name)
                    self.bytes_of[name] = math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU. Raises ValueError for a name that is not there."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self._file_of:
                raise ValueError(
                    f"{self.folder} has no tensor {name}: its files and its config.json do not belong together"
                )
            with _open(self._file_of[name]) as handle:
                found[name] = handle.get_tensor(name)
        return found


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of dtypes in a safetensors header."""


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): it is missing or truncated; fetch or quantize it again"
        ) from None


def _header(handle: Any, file: Path, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor, without reading it."""
    part = handle.get_slice(name)
    if part.get_dtype() not in _DTYPES:
        raise ValueError(f"{file} holds {name} as {part.get_dtype()}: fetch the model in bf16 or fp32")
    return tuple(part.get_shape()), _DTYPES[part.get_dtype()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file if it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): a JSON file is wanted there") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: a JSON object is wanted")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Writes text so that ``path`` is the old or the new file, never a part of one."""
    fresh = path.with_name(path.name + ".tmp")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``write_atomically`` of an indented JSON object."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors shard atomically; tensors in name order, so that equal content is equal bytes."""
    fresh = path.with_name(path.name + ".tmp")
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    try:
        save_file(ordered, fresh, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): make room on the disk, then --resume") from None
    with open(fresh, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(fresh, path)


def read_shard(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of one shard whose names start with ``prefix``, by the rest of the name."""
    with _open(path) as handle:
        names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118  # not a dict
        return {name.removeprefix(prefix): handle.get_tensor(name) for name in names}


def shard_name(index: int, count: int) -> str:
    """Hugging Face's name of shard ``index`` (from 0) of ``count``."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, count: int) -> None:
    """Writes ``model.safetensors.index.json`` over the ``count`` shards in ``folder``."""
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(count):
        with _open(folder / shard_name(i, count)) as handle:
            for name in handle.keys():  # noqa: SIM118  # not a dict
                weight_map[name] = shard_name(i, count)
                shape, dtype = _header(handle, folder / shard_name(i, count), name)
                total += math.prod(shape) * dtype.itemsize
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
