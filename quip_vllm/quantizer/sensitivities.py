# SPDX-License-Identifier: Apache-2.0
"""A folder with the sensitivities of every decoder layer, made by one backward pass of the original model.

It belongs to a model, its calibration tokens and a seed, not to bits or codes, so several runs can share it.
"""

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm.checkpoint.shards import check_room, read_shard, write_shard
from quip_vllm.checkpoint.store import digest, open_shard, read_json, write_json
from quip_vllm.quantizer.curvature.outputs import OutputCollector, Sensitivity
from quip_vllm.quantizer.source.backward import Forward, sampled_score
from quip_vllm.quantizer.source.model import LayeredModel

_LOG = logging.getLogger(__name__)
AGAIN = "give a new folder (--hessians)"
WHOLE = "sensitivities.json"
"""Written last: what the files belong to."""
ENOUGH_TOKENS = 65_536
"""Through so many the backward pass goes: the tables of docs/benchmarks/quality.md have as many."""


def chosen(count: int, length: int) -> Tensor:
    """Which of `count` sequences of a text, evenly spread, have ENOUGH_TOKENS; all of them where it has fewer."""
    some = min(count, -(-ENOUGH_TOKENS // length))
    return torch.arange(some) * count // some


def spread_weights(weights: Tensor, share: float, count: int, length: int) -> Tensor:
    """What each token of a text counts, float32 [count * length], 1 in the mean.

    Args:
        weights: those of the tokens of the `chosen` sequences, float32, 1 in the mean. They stand for all others.
        share: of them; for the rest all tokens count the same.
        count: sequences of the text.
        length: tokens in each.
    """
    here = chosen(count, length)
    spread = torch.full((count, length), 1 - share)
    spread[here] += share * count / len(here) * weights.view(-1, length)
    return spread.flatten()


class Sensitivities:
    """The sensitivities of linear layers, read per decoder layer; they are measured where the folder is not whole.

    Args:
        folder: for one file per decoder layer.
        source: the model.
        weights: a digest of all of its tensors.
        tokens: the calibration text, int64 [count, length].
        batch: sequences at a time.
        names: the linear layers inside the decoder layers that are wanted.
        two_sided: whether the Hessians of the outputs are wanted.
        seed: of the labels.

    Raises:
        ValueError: the folder is whole, and belongs to something else.
    """

    def __init__(
        self,
        folder: Path,
        source: LayeredModel,
        weights: str,
        tokens: Tensor,
        batch: int,
        names: Collection[str],
        two_sided: bool,
        seed: int,
    ):
        self._folder, self._source, self._tokens = folder, source, tokens
        self._names, self._two_sided = names, two_sided
        wanted = {
            "weights": weights,
            "calibration": digest([("tokens", tokens)]),
            "compute_dtype": str(source.compute_dtype),
            "seed": seed,
        }
        if (folder / WHOLE).exists():
            found = read_json(folder / WHOLE)
            different = [key for key in wanted if found.get(key) != wanted[key]]
            layers = found.get("layers")
            if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
                raise ValueError(f"{folder / WHOLE} is damaged: {AGAIN}")
            missing = set(names) - set(layers)
            if different or missing or (two_sided and not found.get("two_sided")):
                what = f"other {', '.join(different)}" if different else "fewer layers, or their token weights alone"
                raise ValueError(
                    f"{folder} holds Hessians of {what}: give the model, calibration and seed of then, or a new folder"
                )
            for index in range(len(source.layers)):
                self._check(index)
            return
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, self._bytes(), "give --resume, or begin again with --hessians on another disk")
        self._measure(batch, seed)
        write_json(folder / WHOLE, {**wanted, "two_sided": two_sided, "layers": sorted(names)})

    def of(self, index: int, names: Collection[str]) -> dict[str, Sensitivity]:
        """Those of decoder layer `index`: the linear layers among `names` that read one vector per token.

        Raises:
            ValueError: a number is no number, or a token weight is below zero.
        """
        tensors = read_shard(self._file(index))
        found = {name: Sensitivity.of(tensors, name) for name in names if f"{name}.weights" in tensors}
        for name, one in found.items():
            numbers = [one.weights, torch.tensor(one.energy), *([] if one.outputs is None else [one.outputs])]
            whole = all(bool(part.isfinite().all()) for part in numbers)
            if not whole or one.energy < 0 or bool((one.weights < 0).any()):
                raise ValueError(f"{self._file(index)} has numbers of {name} that are damaged: {AGAIN}")
        return found

    def _check(self, index: int) -> None:
        """Raises ValueError unless a layer's file has tensors of the sizes of the layer; reads its header."""
        source, tokens = self._source, self._tokens.numel()
        with open_shard(self._file(index)) as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        for name in set(source.linears(index)) & set(self._names):
            n = source.reader.shapes[f"{name}.weight"][0]
            wanted: dict[str, list[tuple[int, ...]]] = {"weights": [(tokens,), (0,)], "energy": [()]}
            wanted["outputs"] = [(n, n)]
            found = {leaf: shapes[f"{name}.{leaf}"] for leaf in wanted if f"{name}.{leaf}" in shapes}
            complete = not found or {"weights", "energy"} <= set(found)
            if not complete or any(shape not in wanted[leaf] for leaf, shape in found.items()):
                raise ValueError(f"{self._file(index)} has {found} of {name}, which is damaged: {AGAIN}")

    def _bytes(self) -> int:
        """What the layers' inputs and all that the pass makes of them take on the disk."""
        source = self._source
        width = source.model.get_input_embeddings().weight.shape[1]
        wanted = self._tokens.numel() * (
            width * source.compute_dtype.itemsize * len(source.layers) + 4 * len(self._names)
        )
        if self._two_sided:
            wanted += sum(4 * source.reader.shapes[f"{name}.weight"][0] ** 2 for name in self._names)
        return int(wanted)

    def _measure(self, batch: int, seed: int) -> None:
        source, inputs = self._source, self._folder / "inputs"
        backward = Forward(source, self._tokens, batch, inputs).backward(sampled_score(seed))
        for index, _, steps in tqdm(backward, total=len(source.layers), desc="backward", unit="layer"):
            linears = {name: module for name, module in source.linears(index).items() if name in self._names}
            collector = OutputCollector(linears, self._two_sided)
            for _ in steps:
                pass
            found = collector.close()
            tensors: dict[str, Tensor] = {}
            experts = {name for mixture in source.mixtures(index) for name in mixture.linears}
            for name, sensitivity in found.items():
                if name in experts:
                    share = len(sensitivity.weights) / self._tokens.numel()
                    tensors |= Sensitivity(torch.ones(0), sensitivity.energy * share, sensitivity.outputs).tensors(name)
                elif len(sensitivity.weights) == self._tokens.numel():
                    tensors |= sensitivity.tensors(name)
                else:
                    _LOG.warning("%s does not read one vector per token: its tokens count the same", name)
            write_shard(self._file(index), tensors)
        inputs.rmdir()

    def _file(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.safetensors"
