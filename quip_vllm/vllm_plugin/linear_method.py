# SPDX-License-Identifier: Apache-2.0
"""A quantized linear layer in vLLM: allocate this rank's share, prepare it once for the backend, multiply."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.vllm_plugin.calls import prepare_calls
from quip_vllm.vllm_plugin.loading import allocate
from quip_vllm.vllm_plugin.share import Share, linear_part, quantized


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
        inputs = (input_size, input_size_per_partition)
        parts = tuple(
            replace(linear_part(name, stored, size, inputs, layer.tp_rank, ranks, replicas if i else 1), of=i)
            for i, (name, stored, size) in enumerate(self._named(output_partition_sizes))
        )
        share = Share(self.prefix, parts, self.checkpoint.hadamard_block)
        held = quantized(share, self.checkpoint)
        held.check_sizes(max(ranks, input_size // input_size_per_partition))
        allocate(layer, share, held)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """See `prepare_calls`. LoRA asks ``weight_packed`` for the layer's device, and nothing else."""
        prepare_calls(layer)
        device = next(layer.parameters()).device
        layer.register_buffer("weight_packed", torch.empty(0, device=device), persistent=False)

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
