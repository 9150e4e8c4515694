# SPDX-License-Identifier: Apache-2.0
"""Reading a folder of safetensors files; reading and writing JSON. Shards are written by `checkpoint.shards`."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "*.vocab", "*.spm"]
SIDE_FILES += ["LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"]
"""What travels with the weights: tokenizer, templates and notices."""
FETCHED = ["*.safetensors", *SIDE_FILES]
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
TOKENIZER = [*_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"]
TOKENIZER += ["chat_template*", "LICEN[CS]E*"]
HUB_TIMEOUT_S = 10
logger = logging.getLogger(__name__)
SECOND_COPIES = ["*consolidated*.safetensors"]
"""All weights of some models once more, under other names, which nobody here reads."""


def local_folder(model: str, code: bool = False) -> Path:
    """The folder of a local model, or the hub's snapshot of a hub name (fetches what is missing; safetensors only).

    Where the hub is out of reach, the snapshot in its cache is taken with a warning.

    Args:
        model: folder or hub name.
        code: whether Python code is fetched as well.

    Raises:
        ValueError: neither exists, the hub does not give the model, or the folder holds none.
    """
    folder = Path(model) if Path(model).is_dir() else _fetched(model, [*FETCHED, *(["*.py"] if code else [])])
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} is a LoRA adapter: merge it into its base model, and give the folder of that")
        raise ValueError(f"{folder} has no config.json: give a folder with config.json and *.safetensors")
    return folder


def tokenizer_folder(model: str) -> Path:
    """A folder with a tokenizer: that of a local model, or the hub's, of which nothing else is fetched.

    Raises:
        ValueError: there is none.
    """
    folder = Path(model) if Path(model).is_dir() else _fetched(model, TOKENIZER)
    if not has_tokenizer(folder):
        raise ValueError(f"{model} has no tokenizer: give a folder or hub name with {', '.join(_VOCABULARIES)}")
    return folder


def tokenizer_of(folder: Path) -> Path:
    """Where the tokenizer of a model's folder is: there, or in the local folder that config.json names as its origin.

    Raises:
        ValueError: in neither.
    """
    origin = read_json(folder / "config.json").get("_name_or_path")
    places = [folder, *([Path(origin)] if isinstance(origin, str) and origin else [])]
    for place in places:
        if place.is_dir() and has_tokenizer(place):
            return place
    said = f"it comes from {origin!r:.200}, which is no such folder" if origin else "its origin is not known"
    raise ValueError(
        f"{folder} has no tokenizer ({said}): copy that of the original model there, or convert the checkpoint with "
        "--tokenizer and the folder or hub name of that model"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file with a vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)


def copy_files(folder: Path, out: Path, patterns: Iterable[str], ours: Iterable[str] = ()) -> None:
    """Copies the files that travel with weights; hidden ones, other models within the folder and `ours` are left out.

    Args:
        folder: where they are.
        out: where they go, also a folder within `folder`.
        patterns: of their names.
        ours: names of files that are not copied.
    """
    for file in {file for pattern in patterns for file in folder.rglob(pattern)}:
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        hidden |= any((folder / parent / "config.json").exists() for parent in inside.parents[:-1])  # another model
        left = inside.name in ours or inside.name.endswith(".index.json")
        if file.is_file() and not left and not hidden and out.resolve() not in file.resolve().parents:
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / inside)


def _fetched(model: str, patterns: list[str]) -> Path:
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ValueError(
            f"model {model} is not a folder: give a folder with config.json and *.safetensors, or a hub name"
        )
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    away = ""
    try:
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)  # one try, where a download tries for half a minute
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(
            f"model {model} is neither a folder nor a model of the hub that you may read: check the name, or log in "
            "with `hf auth login`"
        ) from None
    except Exception as error:  # of requests, httpx or httpx2: that depends on the version of huggingface_hub
        away = _first_line(error)
    try:
        found = Path(
            snapshot_download(
                model, allow_patterns=patterns, ignore_patterns=SECOND_COPIES, local_files_only=bool(away)
            )
        )
    except GatedRepoError:
        raise ValueError(
            f"model {model} is gated: accept its terms on the hub, log in with `hf auth login`, and try again"
        ) from None
    except OSError as error:
        why = f"the hub is out of reach ({away}) and its cache holds no copy" if away else _first_line(error)
        raise ValueError(f"model {model} cannot be fetched: {why}; give a folder, or try again later") from None
    if away:
        logger.warning("the hub is out of reach (%s): %s is read from its cache, %s", away, model, found)
    return found


def at_hand(model: str, revision: str | None = None) -> Path | None:
    """The folder of a local model, or the snapshot of a hub name where the hub's cache holds all of its shards.

    Nothing is fetched. None where the files are elsewhere, or are not here yet.

    Raises:
        ValueError: the snapshot's index is damaged.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return Path(model)
    try:
        single, index = (try_to_load_from_cache(model, name, revision=revision) for name in (SINGLE_NAME, INDEX_NAME))
    except HFValidationError:  # a bucket's address
        return None
    if isinstance(index, str):
        folder = Path(index).parent
        return folder if all((folder / name).exists() for name in (_weight_map(folder) or {}).values()) else None
    return Path(single).parent if isinstance(single, str) else None


def _first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return f"{(str(error).splitlines() or [''])[0].strip() or type(error).__name__:.200}"


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
        stored_as: by name, the name in its file, which is another one for what `rename` was told.

    Raises:
        ValueError: no safetensors file is there, or one is truncated; the message names the file and the remedy.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        single = folder / SINGLE_NAME  # beside it some models hold the same weights under other names
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        weight_map = _weight_map(folder)
        if weight_map is not None:
            files = [folder / name for name in sorted(set(weight_map.values()))]
        if not files:
            raise ValueError(
                f"{folder} has no *.safetensors file: give a folder with safetensors weights (never pickles)"
            )
        self.file_of: dict[str, Path] = {}
        self.stored_as: dict[str, str] = {}
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
        for by_name in (self.file_of, self.stored_as, self.shapes, self.dtypes, self.bytes_of):
            values = {names.get(name, name): value for name, value in by_name.items()}
            by_name.clear()
            by_name.update(values)  # type: ignore[arg-type]  # of its own values

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
                found[name] = handle.get_tensor(self.stored_as[name])
        return found

    def digest(self, names: Iterable[str]) -> str:
        """`digest` of the named tensors, one in memory at a time."""
        return digest((name, self.read([name])[name]) for name in sorted(names))


def _weight_map(folder: Path) -> dict[str, str] | None:
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
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): a JSON file is wanted there") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: a JSON object is wanted")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Writes text so that ``path`` is the old or the new file, never a part of one."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes ``path`` when the block ends, whole and on the disk; after an error it does not.

    It has ordinary permissions: those that the process's umask leaves.
    """
    fresh = path.with_name(path.name + ".tmp")
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()  # on a full disk its part would be in the way
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``write_atomically`` of an indented JSON object."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
