# SPDX-License-Identifier: Apache-2.0
"""The quantized output head in vLLM, and the input embedding that is tied to it: rows by number, and logits."""

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from quip_vllm.checkpoint.config import CheckpointConfig, Head
from quip_vllm.formats.methods import Method
from quip_vllm.formats.tile import TILE
from quip_vllm.ops.spec import LinearSpec
from quip_vllm.ops.tensors import layout
from quip_vllm.vllm_plugin.linear_method import install, weights_are_dummies


class QuipEmbeddingMethod(QuantizeMethodBase):
    """Serves one VocabParallelEmbedding or ParallelLMHead; every layer has an instance of its own.

    vLLM pads the vocabulary and gives each tensor-parallel rank a run of rows. Rows without a token decode to zeros:
    their ``sv`` is zero. Outputs are not rotated, so a run may begin and end anywhere (qtip: at whole tiles).

    Args:
        checkpoint: the checkpoint's config.
        head: what it says of the head.
    """

    def __init__(self, checkpoint: CheckpointConfig, head: Head) -> None:
        self.checkpoint = checkpoint
        self.head = head

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Allocates the checkpoint's tensors for this rank. See QuantizeMethodBase.create_weights.

        Raises:
            ValueError: the size has no such format, or a tile would cross the edge of a tensor-parallel shard.
        """
        rows = sum(output_partition_sizes)
        if layer.tp_size > 1 and self.checkpoint.method is Method.QTIP and rows % TILE:
            raise ValueError(
                f"{self.head.module}: {output_size} rows (padded) in tensor-parallel shards of {rows}: qtip needs "
                f"multiples of {TILE}; serve with fewer ranks, or requantize without --lm-head"
            )
        spec = self._spec(rows, input_size)
        layer.quip_dtype = params_dtype
        layer.quip_missing = set() if weights_are_dummies() else set(layout(spec))
        stored = layout(self._spec(layer.org_vocab_size, input_size))
        for name, (shape, dtypes) in layout(spec).items():
            param = Parameter(torch.zeros(shape, dtype=dtypes[0]), requires_grad=False)
            loader = _Loader(layer, name, stored[name][0], self.head.module)
            set_weight_attrs(param, {"weight_loader": loader})
            layer.register_parameter(name, param)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repacks the loaded tensors for the backend and frees them. Does nothing the second time.

        Raises:
            ValueError: a tensor was not in the checkpoint, or no backend runs the layer.
        """
        if not hasattr(layer, "sv"):
            return
        if layer.quip_missing:
            raise ValueError(
                f"{self.head.module}: tensor {sorted(layer.quip_missing)[0]} is not in the checkpoint: copy it again "
                "or requantize"
            )
        spec = self._spec(layer.sv.shape[0], layer.su.shape[0])
        tensors = {name: getattr(layer, name).data for name in layout(spec)}
        for name in tensors:
            delattr(layer, name)
        layer.quip_segments = (install(layer, 0, spec, tensors),)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's rows: x [..., k] -> [..., rows] in x's dtype, zero where a row has no token."""
        (segment,) = layer.quip_segments
        return segment.backend.linear(segment.spec, x, segment.tensors(layer), bias)

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Embeddings of tokens: int64 [...], numbers of this rank's rows -> [..., k] in the model's dtype."""
        (segment,) = layer.quip_segments
        return segment.backend.embedding(segment.spec, input_, segment.tensors(layer), layer.quip_dtype)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The output head of a tied model is its embedding: one set of tensors, loaded and repacked once.

        Raises:
            ValueError: the embedding is not quantized.
        """
        if not isinstance(getattr(embed_tokens, "quant_method", None), QuipEmbeddingMethod):
            raise ValueError(unserved(self.head))
        return embed_tokens

    def _spec(self, rows: int, k: int) -> LinearSpec:
        config = self.checkpoint
        return LinearSpec(
            config.method, config.code, self.head.bits, k, (rows,), config.hadamard_block, rotate_output=False
        )


def unserved(head: Head) -> str:
    """What to say where vLLM's model does not ask how the head is stored."""
    return (
        f"{head.module} is quantized, but vLLM's code of this model does not ask the checkpoint how it is stored: "
        "requantize without --lm-head"
    )


class _Loader:
    """The ``weight_loader`` of one tensor: copies this rank's rows; those beyond stay zero."""

    def __init__(self, layer: VocabParallelEmbedding, name: str, stored: tuple[int, ...], label: str) -> None:
        self.layer, self.name, self.stored, self.label = layer, name, stored, label

    def __call__(self, param: Parameter, loaded: Tensor) -> None:
        """Raises ValueError unless ``loaded`` is the whole vocabulary's tensor."""
        found = loaded[None] if self.name == "lut" else loaded
        if tuple(found.shape) != self.stored or found.dtype != param.dtype:
            raise ValueError(
                f"{self.label}: tensor {self.name} is {loaded.dtype} {list(loaded.shape)}, expected {param.dtype} "
                f"{list(self.stored)}: the checkpoint is damaged or does not belong to its config.json; copy it again "
                "or requantize"
            )
        if self.name in ("su", "lut"):
            param.data.copy_(found)
        else:
            shard = self.layer.shard_indices
            height = TILE if self.name == "packed" else 1  # tokens in a row of this tensor
            start, end = shard.org_vocab_start_index // height, -(-shard.org_vocab_end_index // height)
            param.data[: end - start].copy_(found[start:end])
        self.layer.quip_missing = self.layer.quip_missing - {self.name}
