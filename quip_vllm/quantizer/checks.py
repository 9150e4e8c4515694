# SPDX-License-Identifier: Apache-2.0
"""What would end a run late, said before its work begins: windows, values, memory and disk."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm.checkpoint.config import positions
from quip_vllm.checkpoint.shards import SHARD_BYTES, amount, check_room
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.quantizer.discquant import BYTES
from quip_vllm.quantizer.layer import scale_of
from quip_vllm.quantizer.rounding.encoders import make_encoder
from quip_vllm.quantizer.settings import DISCQUANT, SELF, Settings
from quip_vllm.quantizer.source.model import LayeredModel


def check_window(settings: Settings, source: LayeredModel) -> None:
    """Raises ValueError for sequences that are longer than the model's positions."""
    limit = positions(source.config)
    if limit is not None and settings.sequence_length > limit:
        raise ValueError(
            f"sequence_length is {settings.sequence_length}, but {settings.model} has {limit} positions: give "
            f"--sequence-length {limit} or less"
        )


def checked(
    reader: CheckpointReader, names: Sequence[str], specs: Mapping[str, LinearSpec]
) -> Iterator[tuple[str, Tensor]]:
    """Reads tensors once, so that no run ends at a late layer, or keeps what its text never meets.

    Args:
        reader: of the model.
        names: of the tensors.
        specs: how each quantized layer will be stored, by name.

    Yields:
        name and tensor, in the order of `names`.

    Raises:
        ValueError: a tensor holds a NaN or an infinity, or the scale of a layer does not fit fp16.
    """
    for name in tqdm(names, desc="check the weights", unit="tensor", leave=False):
        tensor = reader.read([name])[name]
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            extremes = torch.stack(tensor.aminmax())  # 50 times as fast as isfinite; a NaN makes both one
            if not torch.isfinite(extremes).all():
                raise ValueError(f"{name} holds a NaN or an infinity: mend the model, or fetch it again")
            layer = name.removesuffix(".weight")
            spec = specs.get(layer)
            if spec is not None and spec.rotate_output:  # a row of a head that does not fit is not worth its memory
                scale_of(layer, tensor.float(), spec, make_encoder(spec.code, spec.bits))
        yield name, tensor


def check_memory(settings: Settings, source: LayeredModel, count: int) -> None:
    """Raises ValueError unless `count` sequences fit in the memory that is free.

    Their hidden states stay in memory, twice where drift is corrected, the embedding is quantized, layers are trained,
    or the model runs backwards. A model that writes its own text is there whole, with the next tokens' probabilities,
    and one that is rounded by DISCQUANT with what is trained. The Hessians of all experts of a layer are there at once.
    """
    vocabulary, width = source.model.get_input_embeddings().weight.shape
    tokens, itemsize = count * settings.sequence_length, source.compute_dtype.itemsize
    twice = settings.drift_correction or settings.embedding or settings.backward or settings.trains
    wanted = tokens * (8 + width * itemsize * (2 if twice else 1))
    if SELF in settings.sources:
        weights = sum(tensor.numel() for tensor in source.model.parameters()) * itemsize
        wanted = max(wanted, weights + count * vocabulary * 8)
    free = psutil.virtual_memory().available
    if settings.rounding == DISCQUANT:
        inside = sum(one.weight.numel() for i in range(len(source.layers)) for one in source.linears(i).values())
        wanted += BYTES * inside
        if wanted > free:
            raise ValueError(
                f"--rounding {DISCQUANT} holds the whole model, {BYTES} bytes per weight, and needs about "
                f"{amount(wanted)} of memory, and {amount(free)} are free: give another --rounding, or a "
                "smaller model"
            )
    hessians = max(_of_experts(settings, source, index) for index in range(len(source.layers)))
    if hessians and wanted + hessians > free:
        raise ValueError(
            f"the Hessians of all experts of a decoder layer take about {amount(hessians)} of memory, beside the "
            f"{amount(wanted)} of the hidden states, and {amount(free)} are free: give --no-two-sided, "
            "--drift-correction 0, or --ignore '\\.experts\\.'"
        )
    if wanted > free:
        raise ValueError(
            f"{count} sequences of {settings.sequence_length} tokens need about {amount(wanted)} of memory, and "
            f"{amount(free)} are free: {'give a text (--calibration), ' if SELF in settings.sources else ''}"
            "fewer --sequences or a smaller --sequence-length"
        )


def _of_experts(settings: Settings, source: LayeredModel, index: int) -> int:
    """Bytes of what is summed for the experts of decoder layer `index` that are quantized, all at the same time."""
    inputs = outputs = 0
    for names in (names for mixture in source.mixtures(index) for readers in mixture.readers for names in readers):
        n, k = source.reader.shapes[f"{names[0]}.weight"]
        if settings.layer_format(names[0]) is not None:
            inputs += 8 * k * k * (2 if settings.drift_correction else 1)  # in float64
            outputs += 8 * n * n * len(names) if settings.two_sided else 0  # two halves in float32
    return max(inputs, outputs)


def check_disk(out: Path, kept: int, quantized: int, work: int = 0) -> None:
    """Raises ValueError unless the disk takes the checkpoint and, while shards are merged, one of them twice.

    Args:
        out: folder of the checkpoint.
        kept: bytes of the tensors that stay as they are.
        quantized: bytes of the quantized layers.
        work: bytes that the run needs before it writes what stays as it is.
    """
    check_room(out, quantized + max(work, kept + min(quantized, SHARD_BYTES)), "give the same command again")
