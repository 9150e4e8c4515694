# SPDX-License-Identifier: Apache-2.0
"""The tensors of a quantized layer: what each follows, hence its shape, its parts and how it is checked.

A layer holds one or more *parts* (q, k and v of a fused qkv) that read the same activation. Its tensors are those of
its parts, one below the other along dimension 0; only `su`, which all parts share, stands there once. So a layer of
one part has exactly the tensors of the file, and a part of a layer is a run of rows of each tensor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quip_vllm.formats.spec import LinearSpec

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Follows(enum.Enum):
    """What cuts a tensor: who splits a layer by outputs or inputs, or takes one part of it, has to know."""

    OUTPUTS = "outputs"
    """One element per output: [n]."""
    INPUTS = "inputs"
    """One element per input: [k], shared by all parts."""
    BOTH = "both"
    """Rows follow the outputs, columns the inputs."""
    PART = "part"
    """A fixed shape per part."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a format.

    Attributes:
        name: its name in the file, behind the module's name and a dot.
        follows: what its shape follows.
        dtypes: allowed dtypes; the quantizer writes the first.
        outputs_per_row: with BOTH, how many outputs share a row.
        columns_per_input: with BOTH, how many columns one input has.
        part_shape: with PART, the shape of one part's tensor.
    """

    name: str
    follows: Follows
    dtypes: tuple[torch.dtype, ...]
    outputs_per_row: int = 1
    columns_per_input: Fraction = Fraction(1)
    part_shape: tuple[int, ...] = ()

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """The shape of the tensor of one part with n outputs and k inputs, as stored."""
        if self.follows is Follows.OUTPUTS:
            return (n,)
        if self.follows is Follows.INPUTS:
            return (k,)
        if self.follows is Follows.PART:
            return self.part_shape
        return (-(-n // self.outputs_per_row), int(k * self.columns_per_input))


SU = TensorSpec("su", Follows.INPUTS, FLOATS)
"""The input vector: signs, or any real numbers."""
SV = TensorSpec("sv", Follows.OUTPUTS, FLOATS)
"""The output vector: signs times scales, or any real numbers."""


@dataclass(frozen=True)
class Stored:
    """Shape and allowed dtypes of a tensor of a layer."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def tensor_specs(spec: LinearSpec) -> tuple[TensorSpec, ...]:
    """Every tensor of a layer of this format; the vectors in the layer's own dtype."""
    dtypes = (spec.vector_dtype, *(dtype for dtype in FLOATS if dtype is not spec.vector_dtype))
    return (*spec.format.tensors(spec.bits), replace(SU, dtypes=dtypes), replace(SV, dtypes=dtypes))


def layout(spec: LinearSpec) -> dict[str, Stored]:
    """Tensor name -> shape and dtypes of a layer.

    Raises:
        ValueError: the sizes do not fit the format; the remedy is to leave the layer unquantized.
    """
    spec.check_sizes()
    found = {}
    for one in tensor_specs(spec):
        shapes = [one.shape(n, spec.stored_in) for n in spec.stored_outputs]
        if one.follows is Follows.INPUTS:
            shapes = shapes[:1]
        found[one.name] = Stored((sum(shape[0] for shape in shapes), *shapes[0][1:]), one.dtypes)
    return found


def check(spec: LinearSpec, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless `tensors` is what `layout` says, and its floats are finite."""
    wanted = layout(spec)
    if set(tensors) != set(wanted):
        raise ValueError(f"a layer of code {spec.code} has tensors {sorted(tensors)}: {sorted(wanted)} are wanted")
    for name, stored in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != stored.shape or found.dtype not in stored.dtypes:
            kinds = " or ".join(str(dtype) for dtype in stored.dtypes)
            raise ValueError(
                f"{name} is {found.dtype} {tuple(found.shape)}: {kinds} {stored.shape} is wanted; the file is damaged "
                "or its config.json belongs to another checkpoint"
            )
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise ValueError(
                f"{name} holds a NaN or an infinity: the checkpoint is damaged; fetch or quantize it again"
            )


def split(spec: LinearSpec, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each part of a layer, in order: views of the layer's tensors."""
    parts: list[dict[str, Tensor]] = [{} for _ in spec.output_sizes]
    for one in tensor_specs(spec):
        if one.follows is Follows.INPUTS:
            pieces: list[Tensor] = [tensors[one.name]] * len(parts)
        else:
            rows = [one.shape(n, spec.stored_in)[0] for n in spec.stored_outputs]
            pieces = list(tensors[one.name].split(rows))
        for part, piece in zip(parts, pieces, strict=True):
            part[one.name] = piece
    return parts


def stack(spec: LinearSpec, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `split`: the layer's tensors from those of its parts.

    Raises:
        ValueError: the parts do not share `su`.
    """
    tensors = {}
    for one in tensor_specs(spec):
        pieces = [part[one.name] for part in parts]
        if one.follows is Follows.INPUTS:
            if not all(torch.equal(pieces[0], piece) for piece in pieces):
                raise ValueError(f"{one.name} differs between parts that have to share it: requantize the model")
            tensors[one.name] = pieces[0]
        else:
            tensors[one.name] = torch.cat(pieces)
    return tensors
