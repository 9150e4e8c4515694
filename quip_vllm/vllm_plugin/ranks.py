# SPDX-License-Identifier: Apache-2.0
"""On how many tensor-parallel ranks a checkpoint can be served, by the rule that cuts its layers; without vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.config import CheckpointConfig, Embedding, LayerFormat
from quip_vllm.checkpoint.cuts import Cut, cut_of, kind_of
from quip_vllm.checkpoint.hub import load_config
from quip_vllm.checkpoint.layers import layer_specs, read_config
from quip_vllm.checkpoint.published import HEAD
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.vllm_plugin.share import Part, Share, linear_part, quantized, token_share

KEYS_VALUES = ("k_proj", "v_proj")
FEWER = "serve with fewer ranks"
TRY = "start vLLM with --tensor-parallel-size {} to see"
VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of it."""


def verdict(folder: Path, most: int, trust_remote_code: bool = False) -> dict[str, Any]:
    """What ``quip-vllm inspect --tensor-parallel`` says; headers are read only.

    Args:
        folder: the checkpoint.
        most: the largest number of ranks that is tried.
        trust_remote_code: whether Python code among the checkpoint's files may run.

    Returns:
        ``ranks``: ``most``; ``allowed``: the numbers up to it on which the checkpoint is served; ``refused``: why
        `most` is not among them, a sentence for each kind of layer, with what to do.

    Raises:
        ValueError: `most` is not positive, or the folder is no quantized checkpoint.
    """
    if most < 1:
        raise ValueError(f"--tensor-parallel is {most}: give a number of ranks, 1 or more")
    model = _Model.read(folder, trust_remote_code)
    refused = {ranks: list(dict.fromkeys(model.problems(ranks))) for ranks in range(1, most + 1)}
    return {"ranks": most, "allowed": [ranks for ranks, why in refused.items() if not why], "refused": refused[most]}


def format_verdict(folder: Path, found: dict[str, Any]) -> str:
    """The same for a person."""
    allowed = ", ".join(map(str, found["allowed"])) or "none"
    lines = [f"{folder}: of 1 to {found['ranks']} tensor-parallel ranks these can serve it: {allowed}"]
    return "\n".join(lines + [f"not on {found['ranks']}: {why}" for why in found["refused"]])


class _Layer(NamedTuple):
    """A layer of the model as the files have it, slices joined: its format, outputs and inputs."""

    name: str
    stored: LayerFormat
    n: int
    k: int


