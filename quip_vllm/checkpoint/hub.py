# SPDX-License-Identifier: Apache-2.0
"""A model of Hugging Face: its folder, here or fetched, its config and its tokenizer; each error is one sentence."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quip_vllm.checkpoint.store import INDEX_NAME, SINGLE_NAME, read_json, weight_map_of

SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "*.vocab", "*.spm"]
SIDE_FILES += ["LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"]
"""What travels with the weights: tokenizer, templates and notices."""
FETCHED = ["*.safetensors", *SIDE_FILES]
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
TOKENIZER = [*_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"]
TOKENIZER += ["chat_template*", "LICEN[CS]E*"]
HUB_TIMEOUT_S = 10
SECOND_COPIES = ["*consolidated*.safetensors"]
"""All weights of some models once more, under other names, which nobody here reads."""

logger = logging.getLogger(__name__)


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


def copy_files(folder: Path, out: Path, patterns: Iterable[str], ours: Iterable[str] = (), below: bool = True) -> None:
    """Copies the files that travel with weights, see `travelling`, but for those with a name among `ours`."""
    for file in travelling(folder, out, patterns, below):
        inside = file.relative_to(folder)
        if inside.name not in ours:
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / inside)


def travelling(folder: Path, out: Path, patterns: Iterable[str], below: bool = True) -> list[Path]:
    """The files that travel with weights; hidden ones and other models within the folder are left out.

    Args:
        folder: where they are.
        out: where they go, also a folder within `folder`.
        patterns: of their names.
        below: whether folders within `folder` are searched as well.

    Raises:
        ValueError: one is a link to a file outside of the folder.
    """
    search = folder.rglob if below else folder.glob
    found = []
    for file in {file for pattern in patterns for file in search(pattern)}:
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        hidden |= any((folder / parent / "config.json").exists() for parent in inside.parents[:-1])  # another model
        left = hidden or inside.name.endswith(".index.json")
        if file.is_file() and not left and out.resolve() not in file.resolve().parents:
            check_link(file, folder)
            found.append(file)
    return found


def check_link(file: Path, folder: Path) -> None:
    """Raises ValueError where a file of a model's folder is a link that leads out of it, as into the user's own files.

    The files of a snapshot in the hub's cache are links to its blobs.
    """
    home, target = folder.resolve(), file.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in target.parents and blobs not in target.parents:
        raise ValueError(f"{file} is a link to {target}, outside of the model: put the file itself there, or remove it")


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
        away = brief(error)
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
        why = f"the hub is out of reach ({away}) and its cache holds no copy" if away else brief(error)
        raise ValueError(f"model {model} cannot be fetched: {why}; give a folder, or try again later") from None
    if away:
        logger.warning("the hub is out of reach (%s): %s is read from its cache, %s", away, model, found)
    return found


def at_hand(model: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """The folder of a local model, or the snapshot of a hub name where the hub's cache holds all of its shards.

    Nothing is fetched. None where the files are elsewhere, or are not here yet.
    `cache` is a folder in place of the hub's usual one.

    Raises:
        ValueError: the snapshot's index is damaged.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return Path(model)
    try:
        single, index = (try_to_load_from_cache(model, name, cache, revision) for name in (SINGLE_NAME, INDEX_NAME))
    except HFValidationError:  # a bucket's address
        return None
    if isinstance(index, str):
        folder = Path(index).parent
        return folder if all((folder / name).exists() for name in (weight_map_of(folder) or {}).values()) else None
    return Path(single).parent if isinstance(single, str) else None


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder. Raises ValueError where there is none that can be used."""
    from transformers import AutoConfig

    with explained(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config._attn_implementation = None  # a name that a file gives may be one of code to be fetched
        return config


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises ValueError where there is none that can be used."""
    from transformers import AutoTokenizer

    with explained(f"the tokenizer in {folder}", "; put the model's own tokenizer files there"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def token_ids(tokenizer: Any, text: str) -> Any:
    """What the tokenizer makes of a text, with nothing added. Raises ValueError where it fails."""
    with explained(f"the tokenizer in {tokenizer.name_or_path}", "; put the model's own tokenizer files there"):
        return tokenizer(text, add_special_tokens=False, verbose=False)


def token_rows(ids: Sequence[int], length: int, first: int | None) -> Tensor:
    """Tokens cut into rows without overlap, int64 [rows, length]; `first` begins each unless it is None.

    What does not fill a row is left out. The length is at least 2 with a `first`, else 1.
    """
    step = length - (first is not None)
    rows = torch.tensor(ids[: len(ids) // step * step], dtype=torch.int64).view(-1, step)
    return rows if first is None else functional.pad(rows, (1, 0), value=first)


def check_token(folder: Path | str, token: int, vocabulary: int) -> None:
    """Raises ValueError for a token of the tokenizer that the model, which knows those below `vocabulary`, lacks."""
    if not 0 <= token < vocabulary:
        raise ValueError(
            f"the tokenizer in {folder} makes token {token}, but the model knows {vocabulary}: fetch the model's own "
            "tokenizer files"
        )


def check_depth(config: Any, names: Sequence[str]) -> None:
    """Raises ValueError where config.json has more decoder layers than the files have tensors: they would be built."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(names):
        raise ValueError(
            f"config.json has num_hidden_layers {layers!r:.100}, but the files hold {len(names)} tensors: they do not "
            "belong together; fetch the model again"
        )


def rules_of_transformers(model: Any) -> Callable[[str], tuple[str, Sequence[str], str | None]]:
    """How transformers maps the names of tensors while it loads them into a model.

    Returns:
        A function: a name in the files -> (the name in the model, then of a tensor that is rearranged, too, the
        patterns of all names that are made into one tensor, in order, and the one that this name matches, else None).
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4 has no such rules for causal LMs
        return lambda stored: (stored, (), None)
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    sources = {pattern: rule.source_patterns for rule in converters for pattern in rule.source_patterns}

    def renamed(stored: str) -> tuple[str, Sequence[str], str | None]:
        name, pattern = rename_source_key(stored, renamings, converters)
        return name, () if pattern is None else sources[pattern], pattern

    return renamed


@contextlib.contextmanager
def explained(what: Path | str, remedy: str = "") -> Iterator[None]:
    """Inside, transformers warns of nothing, and whatever it raises is one sentence, that `what` cannot be used."""
    from transformers.utils import logging as library

    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    except BaseException as error:  # many kinds for a file that it does not understand, and those of a model's own code
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # the latter of tokenizers
            raise
        problem = f"{what} cannot be used: {brief(error)}{remedy}"
        if "trust_remote_code" in str(error):
            asks = "asks for Python code from the model's own files: read that code, then give --trust-remote-code"
            problem = f"{what} {asks}"
        raise ValueError(problem) from None
    finally:
        library.set_verbosity(verbosity)


def brief(error: BaseException) -> str:
    """The first line of a library's message, with the next one where it ends in a colon; 160 characters at most."""
    said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return f"{' '.join(lines[: 2 if lines[0].endswith(':') else 1]):.160}"
