# SPDX-License-Identifier: Apache-2.0
"""A quantized linear layer in vLLM: allocate this rank's share, prepare it once for the backend, multiply."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.vllm_plugin.calls import prepare_calls
from quip_vllm.vllm_plugin.loading import allocate
from quip_vllm.vllm_plugin.share import Part, Share, check_split


class QuipLinearMethod(LinearMethodBase):
    """Serves one quantized linear layer; every layer has an instance of its own.

    Args:
        checkpoint: the checkpoint's config.
        prefix: the layer's name in vLLM.
        names: the linear layers on disk that it is made of, in order.
        formats: code and bits of each; None for an ordinary weight.
    """

    def __init__(
        self, checkpoint: CheckpointConfig, prefix: str, names: tuple[str, ...], formats: tuple[LayerFormat | None, ...]
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.names = names
        self.formats = formats

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Allocates this rank's share of the checkpoint's tensors. See LinearMethodBase.create_weights.

        Raises:
            ValueError: the layer's sizes have no such format, or its rotation cannot be split over the ranks.
        """
        ranks = output_size // sum(output_partition_sizes)
        replicas = getattr(layer, "num_kv_head_replicas", 1)  # how many ranks in a row hold the same keys and values
        in_start = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        inputs = {"inputs": input_size, "in_start": in_start, "in_features": input_size_per_partition}
        parts: list[Part] = []
        for i, (name, stored, size) in enumerate(self._named(output_partition_sizes)):
            same = replicas if parts else 1
            start, outputs = layer.tp_rank // same * size if ranks > 1 else 0, size * ranks // same
            parts.append(Part(name, stored, outputs, start=start, held=size, size=size, of=i, **inputs))
        share = Share(self.prefix, tuple(parts), self.checkpoint.hadamard_block)
        quantized = replace(share, parts=tuple(piece for part in parts for piece in self._pieces(part)))
        check_sizes(quantized, max(ranks, input_size // input_size_per_partition))
        allocate(layer, share, quantized)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """See `prepare_calls`."""
        prepare_calls(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = W x + bias: x [..., k] -> y [..., n] in x's dtype, n over all parts of this rank."""
        if layer.quip_order is not None:
            y = self._stored_order(layer, x, None).index_select(-1, layer.quip_order)
            return y if bias is None else y + bias
        return self._stored_order(layer, x, bias)

    def _stored_order(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """`apply`, the outputs as they are stored."""
        if len(layer.quip_calls) == 1:
            return layer.quip_calls[0].linear(layer, x, bias)
        if any(call.x_start for call in layer.quip_calls):  # slices of the inputs
            y = sum(call.linear(layer, x) for call in layer.quip_calls)
            return y if bias is None else y + bias
        sizes = [call.outputs for call in layer.quip_calls]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        outputs = [call.linear(layer, x, own) for call, own in zip(layer.quip_calls, biases, strict=True)]
        return torch.cat(outputs, dim=-1)

    def _pieces(self, part: Part) -> Iterable[Part]:
        """The part itself, its slices if it is stored in some, nothing if it keeps an ordinary weight."""
        if part.stored is None:
            return ()
        layers, shapes = self.checkpoint.layers, self.checkpoint.shapes
        names = exl3.slices(layers).get(part.name)
        if names is None:
            return (part,)
        return part.cut([(one, layers[one], shapes.get(one, (0, 0))) for one in names], exl3.cuts_inputs(part.name))

    def _named(self, sizes: list[int]) -> list[tuple[str, LayerFormat | None, int]]:
        """Name on disk, code and bits, and size on this rank, of each part."""
        count = len(sizes)
        if len(self.names) == count:
            return list(zip(self.names, self.formats, sizes, strict=True))
        label = ", ".join(self.names)
        if len(set(self.formats)) > 1:
            said = ", ".join(
                f"{stored.code} at {stored.bits} bits" if stored else "an ordinary weight" for stored in self.formats
            )
            raise ValueError(
                f"{self.prefix} has {count} parts made of {label} with {said}: where names and parts do not match "
                "one to one, they need one format; requantize with one code and rate for them"
            )
        return [(label, self.formats[0], size) for size in sizes]


def check_sizes(share: Share, ranks: int) -> None:
    """Raises ValueError unless this rank's share consists of whole tiles and whole Hadamard blocks."""
    for i, part in enumerate(share.parts):
        try:
            share.spec((i,)).check_sizes()
        except ValueError as error:
            raise ValueError(f"{share.prefix}, on each of {ranks} tensor-parallel ranks: {error}") from error
        if share.hadamard_block is None:
            # The blockwise case is checked when a tensor arrives and shows which parts it covers.
            share.check_split((i,))
        if part.in_features < part.inputs and part.stored is not None:
            full, chunks = [share.stored(part.inputs)], part.stored.input_chunks
            check_split(share.prefix, "input", [part.in_features], full, share.hadamard_block, chunks)