@dataclass(frozen=True)
class _Model:
    """A checkpoint, and what vLLM takes from the model's config."""

    checkpoint: CheckpointConfig
    layers: tuple[_Layer, ...]
    """The first of each kind."""
    heads: int
    keys: int
    """Heads of keys and values."""
    vocabulary: int
    """Padded."""

    @classmethod
    def read(cls, folder: Path, trust_remote_code: bool) -> "_Model":
        """Raises ValueError unless the folder is a quantized checkpoint of a model with attention."""
        checkpoint = read_config(folder)
        specs = layer_specs(CheckpointReader(folder), checkpoint)
        text = load_config(folder, trust_remote_code).get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        if type(heads) is not int or heads < 1:
            raise ValueError(f"{folder / 'config.json'} has num_attention_heads {heads!r:.100}: it must be positive")
        slices = exl3.slices(specs)
        whole = {one: name for name, names in slices.items() for one in names}
        first: dict[object, _Layer] = {}
        for name in dict.fromkeys(whole.get(one, one) for one in specs):
            names = slices.get(name, [name])
            stored = checkpoint.layer_format(names[0])
            assert stored is not None  # it is quantized
            n, k = exl3.joined(name, [(specs[one].out_features, specs[one].in_features) for one in names])
            first.setdefault((kind_of(name), stored, n, k), _Layer(name, stored, n, k))
        keys = getattr(text, "num_key_value_heads", None) or heads
        if type(keys) is not int or keys < 1:
            raise ValueError(f"{folder / 'config.json'} has num_key_value_heads {keys!r:.100}: it must be positive")
        padded = text.vocab_size + -text.vocab_size % VOCABULARY_MULTIPLE
        return cls(checkpoint, tuple(first.values()), heads, keys, padded)

    def problems(self, ranks: int) -> Iterator[str]:
        """Yields why the model cannot be served on so many ranks."""
        if self.heads % ranks:
            yield f"{self.heads} attention heads cannot be shared equally by {ranks} ranks: {FEWER}"
        elif self.keys % ranks and ranks % self.keys:
            yield f"{self.keys} heads of keys and values can be neither shared nor repeated by {ranks} ranks: {FEWER}"
        elif self.vocabulary % ranks:
            yield f"a vocabulary of {self.vocabulary}, padding included, has no {ranks} equal shares: {FEWER}"
        else:
            for layer in self.layers:
                try:
                    for rank in range(ranks):
                        self._check(layer, rank, ranks)
                except ValueError as error:
                    yield str(error).replace(layer.name, kind_of(layer.name))

    def _check(self, layer: _Layer, rank: int, ranks: int) -> None:
        """Raises ValueError where a rank's share of a layer cannot be cut."""
        block = self.checkpoint.hadamard_block
        rows = next((one for one in self.checkpoint.token_rows if one.module == layer.name), None)
        if rows is not None or layer.name.rpartition(".")[2] == HEAD:
            size = self.vocabulary // ranks
            run = range(min(rank * size, layer.n), min(rank * size + size, layer.n))
            described = rows or Embedding(layer.name, layer.stored)
            token_share(described, block, rows is None, layer.n, run, size, layer.k).check_split((0,))
        elif ranks > 1:
            parts = tuple(
                replace(self._part(layer, name, n, rank, ranks), of=i) for i, (name, n) in enumerate(self._parts(layer))
            )
            held = quantized(Share(layer.name, parts, block), self.checkpoint)
            held.check_sizes(ranks)
            for index in {part.slice for part in held.parts}:
                held.check_split(tuple(i for i, part in enumerate(held.parts) if part.slice == index))

    def _part(self, layer: _Layer, name: str, n: int, rank: int, ranks: int) -> Part:
        """A rank's share of a part of a layer."""
        cut = cut_of(name)
        if cut is None:
            raise ValueError(f"{layer.name}: how vLLM cuts this layer is not known here: {TRY.format(ranks)}")
        if cut is Cut.REARRANGED:
            raise ValueError(f"{layer.name}: vLLM's code of this model moves its rows, which cannot be cut: {FEWER}")
        few = cut is Cut.OUTPUTS and name.rpartition(".")[2] in KEYS_VALUES
        replicas = max(1, ranks // self.keys) if few else 1
        size = {Cut.OUTPUTS: n, Cut.INPUTS: layer.k, Cut.NOTHING: 0}[cut]
        if size % (ranks // replicas):
            raise ValueError(f"{layer.name}: {cut.value} of size {size} have no {ranks} equal shares: {FEWER}")
        if cut is Cut.OUTPUTS:
            own = size * replicas // ranks
            return linear_part(layer.name, layer.stored, own, (layer.k, layer.k), rank, ranks, replicas)
        held = layer.k // ranks if cut is Cut.INPUTS else layer.k
        return linear_part(layer.name, layer.stored, n, (layer.k, held), rank, 1)

    def _parts(self, layer: _Layer) -> list[tuple[str, int]]:
        """Name and outputs of each part that vLLM fuses and the files have in one tensor."""
        parent, dot, leaf = layer.name.rpartition(".")
        queries = layer.n * self.heads // (self.heads + 2 * self.keys)
        fused = {
            "qkv_proj": {"q_proj": queries, "k_proj": (layer.n - queries) // 2, "v_proj": (layer.n - queries) // 2},
            "gate_up_proj": {"gate_proj": layer.n // 2, "up_proj": layer.n // 2},
        }.get(leaf, {leaf: layer.n})
        return self.checkpoint.parts_of(layer.name) or [(parent + dot + name, n) for name, n in fused.items()]
