# SPDX-License-Identifier: Apache-2.0
"""Loading the checkpoint's tensors: which rows and columns of each belong to this tensor-parallel rank.

A vLLM linear layer has one or more shards (q, k and v of qkv_proj). A tensor of the checkpoint covers one shard, or
several when the model itself fuses them (Phi-3); which, is known when it arrives. Rows follow the outputs, columns the
inputs, so every rank's part is a slice of dimension 0 or 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import Stored, layout
from quip_vllm.transforms.hadamard import block_size

QKV_SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Sharding:
    """How one vLLM linear layer is cut: into shards, and over tensor-parallel ranks.

    Attributes:
        prefix: the layer's name in vLLM.
        names: the name on disk of each shard, for messages.
        hadamard_block: of the checkpoint.
        formats: code and bits of each shard; the code is the same for all.
        in_features: inputs on this rank.
        output_sizes: outputs of each shard on this rank.
        in_parts, out_parts: over how many ranks inputs and outputs are split; 1 where they are not.
        replicas: for each shard, how many consecutive ranks hold the same outputs (more than 1 where tensor-parallel
            ranks outnumber key-value heads).
    """

    prefix: str
    names: tuple[str, ...]
    hadamard_block: int | None
    formats: tuple[LayerFormat, ...]
    in_features: int
    output_sizes: tuple[int, ...]
    in_parts: int
    out_parts: int
    replicas: tuple[int, ...]

    def tensor_types(self, stored: LayerFormat, n: int, k: int) -> dict[str, Stored]:
        """Shape and dtypes of each tensor on disk of a linear layer (n, k) in this format, bias aside."""
        return layout(LinearSpec(*stored, k, (n,)))

    def full_size(self, shard: int) -> int:
        """Outputs of a shard over all ranks, as stored on disk."""
        return self.output_sizes[shard] * self.out_parts // self.replicas[shard]

    def label(self, shards: Iterable[int]) -> str:
        """Names on disk of some shards."""
        return ", ".join(dict.fromkeys(self.names[shard] for shard in shards))

    def shards(self, shard_id: object) -> tuple[int, ...]:
        """The shards meant by vLLM's shard id: None for all, an index, several, or one of q, k and v."""
        count = len(self.output_sizes)
        if shard_id is None:
            return tuple(range(count))
        ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        shards = tuple(QKV_SHARDS.get(i, i) if isinstance(i, str) else i for i in ids)
        if not shards or not all(type(i) is int and 0 <= i < count for i in shards):
            raise ValueError(
                f"{self.prefix}: shard id {shard_id!r} for a layer of {count} shards: it has to be q, k, v or an index "
                "below that; this model needs support in quip_vllm, list the layer in modules_to_not_convert"
            )
        return shards

    def check_output_split(self, shards: tuple[int, ...]) -> None:
        """Raises ValueError if a projection that covers ``shards`` cannot be split over the ranks (see check_split)."""
        if self.out_parts > 1:
            local = [self.output_sizes[shard] for shard in shards]
            full = [self.full_size(shard) for shard in shards]
            check_split(self.label(shards), "output", local, full, self.hadamard_block)


def check_split(name: str, side: str, local: Sequence[int], full: Sequence[int], block: int | None) -> None:
    """Checks that no Hadamard block crosses the edge of a tensor-parallel shard.

    Args:
        name: the layer, for the message.
        side: "input" or "output", for the message.
        local: sizes on this rank of the pieces that are rotated together.
        full: their sizes over all ranks.
        block: the checkpoint's hadamard_block.

    Raises:
        ValueError: a block does cross, or the rank's part would be rotated in blocks of another size.
    """
    size = block_size(sum(full), block)
    if any(piece % size for piece in (*local, *full)) or block_size(sum(local), block) != size:
        fits = min(piece & -piece for piece in local)
        kind = "rotated as a whole" if block is None else f"rotated in blocks of {size}"
        raise ValueError(
            f"{name}: {side} of size {sum(full)} is {kind}, which cannot be split into tensor-parallel shards of "
            f"{' + '.join(map(str, local))}: requantize with --hadamard-block {fits}, or serve with "
            "--tensor-parallel-size 1"
        )


def load_parameter(param: "QuipParameter", loaded_weight: Tensor, loaded_shard_id: object = None) -> None:
    """The ``weight_loader`` of every parameter here, whatever the vLLM layer's own loader is.

    vLLM's loaders assert on shapes, cut tensors that are fused on disk without knowing rotations, and ReplicatedLinear
    does not call the parameter at all.

    Args:
        param: the parameter to fill.
        loaded_weight: the checkpoint's tensor, over all ranks.
        loaded_shard_id: vLLM's shard id; None for a layer of one shard and for a tensor that covers all of them.

    Raises:
        ValueError: the tensor is not what the layer has to have; the message names layer, tensor and both shapes.
    """
    param.load_shards(loaded_weight, param.sharding.shards(loaded_shard_id))


