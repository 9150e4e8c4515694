# SPDX-License-Identifier: Apache-2.0
"""The description of a quantized linear layer, which every backend reads."""

from dataclasses import dataclass

from quip_vllm.formats.methods import Code, Method


@dataclass(frozen=True)
class LinearSpec:
    """A quantized linear layer, or several that read the same activation through one shared ``su``.

    Attributes:
        method, code, bits: the format (code is None for quip_sharp).
        in_features: k, the length of a row of x.
        output_sizes: n of each fused projection, in order; each has an output rotation of its own.
        hadamard_block: None for full width, else the largest block of the blockwise rotation.
        rotate_output: False for an output head or an embedding, whose rows are looked up one by one: U_n is the
            identity. n may then be any number; qtip stores whole tiles, with unused rows in the last.
    """

    method: Method
    code: Code | None
    bits: int
    in_features: int
    output_sizes: tuple[int, ...]
    hadamard_block: int | None = None
    rotate_output: bool = True

    @property
    def code_name(self) -> str:
        """The code's name: the lattice has one, too."""
        return self.code.value if self.code else "e8p"

    @property
    def out_features(self) -> int:
        """n, over all fused projections."""
        return sum(self.output_sizes)
