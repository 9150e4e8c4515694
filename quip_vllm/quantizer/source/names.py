# SPDX-License-Identifier: Apache-2.0
"""Which tensor of the files is which tensor of the transformers model."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from quip_vllm.checkpoint.hub import rules_of_transformers
from quip_vllm.checkpoint.store import CheckpointReader, Piece
from quip_vllm.nn.experts import LEAVES, Experts, made_of


def names_in_files(model: Any, reader: CheckpointReader) -> dict[str, str]:
    """Matches the tensors of the model with those of its files as transformers does while it loads them.

    A name that only lacks the model's prefix gets it in `reader`, hence in what is written: vLLM wants it. All other
    names stay those of the files. Of a tensor that stacks the experts of a layer, each linear layer of an expert gets
    its own there.

    Returns:
        Name of each of the model's parameters and stored buffers -> its name in `reader`. A tied weight that is not
        stored has none.

    Raises:
        ValueError: a parameter is not in the files, has another shape there, or is made out of several tensors.
    """
    state, prefix = model.state_dict(), model.base_model_prefix
    renamed = _renamer(model)
    _split_stacks(model, reader, renamed)
    found: dict[str, str] = {}
    lacking: dict[str, str] = {}
    for stored in reader.names():
        name, converted = (stored, False) if stored in state else renamed(stored)
        if name not in state and f"{prefix}.{name}" in state:
            name = f"{prefix}.{name}"
            lacking[stored] = name
        if name in state:
            if converted:
                raise ValueError(
                    f"{reader.folder} holds {stored}, which transformers rearranges into {name}: only models whose "
                    "files hold the weights of nn.Linear as they are can be quantized"
                )
            found.setdefault(name, lacking.get(stored, stored))
    reader.rename(lacking)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    _join_tied(tied, found, reader)
    optional = set(tied) | {name for name, _ in model.named_buffers()}
    _check_experts(model, found, reader)
    for name, tensor in state.items():
        if name not in found and name not in optional:
            raise ValueError(
                f"{reader.folder} has no tensor {name}: its files and its config.json do not belong together"
            )
        if name in found and reader.shapes[found[name]] != tuple(tensor.shape):
            raise ValueError(
                f"tensor {found[name]} is {reader.shapes[found[name]]}: config.json makes it {tuple(tensor.shape)}; "
                "fetch the model again"
            )
    return found


def _split_stacks(model: Any, reader: CheckpointReader, renamed: Callable[[str], tuple[str, bool]]) -> None:
    """Has `reader` give the linear layers of each expert in the place of tensors that stack those of all."""
    prefix = model.base_model_prefix
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    for stored in [name for name in reader.names() if 1 < len(reader.shapes[name]) < 4]:
        path, _, stack = renamed(stored)[0].rpartition(".")
        path = path if path in mixtures else f"{prefix}.{path}"
        experts = mixtures.get(path)
        if experts is None or stack.removesuffix("_bias") not in experts.stacks:
            continue
        if reader.shapes[stored][0] != len(experts):
            continue
        leaves, kind = made_of(stack, experts.leaves)
        begin, transposed = stored.removesuffix(stack).rstrip("."), experts.transposed and kind == "weight"
        begin = begin if begin.endswith(".experts") else path
        reader.split(
            stored,
            {
                f"{begin}.{expert}.{leaf}.{kind}": Piece(expert, part, len(leaves), transposed)
                for expert in range(len(experts))
                for part, leaf in enumerate(leaves)
            },
        )


def _check_experts(model: Any, found: Mapping[str, str], reader: CheckpointReader) -> None:
    """Raises ValueError for files that have the experts of a layer in one tensor."""
    for path, module in model.named_modules():
        if isinstance(module, Experts) and f"{path}.0.{module.leaves[-1]}.weight" not in found:
            other = (name for name in reader.names() if len(reader.shapes[name]) == 3)
            what = next(other, f"no {path}.0.{module.leaves[-1]}")
            raise ValueError(
                f"{reader.folder} holds {what}: only models whose files have a matrix for each expert, under names "
                "that transformers knows, or stack these as it does, can be quantized"
            )


def _join_tied(tied: Mapping[str, str], found: dict[str, str], reader: CheckpointReader) -> None:
    """Gives a tied weight that is stored under the other of its two names alone the one that vLLM reads.

    Args:
        tied: the model's name of a weight -> the name of the one it is tied to.
        found: of `names_in_files`; changed.
        reader: of the files; renamed.

    Raises:
        ValueError: both are stored and differ: transformers runs the one, and older versions of vLLM serve the other.
    """
    for name, source in tied.items():
        if name in found and source not in found:
            reader.rename({found.pop(name): source})
            found[source] = source
        elif name in found:
            one, other = (reader.read([found[key]])[found[key]] for key in (name, source))
            if not torch.equal(one, other):
                raise ValueError(
                    f"config.json ties {name} to {source}, but the files hold two that differ: give "
                    f"tie_word_embeddings false there, or remove the {name} that does not count"
                )


def modules_beyond(
    names: Mapping[str, str], reader: CheckpointReader, outside: Iterable[str], prefix: str
) -> list[str]:
    """Modules with matrices in the files but not in the model: layers that predict several tokens, a vision tower.

    Args:
        names: of `names_in_files`.
        reader: of the files.
        outside: tensors that belong to none of the model's decoder layers.
        prefix: the name of the decoder layers; all of a further one is one module.
    """
    known, begin = set(names.values()), prefix + "."
    found = [
        name.removesuffix(".weight")
        for name in outside
        if name not in known and name.endswith(".weight") and len(reader.shapes[name]) == 2
    ]
    return sorted({begin + name.split(".")[begin.count(".")] if name.startswith(begin) else name for name in found})


def _renamer(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A function: a name in the files -> (the model's name, whether the tensor is more than renamed)."""
    rules = rules_of_transformers(model)
    experts = {path for path, module in model.named_modules() if isinstance(module, Experts)}
    experts |= {path.removeprefix(f"{model.base_model_prefix}.") for path in experts}

    def renamed(stored: str) -> tuple[str, bool]:
        name, sources, pattern = rules(stored)
        path, _, stack = name.rpartition(".")
        number = re.search(r"\.experts\.(\d+)\.", stored)
        if pattern is not None and number and path in experts:  # transformers would put it into a stack
            leaf = LEAVES[sources.index(pattern)] if stack == "gate_up_proj" else stack
            return f"{path}.{number[1]}.{leaf}.weight", False
        return name, pattern is not None

    return renamed
