# SPDX-License-Identifier: Apache-2.0
"""The quantized output head and input embedding in vLLM, tied or not: rows by number, and logits."""

import math
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from quip_vllm.checkpoint.config import CheckpointConfig, Embedding
from quip_vllm.vllm_plugin.calls import prepare_calls
from quip_vllm.vllm_plugin.loading import WEIGHT, allocate, loaded_parameters
from quip_vllm.vllm_plugin.share import token_share


class QuipEmbeddingMethod(QuantizeMethodBase):
    """Serves one VocabParallelEmbedding or ParallelLMHead; every layer has an instance of its own.

    vLLM pads the vocabulary and gives each tensor-parallel rank a run of rows. Rows without a token are zeros: their
    ``sv`` is zero. Outputs are not rotated, so a run may begin and end anywhere (a trellis code's: at whole tiles).

    Args:
        checkpoint: the checkpoint's config.
        rows: what it says of the head or the embedding.
    """

    rotate_output = False

    def __init__(self, checkpoint: CheckpointConfig, rows: Embedding) -> None:
        self.checkpoint = checkpoint
        self.rows = rows

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
        """Allocates this rank's share of the checkpoint's tensors. See QuantizeMethodBase.create_weights.

        Raises:
            ValueError: the size has no such format, or a tile would cross the edge of a rank's share.
        """
        run = range(layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index)
        share = token_share(
            self.rows,
            self.checkpoint.hadamard_block,
            self.rotate_output,
            layer.org_vocab_size,
            run,
            sum(output_partition_sizes),
            input_size,
        )
        allocate(layer, share)
        layer.quip_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """See `prepare_calls`. ``weight`` stands for the weight where vLLM reads its device, dtype and last dimension.

        LoRA and EAGLE's drafts do. The latter also compare two heads or embeddings: NaN equals nothing.
        """
        prepare_calls(layer)
        own = next(_holder(layer).parameters(), None)
        if own is not None:  # a pooling model leaves its head out
            one = own.new_full((1, layer.embedding_dim), math.nan, dtype=layer.quip_dtype)
            layer.register_buffer(WEIGHT, one, persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's rows: x [..., k] -> [..., rows] in x's dtype, zero where a row has no token."""
        holder = _holder(layer)
        return holder.quip_calls[0].linear(holder, x, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Embeddings of tokens: int64 [...], numbers of this rank's rows -> [..., k] in the model's dtype."""
        return layer.quip_calls[0].embedding(layer, input_, layer.quip_dtype)

    def tie_weights(self, layer: Any, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The output head of a tied model takes its embedding's tensors, loaded and prepared once; a bias is its own.

        Raises:
            ValueError: the embedding is not quantized.
        """
        if not isinstance(getattr(embed_tokens, "quant_method", None), QuipEmbeddingMethod):
            raise ValueError(unserved(self.rows))
        for name in [*loaded_parameters(layer), WEIGHT]:
            delattr(layer, name)
        layer.quip_tied = (embed_tokens,)  # in a tuple: it is no submodule
        return layer


class RotatedHeadMethod(QuipEmbeddingMethod):
    """Serves an output head that is stored like a linear layer. vLLM does not use the logits behind the vocabulary."""

    rotate_output = True

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The head has tensors of its own."""
        return layer


def _holder(layer: Any) -> Any:
    """The layer that holds the tensors: the embedding, if the layer is a head that is tied to it."""
    return getattr(layer, "quip_tied", (layer,))[0]


def unserved(rows: Embedding) -> str:
    """What to say where vLLM's model does not ask how the head or the embedding is stored."""
    return (
        f"{rows.module} is quantized, but vLLM's code of this model does not ask the checkpoint how it is stored: "
        f"requantize without {rows.OPTION}"
    )