class QuipParameter(BasevLLMParameter):
    """One tensor of a quantized linear layer, in checkpoint order.

    Attributes:
        tensor_name: its name on disk.
        sharding: how its layer is cut.
        loaded: the shards that each tensor loaded so far covered. Replaced and never changed in place: vLLM keeps
            copies of a parameter's attributes from before loading, for reloading.
    """

    def __init__(self, data: Tensor, name: str, sharding: Sharding) -> None:
        super().__init__(data=data, weight_loader=load_parameter)
        self.tensor_name = name
        self.sharding = sharding
        self.loaded: frozenset[tuple[int, ...]] = frozenset()

    def load_shards(self, loaded: Tensor, shards: tuple[int, ...]) -> None:
        """Copies this rank's part of a tensor that covers ``shards``. Overridden; this part checks it.

        Raises:
            ValueError: see load_parameter.
        """
        sharding = self.sharding
        label = sharding.label(shards)
        formats = {sharding.formats[shard] for shard in shards}
        if len(formats) > 1:
            raise ValueError(
                f"{label} is one tensor in the checkpoint but has {sorted(one.bits for one in formats)} bits: give it "
                "one rate"
            )
        n = sum(map(sharding.full_size, shards))
        types = sharding.tensor_types(formats.pop(), n, sharding.in_features * sharding.in_parts)
        wanted = types.get(self.tensor_name)
        shape, dtype = (None, None) if wanted is None else (wanted.shape, wanted.dtypes[0])
        if tuple(loaded.shape) != shape or loaded.dtype != dtype:
            expected = "none" if shape is None else f"{dtype} {list(shape)}"
            raise ValueError(
                f"{label}: tensor {self.tensor_name} is {loaded.dtype} {list(loaded.shape)}, expected {expected}: the "
                "checkpoint is damaged or does not belong to its config.json; copy it again or requantize"
            )
        self.loaded |= {shards}

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        load_parameter(self, loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        load_parameter(self, loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: object) -> None:
        load_parameter(self, loaded_weight, kwargs.get("shard_id"))

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: object) -> None:
        load_parameter(self, loaded_weight, kwargs.get("shard_id"))

    def _input_slice(self, loaded: Tensor) -> Tensor:
        """This rank's part of the last dimension, which follows the inputs."""
        if self.sharding.in_parts == 1:
            return loaded
        size = loaded.shape[-1] // self.sharding.in_parts
        return loaded.narrow(-1, self.tp_rank * size, size)


class OutputParameter(QuipParameter):
    """``packed``, ``codes``, ``residual_codes``, ``sv``: rows are outputs, and columns, where it has any, inputs.

    Shards of fewer bits than the widest fill the first columns of their rows.
    """

    def load_shards(self, loaded: Tensor, shards: tuple[int, ...]) -> None:
        sharding = self.sharding
        sharding.check_output_split(shards)
        super().load_shards(loaded, shards)
        if loaded.ndim == 2:
            loaded = self._input_slice(loaded)
        features = sum(map(sharding.full_size, shards)) // loaded.shape[0]  # outputs a row
        source = 0
        for shard in shards:
            rows = sharding.output_sizes[shard] // features
            part = self.tp_rank // sharding.replicas[shard] if sharding.out_parts > 1 else 0
            target = sum(sharding.output_sizes[:shard]) // features
            piece = loaded.narrow(0, source + part * rows, rows)
            destination = self.data.narrow(0, target, rows)
            if loaded.ndim == 2:
                destination = destination.narrow(1, 0, loaded.shape[1])
            destination.copy_(piece)
            source += sharding.full_size(shard) // features


class InputParameter(QuipParameter):
    """``su``: one vector that all shards share, because they read the same activation."""

    def load_shards(self, loaded: Tensor, shards: tuple[int, ...]) -> None:
        first = not self.loaded
        super().load_shards(loaded, shards)
        loaded = self._input_slice(loaded)
        if first:
            self.data.copy_(loaded)
        elif not torch.equal(self.data, loaded.to(self.data.device)):
            raise ValueError(
                f"{self.sharding.label(shards)}: su differs from that of the other projections fused in "
                f"{self.sharding.prefix}, which have to share one input rotation; requantize the model"
            )


class TableParameter(QuipParameter):
    """A table per part, [shards * 512, 2]. One that covers several shards is kept at the first."""

    def load_shards(self, loaded: Tensor, shards: tuple[int, ...]) -> None:
        super().load_shards(loaded, shards)
        self.data.narrow(0, shards[0] * loaded.shape[0], loaded.shape[0]).copy_(loaded)
