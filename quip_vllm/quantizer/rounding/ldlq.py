# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ: round column blocks from the last to the first, feeding the error back (QuIP#, arXiv 2402.04396, 4.1).

With a Hessian of the outputs the error feeds back along both sides (YAQA, arXiv 2505.22988, section 3.3). Greedy passes
(QuIP, arXiv 2307.13304) go on from there, one column after the other.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quip_vllm.quantizer.rounding.encoders import Encoder
from quip_vllm.quantizer.rounding.ldl import feedback
from quip_vllm.quantizer.settings import GREEDY, LDLQ, NEAREST

BUFFER = 128  # columns whose feedback from the right is computed in one product
BLOCK_ROWS = 64
"""Rows, and BUFFER columns, of a block of tiles in which errors feed along both sides."""
LARGE = 1 << 21
"""Numbers, from which on blocks are made: a diagonal without them reads as many, and they do not stay in a cache."""
PASSES = 10
"""Greedy passes at most."""


@dataclass(frozen=True)
class Rounded:
    """values: float32 [n, k]; codes: tensors of the format, [rows, columns] over the whole weight."""

    values: Tensor
    codes: dict[str, Tensor]


class Ldlq:
    """Rounds any number of weights under one Hessian of the inputs, which is factored once per number of columns.

    Args:
        hessian: float32 [k, k], positive definite.
        rounding: settings.NEAREST feeds nothing back; GREEDY has greedy passes follow; all others are LDLQ.

    Attributes:
        damping_added: what was added to a Hessian's diagonal because it had no factor.
    """

    def __init__(self, hessian: Tensor, rounding: str = LDLQ):
        self._hessian, self._rounding = hessian, rounding
        self.damping_added = 0.0
        self._factors: dict[int, Tensor] = {}

    def round(self, weight: Tensor, encoder: Encoder, outputs: Tensor | None = None) -> Rounded:
        """Rounds W_k + (W - What)_{>k} L_{>k, k} for each block k of ``encoder.columns`` columns, last block first.

        Args:
            weight: float32 [n, k], in units of the code, n a multiple of ``encoder.rows``.
            encoder: the search; its ``columns`` divide k.
            outputs: Hessian of the outputs, float32 [n, n]: errors feed back along the columns, too.
        """
        if encoder.columns not in self._factors:
            self._factors[encoder.columns] = self._factor(self._hessian, encoder.columns)
        factor = self._factors[encoder.columns]
        if outputs is None:
            rounded = block_ldlq(weight, factor, encoder)
            return greedy(weight, self._hessian, rounded, encoder) if self._rounding == GREEDY else rounded
        return two_sided_ldlq(weight, factor, self._factor(outputs, encoder.rows), encoder)

    def _factor(self, hessian: Tensor, block: int) -> Tensor:
        if self._rounding == NEAREST:
            return torch.zeros_like(hessian)
        factor, added = feedback(hessian, block)
        self.damping_added = max(self.damping_added, added)
        return factor


def block_ldlq(weight: Tensor, factor: Tensor, encoder: Encoder) -> Rounded:
    """`Ldlq.round` with the factor L, float32 [k, k], strictly lower block triangular."""
    n, k = weight.shape
    g = encoder.columns
    rounded = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    pieces: list[dict[str, Tensor]] = []
    for end in range(k, 0, -BUFFER):
        begin = max(0, end - BUFFER)
        buffer = weight[:, begin:end] + error[:, end:] @ factor[end:, begin:end]
        for right in range(end, begin, -g):
            left = right - g
            target = buffer[:, left - begin : right - begin] + error[:, right:end] @ factor[right:end, left:right]
            values, codes = encoder.encode(target.contiguous())
            rounded[:, left:right] = values
            error[:, left:right] = weight[:, left:right] - values
            pieces.append(codes)
    pieces.reverse()
    return Rounded(rounded, {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]})


def greedy(weight: Tensor, hessian: Tensor, rounded: Rounded, encoder: Encoder) -> Rounded:
    """Rounds each column again, from the last to the first, given all others, until a pass changes nothing.

    With E = W - What, column j's target is What_j + E H_j / H_jj: what it takes to mend the errors of all the others.
    No step can raise tr(E H E^T), as the encoder finds the best value of each weight.

    Args:
        weight: float32 [n, k], in units of the code.
        hessian: H, float32 [k, k], positive definite.
        rounded: the start; it is changed.
        encoder: of single weights: its `columns` and `rows` are 1.
    """
    values = rounded.values
    for _ in range(PASSES):
        before = values.clone()
        for end in range(weight.shape[1], 0, -BUFFER):
            begin = max(0, end - BUFFER)
            pull = (weight - values) @ hessian[:, begin:end]
            for j in range(end - 1, begin - 1, -1):
                found, codes = encoder.encode((values[:, j] + pull[:, j - begin] / hessian[j, j])[:, None])
                pull -= (found - values[:, j : j + 1]) * hessian[j, begin:end]
                values[:, j : j + 1] = found
                for name, code in codes.items():
                    rounded.codes[name][:, j : j + 1] = code
        if torch.equal(values, before):
            break
    return rounded


