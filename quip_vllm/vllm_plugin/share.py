# SPDX-License-Identifier: Apache-2.0
"""How a served layer is cut: into parts, and over tensor-parallel ranks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.config import CheckpointConfig, Embedding, LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import Follows, TensorSpec, tensor_specs
from quip_vllm.transforms.hadamard import block_size

QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Part:
    """One part of a served layer, or a slice of it, and this rank's share of its outputs and inputs.

    Attributes:
        name: its name on disk.
        stored: code and bits; None for an ordinary weight.
        outputs: how many outputs it has on disk.
        start: the first of them that this rank holds.
        held: how many of them this rank holds.
        size: outputs on this rank in vLLM; those beyond `held`, of a padded vocabulary, are zero.
        inputs: how many inputs it has on disk.
        in_start: the first of them that this rank holds.
        in_features: how many of them this rank holds.
        of: the number of the part in the served layer.
        slice: the number of the slice in the part.
        x_start: where the inputs of the slice begin among those of the served layer on this rank.
    """

    name: str
    stored: LayerFormat | None
    outputs: int
    start: int
    held: int
    size: int
    inputs: int
    in_start: int
    in_features: int
    of: int = 0
    slice: int = 0
    x_start: int = 0

    def cut(self, slices: Sequence[tuple[str, LayerFormat, tuple[int, int]]], inner: bool) -> "Iterator[Part]":
        """Yields the slices of which this rank holds any.

        Args:
            slices: name, format, and [n, k] on disk of each.
            inner: whether they have the part's inputs, and their products are summed, or its outputs.

        Raises:
            ValueError: they do not make up the part.
        """
        shapes = [shape for _, _, shape in slices]
        sizes, across = [shape[inner] for shape in shapes], {shape[not inner] for shape in shapes}
        whole = (self.outputs, self.inputs)
        if sum(sizes) != whole[inner] or across != {whole[not inner]}:
            raise ValueError(
                f"{self.name} is stored in slices of {shapes} outputs and inputs, which do not make up {whole}: the "
                "files are damaged, or config.json belongs to another checkpoint"
            )
        first, count = (self.in_start, self.in_features) if inner else (self.start, self.held)
        begin = 0
        for i, (name, stored, (n, k)) in enumerate(slices):
            low, high = max(first, begin), min(first + count, begin + sizes[i])
            own, start, held = replace(self, name=name, stored=stored, slice=i), low - begin, high - low
            begin += sizes[i]
            if held > 0 and inner:
                yield replace(own, inputs=k, in_start=start, in_features=held, x_start=low - first)
            elif held > 0:
                yield replace(own, outputs=n, start=start, held=held, size=held)


@dataclass(frozen=True)
class Share:
    """What one tensor-parallel rank holds of a served layer.

    Attributes:
        prefix: the layer's name, for messages.
        parts: in the order of their outputs.
        hadamard_block: of the checkpoint.
        rotate_output: False for an output head or an embedding.

    Raises:
        ValueError: the rank's share begins or ends within what is padded together.
    """

    prefix: str
    parts: tuple[Part, ...]
    hadamard_block: int | None
    rotate_output: bool = True

    def __post_init__(self) -> None:
        cut = [part.size for part in self.parts if part.held < part.outputs]
        cut += {part.in_features for part in self.parts if part.in_features < part.inputs}
        if any(size != self.stored(size) for size in cut):
            raise ValueError(
                f"{self.prefix} in tensor-parallel shares of {' + '.join(map(str, cut))}: this checkpoint is cut at "
                f"multiples of {self.stored(1)}; serve with fewer ranks"
            )

    def stored(self, size: int) -> int:
        """A size as the checkpoint stores it, padding included."""
        return size + -size % max(part.stored.padded_to for part in self.parts if part.stored)

    def on_disk(self, covered: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs that a tensor covers, as stored."""
        inputs = self.parts[covered[0]].inputs
        outputs = sum(self.parts[i].outputs for i in covered)
        stored = self.parts[covered[0]].stored
        assert stored is not None  # there is no such tensor of an ordinary weight
        spec = stored.spec(inputs, (outputs,), self.hadamard_block, self.rotate_output)
        return sum(spec.stored_outputs), spec.stored_in

    def rows(self, covered: tuple[int, ...]) -> int:
        """Outputs of this rank's share of a tensor that covers some parts, as stored."""
        return sum(self.spec(covered).stored_outputs)

    def filled(self, covered: tuple[int, ...]) -> bool:
        """Whether a tensor that covers some parts is filled up as a whole, because its outputs have no transform.

        Raises:
            ValueError: other parts of the layer follow it.
        """
        filled = self.rows(covered) > sum(self.stored(self.parts[i].size) for i in covered)
        if filled and len(covered) not in (1, len(self.parts)):
            raise ValueError(
                f"{self.label(covered)} is filled up to {self.rows(covered)} outputs, and vLLM has it as one of "
                "several of a layer: requantize with it among --ignore"
            )
        return filled

    def spec(self, covered: tuple[int, ...]) -> LinearSpec:
        """This rank's share of a tensor that covers some parts of equal format; they have one output rotation."""
        first, size = self.parts[covered[0]], sum(self.parts[i].size for i in covered)
        assert first.stored is not None  # there is no such tensor of an ordinary weight
        own = first.stored._replace(
            input_chunks=_kept(first.stored.input_chunks, first.in_features, first.inputs),
            output_chunks=_kept(first.stored.output_chunks, size, sum(self.parts[i].outputs for i in covered)),
        )
        return own.spec(first.in_features, (size,), self.hadamard_block, self.rotate_output)

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

    def cut(self, one: TensorSpec, loaded: Tensor, part: Part, start: int, count: int) -> Tensor:
        """This rank's inputs of a part, and outputs ``start`` to ``start + count``, of a tensor on disk: a view."""
        if one.follows is Follows.PART:
            return loaded
        if one.follows is not Follows.INPUTS:
            first, end = start // one.outputs_per_row, -(-(start + count) // one.outputs_per_row)
            loaded = loaded[first:end]
        if one.follows is not Follows.OUTPUTS:
            columns = one.columns_per_input
            loaded = loaded.narrow(-1, int(part.in_start * columns), int(self.stored(part.in_features) * columns))
        return loaded

    def check_sizes(self, ranks: int) -> None:
        """Raises ValueError unless a share over `ranks` of a linear layer is whole tiles and whole Hadamard blocks."""
        for i, part in enumerate(self.parts):
            try:
                self.spec((i,)).check_sizes()
            except ValueError as error:
                raise ValueError(f"{self.prefix}, on each of {ranks} tensor-parallel ranks: {error}") from error
            if self.hadamard_block is None:
                # The blockwise case is checked when a tensor arrives and shows which parts it covers.
                self.check_split((i,))
            if part.in_features < part.inputs and part.stored is not None:
                full, chunks = [self.stored(part.inputs)], part.stored.input_chunks
                check_split(self.prefix, "input", [part.in_features], full, self.hadamard_block, chunks)

    def check_split(self, covered: tuple[int, ...]) -> None:
        """Raises ValueError if a tensor that covers some parts cannot be split over the ranks: see `check_split`."""
        local = [self.stored(self.parts[i].size) for i in covered]
        full = [self.stored(self.parts[i].outputs) for i in covered]
        if self.rotate_output and local != full:
            stored = self.parts[covered[0]].stored
            check_split(
                self.label(covered), "output", local, full, self.hadamard_block, stored.output_chunks if stored else 1
            )


