# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ: round column blocks from the last to the first, feeding the error back (QuIP#, arXiv 2402.04396, 4.1).

With a Hessian of the outputs the error feeds back along both sides (YAQA, arXiv 2505.22988, section 3.3). Greedy passes
(QuIP, arXiv 2307.13304) go on from there, one column after the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quip_vllm.quantizer.rounding.encoders import Encoder
from quip_vllm.quantizer.rounding.ldl import feedback
from quip_vllm.quantizer.settings import GREEDY, LDLQ, NEAREST

BUFFER = 128  # columns whose feedback from the right is computed in one product
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
    do not see each other, so they are one batch for the search, from the bottom right corner on.

    Args:
        weight: float32 [n, k], in units of the code, n a multiple of ``encoder.rows``.
        inputs: I, float32 [k, k], strictly lower block triangular.
        outputs: O, float32 [n, n], likewise. With zeros the result is that of `block_ldlq`.
        encoder: the search.
    """
    (n, k), r, g = weight.shape, encoder.rows, encoder.columns
    rows, columns = n // r, k // g
    # Columns are stored last to first: so a diagonal's tiles, in both orders, are a slice.
    right = inputs.view(k, columns, g).permute(1, 0, 2).flip(0).contiguous()  # [columns, k, g]
    below = outputs.T.contiguous().view(rows, r, n)
    error = weight.new_zeros(rows, r, k)
    fed = weight.new_zeros(columns, n, g)  # F
    targets = weight.view(rows, r, columns, g).permute(0, 2, 1, 3).flip(1).contiguous()  # [rows, columns, r, g]
    values = torch.empty_like(targets)
    codes: dict[str, Tensor] = {}
    for diagonal in range(rows + columns - 2, -1, -1):
        begin, end = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        row = torch.arange(begin, end)
        mirrored = row + columns - 1 - diagonal  # of the columns, counted from the last
        span = slice(begin + columns - 1 - diagonal, end + columns - 1 - diagonal)
        first = (diagonal - end + 1) * g  # no finished error lies further left,
        top = begin * r  # or higher
        along = torch.bmm(error[begin:end, :, first:], right[span, first:])
        up = torch.bmm(below[begin:end, :, top:], fed[span, top:])
        tiles = targets[row, mirrored]
        found, pieces = encoder.encode((tiles + (along + up)).flatten(0, 1))
        found = found.view(tiles.shape)
        missed = tiles - found
        values[row, mirrored] = found
        error.view(rows, r, columns, g)[row, :, diagonal - row] = missed
        fed.view(columns, rows, r, g)[mirrored, row] = missed + along
        for name, piece in pieces.items():
            if name not in codes:
                codes[name] = piece.new_empty(rows, columns, piece.shape[1])
            codes[name][row, diagonal - row] = piece
    values = values.flip(1).permute(0, 2, 1, 3).reshape(n, k)
    return Rounded(values, {name: piece.flatten(1) for name, piece in codes.items()})