def two_sided_ldlq(weight: Tensor, inputs: Tensor, outputs: Tensor, encoder: Encoder) -> Rounded:
    """Rounds tiles of ``encoder.rows`` x ``encoder.columns``, each with the errors of those below and to the right.

    With E = W - What over the tiles that are finished, a tile's target is that of W + O^T E I + O^T E + E I: the sum of
    E I, over finished tiles of the same rows, and of O^T F, F = E (1 + I), of the same columns. Tiles on one diagonal
    do not see each other, so they are one batch for the search, from the bottom right corner on. In a large
    matrix, the same goes for blocks of tiles: what comes from outside of a block is two products then. A search of
    whole tiles of rows takes so much longer that it does without.

    Args:
        weight: float32 [n, k], in units of the code, n a multiple of ``encoder.rows``.
        inputs: I, float32 [k, k], strictly lower block triangular.
        outputs: O, float32 [n, n], likewise. With zeros the result is that of `block_ldlq`.
        encoder: the search.
    """
    (n, k), r, g = weight.shape, encoder.rows, encoder.columns
    blocks = r == 1 and k * (n + k) >= LARGE
    high, wide = (min(BLOCK_ROWS, n), min(BUFFER // g * g, k)) if blocks else (n, k)
    down, over = -n % high, -k % wide  # rows and columns of zeros, whose errors feed nothing
    rows, columns = (n + down) // high, (k + over) // wide
    # Columns are stored last to first: so a diagonal, of blocks and of tiles, is a view.
    weight = pad(_mirrored(weight, g), (0, over, 0, down))
    right = pad(_mirrored(_mirrored(inputs, g).T, g).T, (0, over, 0, over))
    below = pad(outputs.T, (0, down, 0, down))
    values, error, fed = (torch.zeros_like(weight) for _ in range(3))
    codes: dict[str, Tensor] = {}
    for offset in range(1 - rows, columns):
        places = [
            (slice(i * high, (i + 1) * high), slice((i + offset) * wide, (i + offset + 1) * wide))
            for i in range(max(0, -offset), min(rows, columns - offset))
        ]
        wanted = torch.stack([weight[place] for place in places])
        along = torch.stack([error[y, : x.start] @ right[: x.start, x] for y, x in places])
        up = torch.stack([below[y, y.stop :] @ fed[y.stop :, x] for y, x in places])
        inside = torch.stack([right[x, x] for _, x in places]), torch.stack([below[y, y] for y, _ in places])
        found = _round_blocks(wanted, along, up, *inside, encoder)
        for i, (y, x) in enumerate(places):
            values[y, x], fed[y, x] = found.values[i], found.fed[i]
            error[y, x] = weight[y, x] - values[y, x]
            for name, piece in found.codes.items():
                if name not in codes:
                    codes[name] = piece.new_empty(rows * high // r, columns * wide // g, piece.shape[-1])
                codes[name][y.start // r : y.stop // r, x.start // g : x.stop // g] = piece[i]
    codes = {name: piece[: n // r, : k // g].flip(1).flatten(1) for name, piece in codes.items()}
    return Rounded(_mirrored(values[:n, :k], g), codes)


class _Blocks(NamedTuple):
    """values and fed: float32 [blocks, n, k]; codes: [blocks, rows of tiles, columns of tiles, a tile's]."""

    values: Tensor
    fed: Tensor
    codes: dict[str, Tensor]


def _round_blocks(weight: Tensor, along: Tensor, up: Tensor, right: Tensor, below: Tensor, encoder: Encoder) -> _Blocks:
    """Rounds blocks that do not see each other, columns from the last to the first.

    Args:
        weight: float32 [blocks, n, k].
        along: E I of what lies to the right, likewise.
        up: O^T F of what lies below, likewise.
        right: I inside each block, [blocks, k, k], strictly upper, as the columns are.
        below: O^T inside each block, [blocks, n, n].
        encoder: the search.
    """
    (count, n, k), r, g = weight.shape, encoder.rows, encoder.columns
    rows, columns = n // r, k // g
    right = right.unflatten(2, (columns, g)).transpose(1, 2).contiguous()  # [blocks, columns, k, g]
    below = below.unflatten(1, (rows, r))
    error = weight.new_zeros(count, rows, r, k)
    fed = weight.new_zeros(count, columns, n, g)  # F
    values = torch.empty_like(weight)
    codes: dict[str, Tensor] = {}
    for offset in range(1 - rows, columns):
        begin, end = max(0, -offset), min(rows, columns - offset)

        def tiles(matrix: Tensor, offset: int = offset) -> Tensor:
            """The diagonal's of a matrix [blocks, n, k], or [blocks, rows, columns, ...]: [blocks, tiles, ...]."""
            if matrix.dim() == 3:
                matrix = matrix.view(count, rows, r, columns, g).transpose(2, 3)
            return matrix.diagonal(offset, 1, 2).movedim(-1, 1)

        span = slice(begin + offset, end + offset)
        finished, lowest = (end - 1 + offset) * g, (begin + 1) * r  # no finished error lies beyond
        here = tiles(along) + error[:, begin:end, :, :finished] @ right[:, span, :finished]
        above = tiles(up) + below[:, begin:end, :, lowest:] @ fed[:, span, lowest:]
        wanted = tiles(weight)
        found, pieces = encoder.encode((wanted + (here + above)).flatten(0, 2))
        found = found.view(wanted.shape)
        tiles(values).copy_(found)
        missed = wanted - found
        tiles(error.view(count, n, k)).copy_(missed)
        tiles(fed.view(count, columns, rows, r, g).transpose(1, 2)).copy_(missed + here)
        for name, piece in pieces.items():
            if name not in codes:
                codes[name] = piece.new_empty(count, rows, columns, piece.shape[1])
            tiles(codes[name]).copy_(piece.view(count, end - begin, -1))
    return _Blocks(values, fed.transpose(1, 2).flatten(2), codes)


def _mirrored(matrix: Tensor, g: int) -> Tensor:
    """Its blocks of g columns from the last to the first."""
    return matrix.unflatten(1, (-1, g)).flip(1).flatten(1)
