# SPDX-License-Identifier: Apache-2.0
"""A quantized linear layer in vLLM: allocate, repack once for the backend, multiply."""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import Follows, layout, tensor_specs
from quip_vllm.ops.dispatch import prepare
from quip_vllm.ops.prepared import PreparedLayer
from quip_vllm.vllm_plugin.parameters import (
    InputParameter,
    OutputParameter,
    QuipParameter,
    Sharding,
    TableParameter,
    check_split,
)

_PARAMETERS: dict[Follows, type[QuipParameter]] = {Follows.INPUTS: InputParameter, Follows.PART: TableParameter}


@dataclass(frozen=True)
class Segment:
    """Consecutive projections of one layer that one call of the backend computes.

    Attributes:
        prepared: the layer; without its tensors, which the vLLM layer holds as parameters.
        attributes: for each tensor of ``prepared``, its name and the layer's attribute that holds it.
    """

    prepared: PreparedLayer
    attributes: tuple[tuple[str, str], ...]

    def tensors(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """The tensors of ``prepared``, as the layer holds them now: vLLM may have moved or replaced them."""
        return {name: getattr(layer, attribute) for name, attribute in self.attributes}


def install(layer: torch.nn.Module, index: int, spec: LinearSpec, tensors: dict[str, Tensor]) -> Segment:
    """Repacks a checkpoint's tensors for the backend that runs ``spec`` and registers them as segment ``index``."""
    prepared = prepare(spec, tensors)
    attributes = tuple((name, f"quip{index}_{name}") for name in prepared.tensors)
    for name, attribute in attributes:
        layer.register_parameter(attribute, Parameter(prepared.tensors[name], requires_grad=False))
    return Segment(replace(prepared, tensors={}), attributes)


@register_weight_loader_v2_supported_method
class QuipLinearMethod(LinearMethodBase):
    """Serves one quantized linear layer; every layer has an instance of its own.

    Args:
        checkpoint: the checkpoint's config.
        prefix: the layer's name in vLLM.
        names: the linear layers on disk that it is made of, in order.
        formats: code and bits of each.
    """

    def __init__(
        self, checkpoint: CheckpointConfig, prefix: str, names: tuple[str, ...], formats: tuple[LayerFormat, ...]
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.names = names
        self.formats = formats

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
        """Allocates the checkpoint's tensors for this rank. See LinearMethodBase.create_weights.

        Raises:
            ValueError: the layer's sizes have no such format, or its rotation cannot be split over the ranks.
        """
        names, formats = self._of_each_shard(len(output_partition_sizes))
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        sharding = Sharding(
            prefix=self.prefix,
            names=names,
            hadamard_block=self.checkpoint.hadamard_block,
            formats=formats,
            in_features=input_size_per_partition,
            output_sizes=tuple(output_partition_sizes),
            in_parts=input_size // input_size_per_partition,
            out_parts=output_size // sum(output_partition_sizes),
            replicas=(1, *[replicas] * (len(formats) - 1)),
        )
        _check_sizes(sharding)
        widest = LinearSpec(*max(formats), input_size_per_partition, tuple(output_partition_sizes))
        types = layout(widest)
        for one in tensor_specs(widest):
            kind = _PARAMETERS.get(one.follows, OutputParameter)
            param = kind(torch.empty(types[one.name].shape, dtype=one.dtypes[0]), name=one.name, sharding=sharding)
            if weights_are_dummies():
                param.loaded = frozenset((shard,) for shard in range(len(formats)))
            layer.register_parameter(one.name, param)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repacks the loaded tensors for the backend and frees them. Does nothing the second time.

        Raises:
            ValueError: a tensor was not in the checkpoint, or no backend runs the layer.
        """
        if not hasattr(layer, "sv"):
            return
        params = {n: p for n, p in layer.named_parameters(recurse=False) if isinstance(p, QuipParameter)}
        sharding: Sharding = layer.sv.sharding
        for param in params.values():
            _check_loaded(param)
        projections = sorted(layer.sv.loaded)
        segments = []
        for stored, run in itertools.groupby(projections, key=lambda shards: sharding.formats[shards[0]]):
            spec, tensors = _segment_tensors(params, sharding, stored, list(run))
            segments.append(install(layer, len(segments), spec, tensors))
        for name in params:
            delattr(layer, name)
        layer.quip_segments = tuple(segments)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = W x + bias: x [..., k] -> y [..., n] in x's dtype, n over all shards of this rank."""
        segments = layer.quip_segments
        parts = [None] * len(segments) if bias is None else bias.split([s.prepared.spec.out_features for s in segments])
        outputs = [s.prepared.linear(x, b, s.tensors(layer)) for s, b in zip(segments, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _of_each_shard(self, count: int) -> tuple[tuple[str, ...], tuple[LayerFormat, ...]]:
        """Name on disk, and code and bits, of each of a layer's shards."""
        if len(self.names) == count:
            if len({one.code for one in self.formats}) > 1:
                codes = ", ".join(one.code for one in self.formats)
                raise ValueError(
                    f"{self.prefix} fuses parts with codes {codes}: one code per fused layer is served; requantize"
                )
            return self.names, self.formats
        label, bits = ", ".join(self.names), [one.bits for one in self.formats]
        if len(set(self.formats)) > 1:
            raise ValueError(
                f"{self.prefix} has {count} shards made of {label} with {bits} bits: parts that do not "
                "match the shards one to one need the same bits; requantize with one rate for them"
            )
        return (label,) * count, self.formats[:1] * count


def _check_sizes(sharding: Sharding) -> None:
    """Raises ValueError unless this rank's part of the layer consists of whole tiles and whole Hadamard blocks."""
    try:
        layout(LinearSpec(*sharding.formats[0], sharding.in_features, sharding.output_sizes))
    except ValueError as error:
        ranks = max(sharding.in_parts, sharding.out_parts)
        raise ValueError(f"{sharding.prefix}, on each of {ranks} tensor-parallel ranks: {error}") from error
    if sharding.in_parts > 1:
        full = sharding.in_features * sharding.in_parts
        check_split(sharding.prefix, "input", [sharding.in_features], [full], sharding.hadamard_block)
    if sharding.hadamard_block is None:
        # The blockwise case is checked when a tensor arrives and shows which shards it covers.
        for shard in range(len(sharding.output_sizes)):
            sharding.check_output_split((shard,))


def weights_are_dummies() -> bool:
    """Whether vLLM runs with ``--load-format dummy`` and will load nothing."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _check_loaded(param: QuipParameter) -> None:
    """Raises ValueError unless every shard that has this tensor got it exactly once."""
    sharding, name = param.sharding, param.tensor_name
    covered = sorted(itertools.chain.from_iterable(param.loaded))
    needed = [shard for shard, stored in enumerate(sharding.formats) if name in sharding.tensor_types(stored, 0, 0)]
    missing = [shard for shard in needed if shard not in covered]
    if missing:
        raise ValueError(
            f"{sharding.prefix}: tensor {name} of {sharding.label(missing)} is not in the checkpoint: copy it again "
            "or requantize (or list the layer in modules_to_not_convert, if it was not quantized)"
        )
    if len(covered) != len(set(covered)):
        raise ValueError(
            f"{sharding.prefix}: tensor {name} is in the checkpoint both fused and by projection "
            f"({sharding.label(covered)}): remove one of the two or requantize"
        )


def _segment_tensors(
    params: dict[str, QuipParameter], sharding: Sharding, stored: LayerFormat, run: list[tuple[int, ...]]
) -> tuple[LinearSpec, dict[str, Tensor]]:
    """Describes a run of projections with equal bits and cuts out their tensors, without spare columns."""
    output_sizes = tuple(sum(sharding.output_sizes[shard] for shard in shards) for shards in run)
    before = sum(sharding.output_sizes[: run[0][0]])
    spec = LinearSpec(*stored, sharding.in_features, output_sizes, sharding.hadamard_block)
    types, tensors = layout(spec), {}
    for one in tensor_specs(spec):
        shape, data = types[one.name].shape, params[one.name].data
        if one.follows is Follows.PART:
            data = data.view(len(sharding.formats), *one.part_shape)[[shards[0] for shards in run]].flatten(0, 1)
        elif one.follows is not Follows.INPUTS:
            data = data.narrow(0, before * shape[0] // sum(output_sizes), shape[0])
            data = data if data.ndim == 1 else data.narrow(1, 0, shape[1])
        shared = data.untyped_storage().nbytes() > data.numel() * data.element_size()
        # A slice would keep the whole parameter alive.
        tensors[one.name] = data.to(one.dtypes[0], memory_format=torch.contiguous_format, copy=shared)
    return spec, tensors
