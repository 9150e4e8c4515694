# SPDX-License-Identifier: Apache-2.0
"""Quantize the linear layers that read one activation: shared signs and feedback, one encoding for all their rows."""

import hashlib
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.quantizer.encoders import Encoder, make_encoder
from quip_vllm.quantizer.hessian import Group, drift_correction, regularise
from quip_vllm.quantizer.ldl import feedback
from quip_vllm.quantizer.rounding import block_ldlq, proxy_loss
from quip_vllm.quantizer.settings import Settings
from quip_vllm.transforms.incoherence import random_signs, rotate_hessian, rotate_weight


@dataclass(frozen=True)
class QuantizedLinear:
    """tensors: what the checkpoint stores in place of ``weight``; proxy_loss: relative, see rounding.proxy_loss."""

    bits: int
    tensors: dict[str, Tensor]
    proxy_loss: float
    damping_added: float
    dead_columns: int

    def entry(self, name: str, weight: Tensor, began: float) -> dict[str, Any]:
        """What the report says of the layer; ``began`` is time.monotonic() before its rounding."""
        return {
            "name": name,
            "shape": list(weight.shape),
            "bits": self.bits,
            "proxy_loss": self.proxy_loss,
            "damping_added": self.damping_added,
            "dead_columns": self.dead_columns,
            "group_seconds": round(time.monotonic() - began, 3),
        }


@cache
def _encoder(code: str, bits: int) -> Encoder:
    return make_encoder(LayerFormat(code, bits))


def signs(size: int, seed: int, name: str) -> Tensor:
    """float32 [size] of +-1, a function of the seed and the name alone, so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return random_signs(size, torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))


def quantize_group(
    group: Group, weights: dict[str, Tensor], bits: dict[str, int], settings: Settings
) -> dict[str, QuantizedLinear]:
    """Quantizes the layers of one group.

    Args:
        group: names and Hessian of the activation that they read, in the order of the weights.
        weights: full module name -> weight [n, k] of any float dtype.
        bits: full module name -> bits.
        settings: method, code, seed, rotation, damping.

    Returns:
        Full module name -> result.

    Raises:
        ValueError: a weight holds a NaN, or a size does not fit the format or the rotation.
    """
    block = settings.hadamard_block
    hessian, dead = regularise(group.hessian, group.tokens, settings.damping)
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds a NaN or an infinity: mend the model or leave it out (--ignore)")
    k = hessian.shape[0]
    correction = drift_correction(group, hessian) if group.crossed or group.drift is not None else None
    short = dict(zip(weights, group.names, strict=True))
    su = signs(k, settings.seed, "su:" + next(iter(weights)))
    rotated = rotate_hessian(hessian, su, block)
    factor, added = feedback(rotated, _encoder(settings.code, settings.bits).columns)

    results: dict[str, QuantizedLinear] = {}
    for level in sorted(set(bits.values())):
        encoder = _encoder(settings.code, level)
        names = [name for name in weights if bits[name] == level]
        parts, sv_of = [], {}
        for name in names:
            weight = weights[name].float()
            if correction is not None:
                weight = weight + settings.drift_correction * correction(short[name], weight)
            weight = weight.masked_fill(dead, 0.0)
            sv = signs(weight.shape[0], settings.seed, "sv:" + name)
            turned = rotate_weight(weight, su, sv, block)
            scale = (turned.square().mean().sqrt() / encoder.rms).half().float()  # as stored, so that nothing is lost
            if not torch.isfinite(scale) or (scale == 0 and bool(weight.any())):
                raise ValueError(
                    f"{name}.weight has a scale of {float(scale)}: it does not fit fp16; leave it out (--ignore)"
                )
            parts.append(turned / scale if scale > 0 else turned)
            sv_of[name] = sv * scale
        stacked = torch.cat(parts)
        rounded = block_ldlq(stacked, factor, encoder)
        start = 0
        for name, part in zip(names, parts, strict=True):
            n = part.shape[0]
            own = {
                key: codes[
                    start * codes.shape[0] // len(stacked) : (start + n) * codes.shape[0] // len(stacked)
                ].clone()
                for key, codes in rounded.codes.items()
            }
            loss = proxy_loss(part, rounded.values[start : start + n], rotated)
            tensors = {**own, **encoder.constants(), "su": su.half(), "sv": sv_of[name].half()}
            results[name] = QuantizedLinear(level, tensors, loss, added, int(dead.sum()))
            start += n
    return {name: results[name] for name in weights}
