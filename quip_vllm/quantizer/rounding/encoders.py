# SPDX-License-Identifier: Apache-2.0
"""The searches behind one interface: a block of columns in, its codes and their values out."""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from quip_vllm.formats import e8p, e8p_residual
from quip_vllm.formats.e8p_residual import Lattice
from quip_vllm.formats.grid import Grid
from quip_vllm.formats.spec import Format, format_of
from quip_vllm.formats.tile import TILE, sequences_to_weight, weight_to_sequences
from quip_vllm.formats.trellis import pack
from quip_vllm.formats.trellis_codes import HYB, PACKED, TABLE, TrellisCode
from quip_vllm.ops import encode_lattice, encode_trellis

# Root mean square of the rotated weight, in units of the lattice, of what HYB's grid was made for, or of the trellis
# code's own rms. LDLQ adds feedback to the weight, so the best is lower than for a Gaussian (1.03 for the lattice);
# these gave the lowest proxy loss on SmolLM2-135M (scripts/research/sweep_scale.py, docs/benchmarks/quality.md).
LATTICE_RMS = {2: 1.0, 3: 0.98, 4: 0.92}
HYB_RMS = {1: 0.9, 2: 0.95, 3: 1.0, 4: 1.05}
TRELLIS_RMS = 0.9
# Where the grid's last level is, in root mean squares of the rotated weight: by the same sweep.
GRID_ENDS = {2: 1.6, 3: 2.05, 4: 2.6, 5: 3.0, 6: 3.3, 7: 3.6, 8: 3.9}

NUMBERS = "numbers"
"""Codes of the grid until they are packed: uint8, the number of each weight's level."""


class Encoder(Protocol):
    """One search.

    Attributes:
        columns: columns that are rounded together.
        rows: rows whose codes share a row of the tensors of codes.
        rms: root mean square that the rotated weight should have, in units of the code.
    """

    columns: int
    rows: int
    rms: float

    def encode(self, block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Nearest codes of float32 [n, columns], n a multiple of `rows`.

        Returns:
            (their values, of the same shape; tensors of codes, to be concatenated along dimension 1).
        """

    def stored(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a layer stores of the codes of all its rows, and beside them."""


class LatticeEncoder:
    """E8P, with a second stage at 3 and 4 bits."""

    columns, rows = 8, 1

    def __init__(self, code: Lattice, bits: int):
        self.bits = bits
        self.rms = LATTICE_RMS[bits]

    def encode(self, block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See Encoder."""
        codes = encode_lattice(block)[:, None]
        values = e8p.decode(codes)
        tensors = {"codes": codes}
        if self.bits > 2:
            rest = (block - values) * e8p_residual.RESIDUAL_SCALE[self.bits]
            tensors["residual_codes"] = _nearest_e81b(rest) if self.bits == 3 else encode_lattice(rest)[:, None]
            values = e8p_residual.decode(codes, tensors["residual_codes"], self.bits)
        return values, tensors

    def stored(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Encoder."""
        return codes


def _nearest_e81b(x: Tensor) -> Tensor:
    table = e8p_residual.e81b_table().to(x.device)
    score = x @ table.T - table.square().sum(1) / 2
    return score.argmax(1, keepdim=True).to(torch.uint8)


class TrellisEncoder:
    """Tail-biting Viterbi over 16 x 16 tiles."""

    columns = rows = TILE

    def __init__(self, code: TrellisCode, bits: int):
        self.bits, self.code = bits, code
        self.table = code.table(bits)
        self.values = code.values(self.table).T.contiguous().T  # in the order in which the search reads them
        self._there: dict[torch.device, Tensor] = {}  # the same where blocks are
        self.rms = (HYB_RMS[bits] if code is HYB else TRELLIS_RMS) * code_rms(code, self.values)

    def encode(self, block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See Encoder."""
        sequences = weight_to_sequences(block).squeeze(1)
        if block.device not in self._there:
            self._there[block.device] = self.values.to(block.device)
        table = self._there[block.device]
        states = encode_trellis(sequences, table, self.bits)
        values = table[states.long()].flatten(1)
        packed = pack(states, self.bits, self.code.vector_dim)
        return sequences_to_weight(values[:, None]), {PACKED: packed}

    def stored(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Encoder."""
        return codes if self.table is None else {**codes, TABLE: self.table.clone()}  # a file holds no tensor twice


class GridEncoder:
    """The nearest level of each weight, which is alone: no other weight's error is in its own code."""

    columns = rows = 1

    def __init__(self, code: Grid, bits: int):
        self.bits, self.code = bits, code
        self.last = (1 << bits) - 1
        self.rms = self.last / GRID_ENDS[bits]

    def encode(self, block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See Encoder."""
        numbers = ((block + self.last) / 2).round().clamp_(0, self.last)
        return self.values(numbers), {NUMBERS: numbers.to(torch.uint8)}

    def values(self, numbers: Tensor) -> Tensor:
        """The levels of their numbers, or what lies between two."""
        return 2.0 * numbers - self.last

    def stored(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Encoder."""
        numbers = codes[NUMBERS]
        return {PACKED: self.code.pack(pad(numbers, (0, 0, 0, -len(numbers) % TILE)), self.bits)}


def code_rms(code: TrellisCode, values: Tensor) -> float:
    """Root mean square of the weights that a code's values [65536, V] are made for: HYB's grids 1, else their own."""
    return 1.0 if code is HYB else float(values.square().mean().sqrt())


ENCODERS: dict[type[Format], Callable[[Any, int], Encoder]] = {
    Lattice: LatticeEncoder,
    TrellisCode: TrellisEncoder,
    Grid: GridEncoder,
}
"""The encoder of each kind of format, made from the format and its bits."""


@cache
def make_encoder(code: str, bits: int) -> Encoder:
    """The encoder of a code and its bits; one for all layers."""
    format = format_of(code)
    return ENCODERS[type(format)](format, bits)
