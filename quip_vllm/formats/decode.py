# SPDX-License-Identifier: Apache-2.0
"""Codes to the rotated weight: the oracle of every decoder."""

import torch
from torch import Tensor

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import split


def decode_parts(spec: LinearSpec, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The rotated weight of each part, float32 [stored n, stored k]; `tensors` are those of the layer."""
    parts = zip(split(spec, tensors), spec.stored_outputs, strict=True)
    return [spec.format.decode(part, spec.bits, spec.tile_order)[:n] for part, n in parts]


def decode(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The rotated weight of all parts, one below the other: float32 [stored n, stored k]."""
    return torch.cat(decode_parts(spec, tensors))