def linear_part(
    name: str, stored: LayerFormat | None, size: int, inputs: tuple[int, int], rank: int, ranks: int, replicas: int = 1
) -> Part:
    """What a rank holds of one part of a linear layer.

    Args:
        name: on disk.
        stored: code and bits; None for an ordinary weight.
        size: its outputs on each rank.
        inputs: its inputs over all ranks, and on each.
        rank: this one.
        ranks: over how many the outputs are cut: 1 where it is the inputs.
        replicas: how many ranks in a row hold the same outputs: keys and values of fewer heads than ranks.
    """
    start, outputs = (rank // replicas * size, size * ranks // replicas) if ranks > 1 else (0, size)
    full, held = inputs
    own = {"inputs": full, "in_start": rank * held if held < full else 0, "in_features": held}
    return Part(name, stored, outputs, start=start, held=size, size=size, **own)


def quantized(share: Share, checkpoint: CheckpointConfig) -> Share:
    """The same of the parts that are quantized, in the slices that the checkpoint has.

    Raises:
        ValueError: slices do not make up their part; or as `Share`.
    """
    return replace(share, parts=tuple(piece for part in share.parts for piece in _pieces(part, checkpoint)))


def _pieces(part: Part, checkpoint: CheckpointConfig) -> Iterable[Part]:
    """The part itself, its slices if it is stored in some, nothing if it keeps an ordinary weight."""
    if part.stored is None:
        return ()
    layers, shapes = checkpoint.layers, checkpoint.shapes
    names = exl3.slices(layers).get(part.name)
    if names is None:
        return (part,)
    return part.cut([(one, layers[one], shapes.get(one, (0, 0))) for one in names], exl3.cuts_inputs(part.name))


def token_share(
    rows: Embedding, block: int | None, rotated: bool, outputs: int, run: range, size: int, inputs: int
) -> Share:
    """What a rank holds of a head or an embedding.

    Args:
        rows: what the checkpoint says of it.
        block: the checkpoint's hadamard_block.
        rotated: whether it is stored like a linear layer.
        outputs: the vocabulary, without padding.
        run: the tokens of this rank.
        size: the rows of this rank, padding included.
        inputs: of the layer.

    Raises:
        ValueError: the size has no such format, or a tile would cross the edge of a rank's share.
    """
    together = rows.stored.format.outputs_per_row
    if len(run) < outputs and size % together:
        raise ValueError(
            f"{rows.module}: {outputs} rows in tensor-parallel shares of {size}: code {rows.stored.code} needs "
            f"multiples of {together}; serve with fewer ranks, or requantize without {rows.OPTION}"
        )
    own = {"inputs": inputs, "in_start": 0, "in_features": inputs}
    part = Part(rows.module, rows.stored, outputs, start=run.start, held=len(run), size=size, **own)
    share = Share(rows.module, (part,), block, rotated)
    share.spec((0,)).check_sizes()
    return share


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
            f"{' + '.join(map(str, local))}: requantize with --split and the number of ranks, or "
            f"with --hadamard-block {fits}, or serve with --tensor-parallel-size 1"
        )
