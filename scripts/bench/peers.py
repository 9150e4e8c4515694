# SPDX-License-Identifier: Apache-2.0
"""Nearest rounding of the same linear layers, for comparison: one fp16 scale and one zero point per GROUP inputs."""

from typing import Any

import torch
from torch import Tensor, nn

GROUP = 64


def stored_bits(bits: int) -> float:
    """Bits per weight with the scale and the zero point of each group."""
    return bits + (16 + bits) / GROUP


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that are rounded: all but the output head, as `quip-vllm quantize` does."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Float32 [n, k] rounded to 2^bits evenly spaced levels per group, from its least to its largest weight.

    Raises:
        ValueError: GROUP does not divide k.
    """
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"a weight has {k} inputs: groups of {GROUP} must divide them; use another model")
    groups, steps = weight.view(n, -1, GROUP), 2**bits - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / steps).half().float().clamp(min=2**-24)
    zero = (-low / scale).round().clamp(0, steps)
    return (((groups / scale).round() + zero).clamp(0, steps) - zero).mul(scale).view(n, k)


@torch.no_grad()
def nearest(model: Any, bits: int) -> Any:
    """The float32 model with every linear layer rounded to the nearest, in place."""
    for module in linears(model).values():
        module.weight.copy_(round_to_nearest(module.weight, bits))
    return model


NAMES = {f"rtn{bits}g{GROUP}": bits for bits in (4, 3, 2)}
"""Row of the table -> bits."""
