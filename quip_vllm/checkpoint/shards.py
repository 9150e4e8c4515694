# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors shards: from tensors, or by copying tensors of other files, which takes no memory.

Shards are written here and not by the safetensors library: that writes to a temporary file of mode 0600 and renames it
(version 0.8.0), so that only its owner can read a checkpoint, and it wants all tensors in memory. The format is a
64-bit length, a JSON header and the bytes of the tensors (https://github.com/huggingface/safetensors#format).
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quip_vllm.checkpoint.store import DTYPES, INDEX_NAME, SINGLE_NAME, open_shard, replacing, write_json

SHARD_BYTES = 4_000_000_000
"""A finished checkpoint's shard holds no more, unless one tensor alone does."""
COPY_BYTES = 1 << 24

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_room(folder: Path, wanted: int, then: str) -> None:
    """Says before the work that a disk is too small for it.

    Args:
        folder: it is there; what it holds counts as written.
        wanted: bytes that it will hold.
        then: what to do once there is room.

    Raises:
        ValueError: the disk does not take them.
    """
    missing = wanted - sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise ValueError(
            f"{folder} has {amount(free)} free, and about {amount(missing)} are needed: make room, then {then}"
        )


def amount(size: float) -> str:
    """Bytes for a person, in the largest unit of which there is one: 1.5 kB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next(power for power in range(len(units)) if size < 1000 ** (power + 1) or power == len(units) - 1)
    return f"{size / 1000**power:.{min(power, 1)}f} {units[power]}"


class _Entry(NamedTuple):
    """A tensor of a shard: what its header says, and a function that gives its bytes, a piece at a time."""

    dtype: str
    shape: Sequence[int]
    size: int
    pieces: Callable[[], Iterable[Any]]


def write_shard(path: Path, tensors: Mapping[str, Tensor], lasting: bool = True) -> None:
    """Writes one safetensors file, whole or not at all. Equal tensors make equal bytes.

    Args:
        path: the file.
        tensors: by name.
        lasting: whether it is on the disk when this returns, so that it survives a crash of the machine.
    """

    def entry(tensor: Tensor) -> _Entry:
        def pieces() -> Iterator[Any]:
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

        return _Entry(_NAMES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.itemsize, pieces)

    _write(path, {name: entry(tensor) for name, tensor in tensors.items()}, lasting)


def copy_shard(path: Path, files: Mapping[str, Path], stored_as: Mapping[str, str] | None = None) -> None:
    """As `write_shard`, but each tensor's bytes come from the file of another shard.

    Args:
        path: the shard to write.
        files: tensor name -> the safetensors file that holds it.
        stored_as: tensor name -> its name in that file, where that is another one.
    """
    headers = {file: _header(file) for file in set(files.values())}

    def entry(name: str, file: Path) -> _Entry:
        described, start = headers[file]
        one = described[(stored_as or {}).get(name, name)]
        begin, end = one["data_offsets"]
        return _Entry(one["dtype"], one["shape"], end - begin, _pieces(file, start + begin, end - begin))

    _write(path, {name: entry(name, file) for name, file in files.items()})


def plan_shards(sizes: Mapping[str, int], limit: int | None = None) -> list[list[str]]:
    """The names of each shard: in the order of `sizes` (name -> bytes), `limit`, or SHARD_BYTES, at most per shard."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit or SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def shard_name(index: int, count: int) -> str:
    """Hugging Face's name of shard ``index`` (from 0) of ``count``."""
    return SINGLE_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, count: int) -> None:
    """Writes ``model.safetensors.index.json`` over the ``count`` shards in ``folder``; a single shard has none."""
    if count == 1:
        return
    weight_map: dict[str, str] = {}
    total = 0
    for name in (shard_name(i, count) for i in range(count)):
        sizes = tensor_sizes(folder / name)
        weight_map |= dict.fromkeys(sizes, name)
        total += sum(sizes.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of one shard."""
    with open_shard(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # not a dict


def tensor_sizes(path: Path) -> dict[str, int]:
    """Tensor name -> bytes of one shard, in name order."""
    described, _ = _header(path)
    sizes = {name: one["data_offsets"][1] - one["data_offsets"][0] for name, one in described.items()}
    return dict(sorted(sizes.items()))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(tensor name -> what the header says of it, where the tensors' bytes begin)."""
    open_shard(path)  # the library checks a header
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        described = json.loads(file.read(length))
    described.pop("__metadata__", None)
    return described, 8 + length


def _pieces(path: Path, begin: int, size: int) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(begin)
            for done in range(0, size, COPY_BYTES):
                yield file.read(min(COPY_BYTES, size - done))

    return pieces


def _write(path: Path, entries: Mapping[str, _Entry], lasting: bool = True) -> None:
    """Sorts tensors by size of element, so that each begins at a multiple of its element, then by name."""
    ordered = sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        one = entries[name]
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [end, end + one.size]}
        end += one.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path, lasting) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in ordered:
            for piece in entries[name].pieces():
                file.write(piece)
