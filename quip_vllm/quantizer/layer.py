# SPDX-License-Identifier: Apache-2.0
"""Quantize the linear layers that read one activation, the output head or the embedding: the same steps for all.

What differs: the rows of a linear layer are rotated, so it has one scale and is rounded whole, together with the other
layers of its group. The rows of a head or an embedding are not, so each has a scale of its own and few are held at a
time.
"""

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV
from quip_vllm.formats.tile import TILE
from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.curvature.outputs import Sensitivity
from quip_vllm.quantizer.rounding.encoders import Encoder, make_encoder
from quip_vllm.quantizer.rounding.ldlq import Ldlq
from quip_vllm.quantizer.rounding.searchers import Searchers, spread
from quip_vllm.quantizer.settings import NEAREST, NONE, Settings
from quip_vllm.quantizer.tuning.refit import TINY, Fit, lost, refit, refit_rows
from quip_vllm.transforms.incoherence import random_signs, rotate_hessian, rotate_weight, unrotate_weight

CHUNK_WEIGHTS = 1 << 24
"""Weights of a head that are rounded at a time: 64 MiB in float32, of which a handful of copies is alive."""


@dataclass
class Quantized:
    """One quantized layer.

    Attributes:
        tensors: what the checkpoint stores in place of its ``weight``.
        entry: what the report says of it.
    """

    tensors: dict[str, Tensor]
    entry: dict[str, Any]


@dataclass
class Rows:
    """Rows of one layer on their way to the encoder: `units` float32 [n, k] times `scale` [n] or [] is the weight.

    `outputs` is the rotated Hessian of the outputs, float32 [n, n], if errors feed back along the columns.
    """

    name: str
    units: Tensor
    scale: Tensor
    sv: Tensor
    outputs: Tensor | None = None


@dataclass
class _Sums:
    """What the pieces of one layer add up to."""

    codes: dict[str, list[Tensor]] = field(default_factory=dict)
    sv: list[Tensor] = field(default_factory=list)
    lost: float = 0.0
    total: float = 0.0
    trace: float = 0.0  # of the curvature over the weight


