# SPDX-License-Identifier: Apache-2.0
"""Block LDLQ: round column blocks from the last to the first, feeding the error back (QuIP#, arXiv 2402.04396, 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quip_vllm.quantizer.encoders import Encoder

BUFFER = 128  # columns whose feedback from the right is computed in one product


@dataclass(frozen=True)
class Rounded:
    """values: float32 [n, k]; codes: tensors of the format, [rows, columns] over the whole weight."""

    values: Tensor
    codes: dict[str, Tensor]


def block_ldlq(weight: Tensor, feedback: Tensor, encoder: Encoder) -> Rounded:
    """Rounds W_k + (W - What)_{>k} L_{>k, k} for each block k of ``encoder.columns`` columns, last block first.

    Args:
        weight: float32 [n, k], in units of the codebook.
        feedback: float32 [k, k], strictly lower block triangular.
        encoder: the search; its ``columns`` divide k.
    """
    n, k = weight.shape
    g = encoder.columns
    rounded = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    pieces: list[dict[str, Tensor]] = []
    for end in range(k, 0, -BUFFER):
        begin = max(0, end - BUFFER)
        buffer = weight[:, begin:end] + error[:, end:] @ feedback[end:, begin:end]
        for right in range(end, begin, -g):
            left = right - g
            target = buffer[:, left - begin : right - begin] + error[:, right:end] @ feedback[right:end, left:right]
            values, codes = encoder.encode(target.contiguous())
            rounded[:, left:right] = values
            error[:, left:right] = weight[:, left:right] - values
            pieces.append(codes)
    pieces.reverse()
    return Rounded(rounded, {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]})


def proxy_loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), E = W - What; the share of the output's energy that rounding loses."""
    total = energy(weight, hessian)
    return energy(weight - rounded, hessian) / total if total > 0 else 0.0


def energy(matrix: Tensor, hessian: Tensor) -> float:
    """tr(M H M^T)."""
    return float(((matrix @ hessian) * matrix).sum(dtype=torch.float64))
