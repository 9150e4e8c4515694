# SPDX-License-Identifier: Apache-2.0
"""Reading a folder of safetensors files; reading and writing JSON. Shards are written by `checkpoint.shards`."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Piece:
    """Where the weight or bias of an expert's linear layer is in a tensor that stacks all experts'.

    Attributes:
        expert: the number of the expert.
        part, parts: which of equal runs of the expert's outputs it is, and how many there are.
        transposed: whether the stack holds the transposed weights.
    """

    expert: int
    part: int = 0
    parts: int = 1
    transposed: bool = False

    def shape(self, stack: Sequence[int]) -> tuple[int, ...]:
        """That of the piece, of the stack's."""
        outputs, *inputs = stack[:0:-1] if self.transposed else stack[1:]
        return (outputs // self.parts, *inputs)

    def cut(self, own: Tensor) -> Tensor:
        """The piece, of what the stack has of its expert."""
        return (own.T if self.transposed else own).chunk(self.parts)[self.part].contiguous()


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The tensors of a local safetensors checkpoint by name; each is read when it is asked for.

    Attributes:
        folder: where the files are.
        file_of, shapes, dtypes, bytes_of: by name, from the headers.
        stored_as: by name, the name in its file, which is another one for what `rename` or `split` was told.

    Raises:
        ValueError: no safetensors file is there, or one is truncated; the message names the file and the remedy.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        single = folder / SINGLE_NAME  # beside it some models hold the same weights under other names
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        weight_map = weight_map_of(folder)
        if weight_map is not None:
            files = [folder / name for name in sorted(set(weight_map.values()))]
        if not files:
            raise ValueError(
                f"{folder} has no *.safetensors file: give a folder with safetensors weights (never pickles)"
            )
        self.file_of: dict[str, Path] = {}
        self.stored_as: dict[str, str] = {}
        self._pieces: dict[str, Piece] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.bytes_of: dict[str, int] = {}
        for file in files:
            with open_shard(file) as handle:
                for name in handle.keys():  # noqa: SIM118  # not a dict
                    if name in self.file_of:
                        both = f"{self.file_of[name].name} and in {file.name}"
                        raise ValueError(
                            f"{name} is in {both}, of {folder}: remove the file that does not belong there"
                        )
                    self.file_of[name] = file
                    self.stored_as[name] = name
                    self.shapes[name], self.dtypes[name] = _header(handle, file, name)
                    self.bytes_of[name] = math.prod(self.shapes[name]) * self.dtypes[name].itemsize
        for name, shard in (weight_map or {}).items():
            if self.file_of.get(name) != folder / shard:
                raise ValueError(f"{folder / shard} has no tensor {name}, but {INDEX_NAME} says so: fetch it again")

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.file_of)

    def headers(self) -> dict[str, Header]:
        """Of every tensor, by name."""
        return {name: Header(self.shapes[name], self.dtypes[name]) for name in self.names()}

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names from now on: old name -> new name."""
        for by_name in (self.file_of, self.stored_as, self.shapes, self.dtypes, self.bytes_of, self._pieces):
            values = {names.get(name, name): value for name, value in by_name.items()}
            by_name.clear()
            by_name.update(values)  # type: ignore[arg-type]  # of its own values

    def split(self, name: str, pieces: Mapping[str, Piece]) -> None:
        """Has pieces of a tensor by names of their own from now on, and not the whole."""
        shape, dtype = self.shapes.pop(name), self.dtypes.pop(name)
        file, stored = self.file_of.pop(name), self.stored_as.pop(name)
        del self.bytes_of[name]
        for own, piece in pieces.items():
            self.file_of[own], self.stored_as[own], self._pieces[own] = file, stored, piece
            self.shapes[own], self.dtypes[own] = piece.shape(shape), dtype
            self.bytes_of[own] = math.prod(self.shapes[own]) * dtype.itemsize

    def is_piece(self, name: str) -> bool:
        """Whether a name is of those that `split` was told."""
        return name in self._pieces

    def check_floats(self) -> None:
        """Raises ValueError for a weight that is no float of 16 bits or more: it needs scales that are elsewhere."""
        for name, dtype in self.dtypes.items():
            if name.endswith(".weight") and not (dtype.is_floating_point and dtype.itemsize > 1):
                raise ValueError(
                    f"{self.file_of[name]} holds {name} as {str(dtype).removeprefix('torch.')}, which is quantized or "
                    "damaged: give the model in bf16, fp16 or fp32"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU. Raises ValueError for a name that is not there."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self.file_of:
                raise ValueError(
                    f"{self.folder} has no tensor {name}: its files and its config.json do not belong together"
                )
            with open_shard(self.file_of[name]) as handle:
                stored, piece = self.stored_as[name], self._pieces.get(name)
                if piece is None:
                    found[name] = handle.get_tensor(stored)
                else:
                    found[name] = piece.cut(handle.get_slice(stored)[piece.expert])
        return found

    def digest(self, names: Iterable[str]) -> str:
        """`digest` of the named tensors, one in memory at a time."""
        return digest((name, self.read([name])[name]) for name in sorted(names))


def weight_map_of(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard, of the index; None where there is none. Raises ValueError for a damaged one."""
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise ValueError(f"{index} has no weight_map object: fetch the model again")
    names = {name: str(shard) for name, shard in found.items()}
    for shard in set(names.values()):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names {shard!r}: a shard must be a plain file name; fetch the model again")
    return names


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of tensors in the order of their names: names, dtypes, shapes and contents."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}:".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


DTYPES = {
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
"""The dtypes that are read and written, by their names in a safetensors header."""


def open_shard(file: Path) -> Any:
    """The library's handle of one safetensors file. Raises ValueError for a missing or damaged one."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): it is missing, truncated or damaged; fetch or quantize it again"
        ) from None


def _header(handle: Any, file: Path, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor, without reading it."""
    part = handle.get_slice(name)
    if part.get_dtype() not in DTYPES:
        raise ValueError(f"{file} holds {name} as {part.get_dtype()}: fetch the model in bf16 or fp32")
    return tuple(part.get_shape()), DTYPES[part.get_dtype()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file if it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): a JSON file is wanted there") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: a JSON object is wanted")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Writes text so that ``path`` is the old or the new file, never a part of one."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """A file to write that becomes ``path`` when the block ends, whole; after an error it does not.

    It has ordinary permissions: those that the process's umask leaves.

    Args:
        path: of the file.
        lasting: whether it is on the disk by then, and not only with the operating system.
    """
    fresh = path.with_name(path.name + ".tmp")
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()  # on a full disk its part would be in the way
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``write_atomically`` of an indented JSON object."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
