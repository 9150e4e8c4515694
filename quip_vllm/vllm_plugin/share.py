# SPDX-License-Identifier: Apache-2.0
"""How a served layer is cut: into parts, and over tensor-parallel ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import Follows, TensorSpec, tensor_specs
from quip_vllm.transforms.hadamard import block_size

QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Part:
    """One part of a served layer, and this rank's share of its outputs.

    Attributes:
        name: its name on disk.
        stored: code and bits.
        outputs: how many outputs it has on disk.
        start: the first of them that this rank holds.
        held: how many of them this rank holds.
        size: outputs on this rank in vLLM; those beyond `held`, of a padded vocabulary, are zero.
    """

    name: str
    stored: LayerFormat
    outputs: int
    start: int
    held: int
    size: int


@dataclass(frozen=True)
class Share:
    """What one tensor-parallel rank holds of a served layer.

    Attributes:
        prefix: the layer's name, for messages.
        parts: in the order of their outputs.
        inputs: on disk.
        in_start: the first input that this rank holds.
        in_features: how many inputs this rank holds.
        hadamard_block: of the checkpoint.
        rotate_output: False for an output head or an embedding.

    Raises:
        ValueError: the rank's share begins or ends within what is padded together.
    """

    prefix: str
    parts: tuple[Part, ...]
    inputs: int
    in_start: int
    in_features: int
    hadamard_block: int | None
    rotate_output: bool = True

    def __post_init__(self) -> None:
        cut = [part.size for part in self.parts if part.held < part.outputs]
        cut += [self.in_features] * (self.in_features < self.inputs)
        if any(size != self.stored(size) for size in cut):
            raise ValueError(
                f"{self.prefix} in tensor-parallel shares of {' + '.join(map(str, cut))}: this checkpoint is cut at "
                f"multiples of {self.stored(1)}; serve with fewer ranks"
            )

    def stored(self, size: int) -> int:
        """A size as the checkpoint stores it, padding included."""
        return size + -size % self.parts[0].stored.padded_to

    def on_disk(self, covered: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs that a tensor covers, as stored."""
        return sum(self.stored(self.parts[i].outputs) for i in covered), self.stored(self.inputs)

    def spec(self, covered: tuple[int, ...]) -> LinearSpec:
        """This rank's share of a tensor that covers some parts of equal format; they have one output rotation."""
        stored, size = self.parts[covered[0]].stored, sum(self.parts[i].size for i in covered)
        own = stored._replace(
            input_chunks=_kept(stored.input_chunks, self.in_features, self.inputs),
            output_chunks=_kept(stored.output_chunks, size, sum(self.parts[i].outputs for i in covered)),
        )
        return own.spec(self.in_features, (size,), self.hadamard_block, self.rotate_output)

    def tensor(self, part: int, name: str) -> TensorSpec | None:
        """The tensor of a part, or None if its format has none of this name."""
        return next((one for one in tensor_specs(self.spec((part,))) if one.name == name), None)

    def label(self, parts: Iterable[int]) -> str:
        """Names on disk of some parts."""
        return ", ".join(dict.fromkeys(self.parts[i].name for i in parts))

    def covered(self, shard_id: object) -> tuple[int, ...]:
        """The parts meant by vLLM's shard id: None for all, an index, several, or one of q, k and v.

        Raises:
            ValueError: it means no part of this layer.
        """
        count = len(self.parts)
        if shard_id is None:
            return tuple(range(count))
        ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        parts = tuple(QKV.get(i, -1) if isinstance(i, str) else i for i in ids)
        if not parts or not all(type(i) is int and 0 <= i < count for i in parts):
            raise ValueError(
                f"{self.prefix}: shard id {shard_id!r} for a layer of {count} parts: it has to be q, k, v or an index "
                "below that; this model needs support in quip_vllm, list the layer in modules_to_not_convert"
            )
        return parts

    def cut(self, one: TensorSpec, loaded: Tensor, start: int, count: int) -> Tensor:
        """This rank's inputs of outputs ``start`` to ``start + count`` of a tensor on disk: a view."""
        if one.follows is Follows.PART:
            return loaded
        if one.follows is not Follows.INPUTS:
            first, end = start // one.outputs_per_row, -(-(start + count) // one.outputs_per_row)
            loaded = loaded[first:end]
        if one.follows is not Follows.OUTPUTS:
            columns = one.columns_per_input
            loaded = loaded.narrow(-1, int(self.in_start * columns), int(self.stored(self.in_features) * columns))
        return loaded

    def check_split(self, covered: tuple[int, ...]) -> None:
        """Raises ValueError if a tensor that covers some parts cannot be split over the ranks: see `check_split`."""
        local = [self.stored(self.parts[i].size) for i in covered]
        full = [self.stored(self.parts[i].outputs) for i in covered]
        if self.rotate_output and local != full:
            chunks = self.parts[covered[0]].stored.output_chunks
            check_split(self.label(covered), "output", local, full, self.hadamard_block, chunks)


def _kept(chunks: int, local: int, full: int) -> int:
    """How many of a side's chunks this rank holds."""
    return max(1, chunks * local // full)


def check_split(
    name: str, side: str, local: Sequence[int], full: Sequence[int], block: int | None, chunks: int = 1
) -> None:
    """Checks that no Hadamard block crosses the edge of a rank's share.

    Args:
        name: the layer, for the message.
        side: "input" or "output", for the message.
        local: sizes on this rank of the pieces that are rotated together.
        full: their sizes over all ranks.
        block: the checkpoint's hadamard_block.
        chunks: how many equal chunks of the full size are rotated one by one.

    Raises:
        ValueError: a block does cross, or the rank's share would be rotated in blocks of another size.
    """
    size, own = block_size(sum(full) // chunks, block), sum(local) // _kept(chunks, sum(local), sum(full))
    if any(piece % size for piece in (*local, *full)) or block_size(own, block) != size:
        fits = min(piece & -piece for piece in local)
        kind = "rotated as a whole" if block is None and chunks == 1 else f"rotated in blocks of {size}"
        raise ValueError(
            f"{name}: {side} of size {sum(full)} is {kind}, which cannot be split into tensor-parallel shares of "
            f"{' + '.join(map(str, local))}: requantize with --hadamard-block {fits}, or serve with "
            "--tensor-parallel-size 1"
        )
