# SPDX-License-Identifier: Apache-2.0
"""What a format is, the registry of all formats, and the description of a quantized layer that every backend reads."""

import abc
import enum
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from quip_vllm.formats.tensors import TensorSpec
from quip_vllm.transforms.hadamard import filled


class TileOrder(enum.Enum):
    """The order in which the weights of a 16 x 16 tile form a trellis sequence (drawn in formats/tile.py)."""

    MMA = "mma"
    """Ours, and that of published QTIP checkpoints with code hyb."""
    MMA_SWAPPED = "mma_swapped"
    """EXL3: the two quarters off the diagonal change places."""
    ROW_MAJOR = "row_major"
    """Published QTIP checkpoints with the other codes."""


class Format(abc.ABC):
    """One way to store weights: everything that is not speed.

    Attributes:
        name: the code's name; `code` in config.json.
        method: the family; `quant_method` in config.json, under which vLLM knows the format.
        bits: allowed code bits per weight, ascending.
        multiple_in, multiple_out: inputs and outputs of a layer have to be multiples of these.
        kernel_orders: the orders of a tile that every backend's kernels decode; the reference has all.
        quantized: whether the quantizer writes it; other formats are of checkpoints that other programs have made.
    """

    name: str
    method: str
    bits: tuple[int, ...]
    multiple_in: int
    multiple_out: int
    kernel_orders: tuple[TileOrder, ...] = (TileOrder.MMA,)
    quantized: bool = True

    @abc.abstractmethod
    def tensors(self, bits: int) -> tuple[TensorSpec, ...]:
        """The tensors that hold codes and tables; every layer has `su` and `sv` besides."""

    @abc.abstractmethod
    def decode(self, tensors: dict[str, Tensor], bits: int, tile_order: TileOrder) -> Tensor:
        """The rotated weight of one part, float32 [n, k]: codes to values, nothing else.

        n is a multiple of what shares a row of codes; `LinearSpec` cuts what is too much.
        """

    @property
    def outputs_per_row(self) -> int:
        """How many outputs share a row of codes: a weight of other sizes has unused ones in its last row."""
        return max(one.outputs_per_row for one in self.tensors(self.bits[0]))

    def check_bits(self, bits: object) -> None:
        """Raises ValueError unless the format has `bits` bits per weight."""
        if type(bits) is not int or bits not in self.bits:
            rates = ", ".join(map(str, self.bits))
            raise ValueError(
                f"bits is {bits!r:.100}: {self.method} with code {self.name} has {rates}; choose one of them"
            )


FORMATS: dict[str, Format] = {}
"""Every format by its code's name, in the order in which they are listed to a user."""


def register(format: Format) -> None:
    """Adds a format to FORMATS; the module that defines it calls this when it is imported."""
    FORMATS[format.name] = format


def format_of(code: object) -> Format:
    """The format of a code's name. Raises ValueError for a name that there is not."""
    if not isinstance(code, str) or code not in FORMATS:
        raise ValueError(f"code is {code!r:.100}: it must be one of {', '.join(FORMATS)}")
    return FORMATS[code]


def methods() -> dict[str, list[Format]]:
    """Method -> its formats, in the order of FORMATS."""
    found: dict[str, list[Format]] = {}
    for one in FORMATS.values():
        found.setdefault(one.method, []).append(one)
    return found


@dataclass(frozen=True)
class LinearSpec:
    """A quantized linear layer of one or more parts that read the same activation.

    Attributes:
        code: the format's name in FORMATS.
        bits: code bits per weight.
        in_features: k, the length of a row of x.
        output_sizes: n of each part, in the order of its rows in the tensors.
        hadamard_block: None for full width, else the largest block of the blockwise rotation.
        rotate_output: False for an output head or an embedding, whose rows are looked up one by one: U_n is the
            identity. n may then be any number, and the last row of codes may be used in part.
        tile_order: of a trellis code.
        input_chunks, output_chunks: full-width rotations act on this many equal chunks of the inputs, or of each
            part's outputs, one by one (as checkpoints made for that many tensor-parallel ranks have it).
        vector_dtype: dtype of `su` and `sv` as stored.
        padded_to: stored sizes are the next multiples of this; inputs are filled up with zeros, outputs cut.
    """

    code: str
    bits: int
    in_features: int
    output_sizes: tuple[int, ...]
    hadamard_block: int | None = None
    rotate_output: bool = True
    tile_order: TileOrder = field(default=TileOrder.MMA, kw_only=True)
    input_chunks: int = field(default=1, kw_only=True)
    output_chunks: int = field(default=1, kw_only=True)
    vector_dtype: torch.dtype = field(default=torch.float16, kw_only=True)
    padded_to: int = field(default=1, kw_only=True)

    @property
    def format(self) -> Format:
        """The format. Raises ValueError for a code that there is not."""
        return format_of(self.code)

    @property
    def out_features(self) -> int:
        """n, over all parts."""
        return sum(self.output_sizes)

    @property
    def chunks(self) -> tuple[int, int]:
        """Those of the outputs and of the inputs."""
        return self.output_chunks, self.input_chunks

    @property
    def stored_in(self) -> int:
        """k as stored, padding included."""
        return self.in_features + -self.in_features % self.padded_to

    @cached_property
    def stored_outputs(self) -> tuple[int, ...]:
        """n of each part as stored, padding included.

        Outputs that have no full-width transform are filled up until they have one (`hadamard.filled`).
        """
        sizes = tuple(n + -n % self.padded_to for n in self.output_sizes)
        whole = self.rotate_output and self.hadamard_block is None and self.output_chunks == 1
        return tuple(map(filled, sizes)) if whole else sizes

    @property
    def padded(self) -> bool:
        """Whether stored sizes are larger than those that the layer has."""
        return (self.stored_in, self.stored_outputs) != (self.in_features, self.output_sizes)

    def check_sizes(self) -> None:
        """Raises ValueError unless the format can hold a layer of these sizes."""
        format = self.format
        format.check_bits(self.bits)
        if not self.rotate_output and len(self.output_sizes) > 1:
            raise ValueError(f"outputs {self.output_sizes} without a rotation are not fused: give one size per layer")
        for size, chunks in (
            (self.stored_in, self.input_chunks),
            *((n, self.output_chunks) for n in self.stored_outputs),
        ):
            if size % chunks:
                raise ValueError(f"size {size} cannot be rotated in {chunks} equal chunks: the checkpoint is damaged")
        multiple_out = format.multiple_out if self.rotate_output else 1
        if self.stored_in % format.multiple_in or any(n % multiple_out for n in self.stored_outputs):
            raise ValueError(
                f"a layer of {self.in_features} inputs and {self.output_sizes} outputs: code {self.code} needs "
                f"multiples of {format.multiple_in} and {multiple_out}; leave it unquantized (--ignore)"
            )

    def beyond_kernels(self, orders: tuple[TileOrder, ...] = ()) -> str | None:
        """The first property of the layer that kernels do not have, but for more `orders` of a tile; None if they do.

        As a clause. The reference backend has all.
        """
        alone = len(self.output_sizes) == 1 and self.rotate_output
        properties = {
            f"tile order {self.tile_order.value}": self.tile_order not in (*self.format.kernel_orders, *orders),
            "parts, or rows to look up, whose sizes are padded": self.padded and not alone,
        }
        return next((clause for clause, present in properties.items() if present), None)