def quantize_group(
    group: Inputs,
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LinearSpec],
    settings: Settings,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    levels: Mapping[str, Tensor] | None = None,
    searchers: Searchers | None = None,
) -> dict[str, Quantized]:
    """Quantizes the layers of one group, where its Hessian is; the results are on the CPU.

    Args:
        group: what is known of the activation that they read.
        weights: full module name -> weight [n, k] of any float dtype, in the order of the group.
        specs: full module name -> how the layer will be stored.
        settings: seed, rotation, rounding, damping, drift correction, and whether the outputs' Hessians count.
        sensitivities: full module name -> how the loss depends on the layer, where that is known.
        levels: full module name -> values of the rotated weight in units of the code, float32 [n, k], which are found
            already; then for all layers of the group.
        searchers: who searches beside this process.

    Returns:
        Full module name -> result, in the order of the weights.

    Raises:
        ValueError: a weight holds a NaN, or a scale does not fit fp16.
    """
    began = time.monotonic()
    hessian, dead = group.regularised(settings.damping)
    correction = group.drift.correction(group.hessian, group.unit(), hessian) if group.drift else None
    device = hessian.device
    su = input_signs(list(weights), len(hessian), settings.seed).to(device)
    (block, chunks), *others = {(specs[name].hadamard_block, specs[name].input_chunks) for name in weights}
    assert not others  # vLLM cuts the inputs of all layers that read one activation, or of none
    inputs = rotate_hessian(hessian, su, block, chunks)
    rounding = Ldlq(inputs, NEAREST if levels else settings.rounding)
    known = sensitivities or {}
    two_sided = [name for name in known if settings.two_sided and known[name].outputs is not None]

    def rows_of(name: str, part: Tensor, encoder: Encoder) -> Rows:
        weight = part.to(device).float()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds a NaN or an infinity: mend the model or {_remedy(specs[name])}")
        if correction is not None:
            weight = weight + settings.drift_correction * correction(name, weight)
        if levels is None:
            weight = weight.masked_fill(dead, 0.0)
        return in_units(name, weight, su, specs[name], settings.seed, encoder)

    sums = {name: _Sums() for name in weights}
    fits: dict[str, Fit] = {}
    for encoder, parts in _batches(weights, specs, two_sided):
        batch = [rows_of(name, part, encoder) for name, part in parts]
        outputs = None
        if batch[0].name in two_sided:  # it is alone in its batch
            outputs = _rotated_outputs(known[batch[0].name], settings.damping, batch[0], specs[batch[0].name])
        stacked = torch.cat([rows.units if levels is None else levels[rows.name].to(device) for rows in batch])
        whole = pad(stacked, (0, 0, 0, -len(stacked) % encoder.rows))
        rounded = rounding.round(whole, spread(encoder, searchers), outputs)
        curvature = Curvature(inputs, outputs)
        begin = 0
        for rows in batch:
            end = begin + len(rows.units)
            own, values = sums[rows.name], rounded.values[begin:end]
            if settings.tune != NONE and not specs[rows.name].rotate_output:
                values = refit_rows(inputs, rows.units, values, rows.sv, specs[rows.name].vector_dtype)
            for key, codes in rounded.codes.items():
                own.codes.setdefault(key, []).append(codes[begin // encoder.rows : -(-end // encoder.rows)])
            own.sv.append(rows.sv)
            own.trace = float(inputs.trace()) * (len(weights[rows.name]) if outputs is None else float(outputs.trace()))
            squares = rows.scale.double().square()
            own.lost += float((curvature.energies(rows.units - values) * squares).sum())
            own.total += float((curvature.energies(rows.units) * squares).sum())
            if settings.tune != NONE and specs[rows.name].rotate_output:
                fits[rows.name] = _fit(rows, values, su, outputs, specs[rows.name])
            begin = end
    if fits:
        su = _refit(hessian, fits, su, sums)
    results = {}
    for name, own in sums.items():
        spec = specs[name]
        tensors = {key: torch.cat(codes).cpu() for key, codes in own.codes.items()}
        tensors = make_encoder(spec.code, spec.bits).stored(tensors)
        vectors = {SU.name: su, SV.name: torch.cat(own.sv)}
        tensors |= {key: vector.to(spec.vector_dtype).cpu() for key, vector in vectors.items()}
        entry = {
            "name": name,
            "shape": list(weights[name].shape),
            "code": spec.code,
            "bits": spec.bits,
            "proxy_loss": own.lost / own.total if own.total > 0 else 0.0,
            "expected_divergence": known[name].energy * own.lost / own.trace / 2 if name in known else None,
            "damping_added": rounding.damping_added,
            "dead_columns": int(dead.sum()),
            "tokens": group.tokens,
            "borrowed_tokens": group.borrowed,
            "group_seconds": round(time.monotonic() - began, 3),
        }
        results[name] = Quantized(tensors, entry)
    return results


def _fit(rows: Rows, values: Tensor, su: Tensor, outputs: Tensor | None, spec: LinearSpec) -> Fit:
    """A layer's codes, what they stand for and the Hessian of its outputs, turned back."""
    block, signs, n = spec.hadamard_block, rows.sv.sign(), spec.output_chunks
    wanted = unrotate_weight(rows.units, su, rows.sv, block, chunks=spec.chunks)
    turned = unrotate_weight(values, torch.ones_like(su), torch.ones_like(signs), block, chunks=spec.chunks)
    back = None if outputs is None else unrotate_weight(outputs, signs, signs, block, chunks=(n, n))
    return Fit(turned, wanted, rows.sv, back)


def _refit(hessian: Tensor, fits: Mapping[str, Fit], su: Tensor, sums: Mapping[str, _Sums]) -> Tensor:
    """Refits the vectors of a group, unless rounding them to fp16 undoes what is gained; returns its su."""
    fitted = refit(hessian, list(fits.values()), su)
    losses = {name: lost(hessian, fit, fitted) for name, fit in fits.items()}
    if not sum((losses[name] - sums[name].lost) / max(sums[name].total, TINY) for name in fits) < 0:
        return su
    for name, fit in fits.items():
        sums[name].sv, sums[name].lost = [fit.sv], losses[name]
    return fitted


def input_signs(names: Sequence[str], size: int, seed: int) -> Tensor:
    """su, float32 [size], of the layers of a group in its order."""
    return signs(size, seed, "su:" + names[0])


def signs(size: int, seed: int, name: str) -> Tensor:
    """float32 [size] of +-1, a function of the seed and the name alone, so that a resumed run draws the same.

    They are drawn on the CPU, so that they do not depend on the device.
    """
    return random_signs(size, generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """One whose numbers are a function of the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _batches(
    weights: Mapping[str, Tensor], specs: Mapping[str, LinearSpec], alone: Collection[str]
) -> Iterator[tuple[Encoder, list[tuple[str, Tensor]]]]:
    """What is rounded at once: all layers of one format whole, or some rows of a layer that is not rotated.

    Those that are to be `alone` are.
    """
    formats: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
    for name, weight in weights.items():
        spec = specs[name]
        if name in alone:
            yield make_encoder(spec.code, spec.bits), [(name, weight)]
            continue
        if spec.rotate_output:
            formats.setdefault((spec.code, spec.bits), []).append((name, weight))
            continue
        rows = max(1, CHUNK_WEIGHTS // weight.shape[1] // TILE) * TILE
        for part in weight.split(rows):
            yield make_encoder(spec.code, spec.bits), [(name, part)]
    for stored in sorted(formats):
        yield make_encoder(*stored), formats[stored]


def in_units(name: str, weight: Tensor, su: Tensor, spec: LinearSpec, seed: int, encoder: Encoder) -> Rows:
    """Rotates rows of a weight and divides them by their scales, which are rounded as they will be stored.

    Rows of zeros fill a layer up to the outputs that it stores.
    """
    mixed = spec.rotate_output
    if mixed:
        weight = padded(weight, spec)
    sv = (signs(len(weight), seed, "sv:" + name) if mixed else torch.ones(len(weight))).to(weight.device)
    turned = rotate_weight(weight, su, sv, spec.hadamard_block, mixed, spec.chunks)
    scale = scale_of(name, turned, spec, encoder)
    column = scale.view(-1, 1)
    # A row of a head that is too small for fp16 decodes to zeros.
    return Rows(name, torch.where(column > 0, turned / column, 0.0), scale, sv * scale)


def padded(matrix: Tensor, spec: LinearSpec) -> Tensor:
    """A matrix with a row for each output of a layer, and rows of zeros for those that it stores beside them."""
    missing = sum(spec.stored_outputs) - len(matrix)
    assert missing >= 0
    return pad(matrix, (0, 0, 0, missing))


def _rotated_outputs(sensitivity: Sensitivity, damping: float, rows: Rows, spec: LinearSpec) -> Tensor:
    """The Hessian of the outputs, float32 [n, n], with unit mean diagonal, damped and rotated as the weight's rows."""
    assert sensitivity.outputs is not None
    hessian = padded(padded(sensitivity.outputs.to(rows.units.device, copy=True), spec).T, spec)
    hessian.diagonal().add_(damping)
    return rotate_hessian(hessian, rows.sv.sign(), spec.hadamard_block, spec.output_chunks)


def scale_of(name: str, weight: Tensor, spec: LinearSpec, encoder: Encoder) -> Tensor:
    """The scale of a float32 weight [n, k], rotated or not, as it will be stored: [], or [n] where rows are not mixed.

    Raises:
        ValueError: it does not fit fp16.
    """
    squares = weight.square()
    mean = squares.mean() if spec.rotate_output else squares.mean(1)
    scale = (mean.sqrt() / encoder.rms).to(spec.vector_dtype).float()
    if not torch.isfinite(scale).all() or (spec.rotate_output and scale == 0 and bool(weight.any())):
        raise ValueError(f"{name}.weight has a scale of {float(scale.max())}: it does not fit fp16; {_remedy(spec)}")
    return scale


def _remedy(spec: LinearSpec) -> str:
    return "leave it out (--ignore)" if spec.rotate_output else "leave --lm-head or --embedding away"
