# SPDX-License-Identifier: Apache-2.0
"""Quantize the output head: its rows are not mixed, so each has a scale of its own, and few are held at a time."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.store import read_json, write_json, write_shard
from quip_vllm.formats.tile import TILE
from quip_vllm.ops import LinearSpec
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.quantizer.encoders import Encoder, make_encoder
from quip_vllm.quantizer.group import QuantizedLinear, signs
from quip_vllm.quantizer.hessian import Group, regularise
from quip_vllm.quantizer.ldl import feedback
from quip_vllm.quantizer.model import LayeredModel
from quip_vllm.quantizer.rounding import block_ldlq, energy
from quip_vllm.quantizer.settings import Settings
from quip_vllm.transforms.incoherence import rotate_hessian, rotate_weight

CHUNK_WEIGHTS = 1 << 24  # weights rounded at a time: 64 MiB in float32, of which a handful of copies is alive


def check_head(settings: Settings, source: LayeredModel) -> None:
    """Raises ValueError if ``settings.lm_head`` is given for a head that cannot be quantized."""
    if settings.lm_head is None:
        return
    if source.head is None:
        raise ValueError(f"{settings.model} has no output head: leave --lm-head away")
    if f"{source.head_name}.weight" not in source.reader:
        raise ValueError(
            f"{settings.model} has no tensor {source.head_name}.weight: its files name the output head otherwise than "
            "transformers does; leave --lm-head away"
        )
    n, k = source.head.weight.shape
    problem = CpuBackend().refusal(LinearSpec(settings.code, settings.lm_head, k, (n,), settings.hadamard_block, False))
    if problem is not None:
        raise ValueError(f"{source.head_name} cannot be quantized: {problem}")


@torch.inference_mode()
def do_head(
    settings: Settings, source: LayeredModel, tokens: Tensor, hidden: list[Tensor], shard: Path, entry_file: Path
) -> dict[str, Any]:
    """Quantizes the output head behind the last layer's outputs ``hidden``, unless ``shard`` and ``entry_file`` exist.

    Returns:
        The head's entry in the report.
    """
    name = source.head_name
    if not (shard.exists() and entry_file.exists()):
        began = time.monotonic()
        batches = tqdm(source.head_inputs(tokens, hidden), total=len(hidden), desc="output head: Hessian", leave=False)
        group = head_group(name, batches)
        weight = source.reader.read([f"{name}.weight"])[f"{name}.weight"]
        result = quantize_head(name, weight, group, settings)
        write_shard(shard, {f"{name}.{key}": value for key, value in result.tensors.items()})
        write_json(entry_file, result.entry(name, weight, began))
    return read_json(entry_file)


def head_group(name: str, inputs: Iterable[Tensor]) -> Group:
    """The Hessian of the head's inputs, [..., k] each."""
    total: Tensor | None = None
    tokens = 0
    for x in inputs:
        rows = x.reshape(-1, x.shape[-1]).float()
        product = (rows.T @ rows).double()
        total = product if total is None else total.add_(product)
        tokens += rows.shape[0]
    assert total is not None
    return Group([name], total, tokens)


def quantize_head(name: str, weight: Tensor, group: Group, settings: Settings) -> QuantizedLinear:
    """Quantizes the output head.

    Args:
        name: of the module that will hold the tensors.
        weight: [n, k] of any float dtype.
        group: the Hessian of its inputs.
        settings: method, code, seed, rotation, damping, and the head's bits in ``lm_head``.

    Returns:
        The tensors, ``sv`` holding each row's scale. The proxy loss is over the whole head, in its own units.

    Raises:
        ValueError: the weight holds a NaN, or a row's scale does not fit fp16.
    """
    assert settings.lm_head is not None
    hessian, dead = regularise(group.hessian, group.tokens, settings.damping)
    n, k = weight.shape
    su = signs(k, settings.seed, "su:" + name)
    rotated = rotate_hessian(hessian, su, settings.hadamard_block)
    encoder = make_encoder(LayerFormat(settings.code, settings.lm_head))
    factor, added = feedback(rotated, encoder.columns)
    codes: dict[str, list[Tensor]] = {}
    scales, lost, total = [], 0.0, 0.0
    for rows in _chunks(weight):
        if not torch.isfinite(rows).all():
            raise ValueError(f"{name}.weight holds a NaN or an infinity: mend the model or leave --lm-head away")
        live = rows.float().masked_fill(dead, 0.0)
        turned = rotate_weight(live, su, torch.ones(len(rows)), settings.hadamard_block, rotate_output=False)
        scale = _row_scales(turned, encoder)
        if not torch.isfinite(scale).all():
            raise ValueError(f"{name}.weight has a row whose scale does not fit fp16: leave --lm-head away")
        units = torch.where(scale > 0, turned / scale, torch.zeros(()))
        padded = torch.nn.functional.pad(units, (0, 0, 0, -len(units) % TILE)) if encoder.columns == TILE else units
        rounded = block_ldlq(padded, factor, encoder)
        for key, piece in rounded.codes.items():
            codes.setdefault(key, []).append(piece)
        scales.append(scale[:, 0])
        lost += energy(turned - rounded.values[: len(rows)] * scale, rotated)
        total += energy(turned, rotated)
    tensors = {key: torch.cat(pieces) for key, pieces in codes.items()}
    tensors |= {**encoder.constants(), "su": su.half(), "sv": torch.cat(scales).half()}
    return QuantizedLinear(settings.lm_head, tensors, lost / total if total > 0 else 0.0, added, int(dead.sum()))


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    """Whole tiles of rows, CHUNK_WEIGHTS weights at most; a last tile may be short."""
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1] // TILE) * TILE
    yield from weight.split(rows)


def _row_scales(turned: Tensor, encoder: Encoder) -> Tensor:
    """[n, 1], as stored: rounded to fp16. Zero for a row too small for it, which then decodes to zeros."""
    return (turned.square().mean(1, keepdim=True).sqrt() / encoder.rms).half().float()
