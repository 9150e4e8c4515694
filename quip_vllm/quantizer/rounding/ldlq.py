# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ: round column blocks from the last to the first, feeding the error back (QuIP#, arXiv 2402.04396, 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.rounding.encoders import Encoder
from quip_vllm.quantizer.rounding.ldl import feedback

BUFFER = 128  # columns whose feedback from the right is computed in one product


@dataclass(frozen=True)
class Rounded:
    """values: float32 [n, k]; codes: tensors of the format, [rows, columns] over the whole weight."""

    values: Tensor
    codes: dict[str, Tensor]


class Ldlq:
    """Rounds any number of weights under one curvature, which is factored once per number of columns.

    Attributes:
        damping_added: what was added to the curvature's diagonal because it had no factor.

    Raises:
        ValueError: the curvature has an output side, which LDLQ does not take.
    """

    def __init__(self, curvature: Curvature):
        if curvature.outputs is not None:
            raise ValueError("the curvature has an output side: LDLQ rounds under that of the inputs alone")
        self.curvature = curvature
        self.damping_added = 0.0
        self._factors: dict[int, Tensor] = {}

    def round(self, weight: Tensor, encoder: Encoder) -> Rounded:
        """Rounds W_k + (W - What)_{>k} L_{>k, k} for each block k of ``encoder.columns`` columns, last block first.

        Args:
            weight: float32 [n, k], in units of the code, n a multiple of ``encoder.rows``.
            encoder: the search; its ``columns`` divide k.
        """
        if encoder.columns not in self._factors:
            factor, added = feedback(self.curvature.inputs, encoder.columns)
            self._factors[encoder.columns] = factor
            self.damping_added = max(self.damping_added, added)
        return block_ldlq(weight, self._factors[encoder.columns], encoder)


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
