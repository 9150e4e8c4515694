# SPDX-License-Identifier: Apache-2.0
"""The quantized output head in vLLM, and the input embedding that is tied to it: rows by number, and logits."""

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from quip_vllm.checkpoint.config import CheckpointConfig, Head
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import Follows, TensorSpec, layout, tensor_specs
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
        together = max(one.outputs_per_row for one in self.head.stored.format.tensors(self.head.stored.bits))
        if layer.tp_size > 1 and rows % together:
            raise ValueError(
                f"{self.head.module}: {output_size} rows (padded) in tensor-parallel shares of {rows}: code "
                f"{self.head.stored.code} needs multiples of {together}; serve with fewer ranks, or requantize without "
                "--lm-head"
            )
        spec = self._spec(rows, input_size)
        layer.quip_dtype = params_dtype
        layer.quip_missing = set() if weights_are_dummies() else set(layout(spec))
        stored = layout(self._spec(layer.org_vocab_size, input_size))
        types = layout(spec)
        for one in tensor_specs(spec):
            param = Parameter(torch.zeros(types[one.name].shape, dtype=one.dtypes[0]), requires_grad=False)
            loader = _Loader(layer, one, stored[one.name].shape, self.head.module)
            set_weight_attrs(param, {"weight_loader": loader})
            layer.register_parameter(one.name, param)

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
        return segment.prepared.linear(x, bias, segment.tensors(layer))

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Embeddings of tokens: int64 [...], numbers of this rank's rows -> [..., k] in the model's dtype."""
        (segment,) = layer.quip_segments
        return segment.prepared.embedding(input_, layer.quip_dtype, segment.tensors(layer))

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The output head of a tied model is its embedding: one set of tensors, loaded and repacked once.

        Raises:
            ValueError: the embedding is not quantized.
        """
        if not isinstance(getattr(embed_tokens, "quant_method", None), QuipEmbeddingMethod):
            raise ValueError(unserved(self.head))
        return embed_tokens

    def _spec(self, rows: int, k: int) -> LinearSpec:
        return LinearSpec(*self.head.stored, k, (rows,), self.checkpoint.hadamard_block, rotate_output=False)


def unserved(head: Head) -> str:
    """What to say where vLLM's model does not ask how the head is stored."""
    return (
        f"{head.module} is quantized, but vLLM's code of this model does not ask the checkpoint how it is stored: "
        "requantize without --lm-head"
    )


class _Loader:
    """The ``weight_loader`` of one tensor: copies this rank's rows; those beyond stay zero."""

    def __init__(self, layer: VocabParallelEmbedding, spec: TensorSpec, stored: tuple[int, ...], label: str) -> None:
        self.layer, self.spec, self.stored, self.label = layer, spec, stored, label

    def __call__(self, param: Parameter, loaded: Tensor) -> None:
        """Raises ValueError unless ``loaded`` is the whole vocabulary's tensor."""
        if tuple(loaded.shape) != self.stored or loaded.dtype != param.dtype:
            raise ValueError(
                f"{self.label}: tensor {self.spec.name} is {loaded.dtype} {list(loaded.shape)}, expected {param.dtype} "
                f"{list(self.stored)}: the checkpoint is damaged or does not belong to its config.json; copy it again "
                "or requantize"
            )
        if self.spec.follows in (Follows.INPUTS, Follows.PART):
            param.data.copy_(loaded)
        else:
            run, height = self.layer.shard_indices, self.spec.outputs_per_row
            start, end = run.org_vocab_start_index // height, -(-run.org_vocab_end_index // height)
            param.data[: end - start].copy_(loaded[start:end])
        self.layer.quip_missing = self.layer.quip_missing - {self.spec.name}
