# SPDX-License-Identifier: Apache-2.0
"""A quantized mixture of experts in vLLM: each expert's matrices are layers of the checkpoint like any other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import gelu, relu, silu
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, stack
from quip_vllm.ops import prepare_experts, select_backend
from quip_vllm.ops.prepared import PreparedExperts
from quip_vllm.vllm_plugin.arrival import UNSUPPORTED, Arrival, DiskLayer, note_arrival, sources_of
from quip_vllm.vllm_plugin.calls import fused
from quip_vllm.vllm_plugin.loading import load_slice, parameters_of
from quip_vllm.vllm_plugin.share import Part, Share, linear_part

GATE, UP, DOWN = "w1", "w3", "w2"
"""What vLLM calls the matrices of an expert."""
WEIGHTS = ("w13_weight", "w2_weight")
"""The parameters that vLLM's code fills: of gates and ups, and of downs."""
SIDES = ((GATE, UP), (DOWN,))
"""The matrices that each has of every expert."""
UNGATED = ((GATE,), (DOWN,))
"""The same of experts without a gate, of which vLLM gives the up the gate's name."""
INTERLEAVED = (("gpt_oss_w13",), ("gpt_oss_w2",))
"""The same of GPT-OSS, where outputs of gate and up take turns in one matrix."""

Experts = list[tuple[LinearSpec, dict[str, Tensor]]]
"""One of the matrices, of every expert."""


class ExpertsArrival(Arrival):
    """Stands for the weights of all experts, see `Arrival`: its parts are the matrices of an expert, expert by expert.

    Attributes:
        matrices: names of the matrices of an expert.
        experts: the number of each expert that this rank holds, in order.
    """

    def __new__(cls, share: Share, matrices: Sequence[str], experts: Sequence[int]) -> "ExpertsArrival":
        """No row has arrived."""
        return super().__new__(cls, share)  # type: ignore[return-value]

    def __init__(self, share: Share, matrices: Sequence[str], experts: Sequence[int]) -> None:
        super().__init__(share)
        self.matrices, self.experts = tuple(matrices), tuple(experts)
        self.weight_loader = note_expert  # type: ignore[assignment]


def note_expert(
    param: ExpertsArrival,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """The ``weight_loader`` of an `ExpertsArrival`; see `note_arrival`, and vLLM's RoutedExperts.weight_loader."""
    held = expert_id in param.experts
    if held:
        part = param.experts.index(expert_id) * len(param.matrices) + param.matrices.index(shard_id)
        note_arrival(param, loaded_weight, part)
    return held if return_success else None


@dataclass(frozen=True)
class ExpertsCall:
    """What one call of a backend computes of every expert: its matrices, or one of them.

    Attributes:
        prepared: without tensors, which the vLLM layer holds as parameters.
        attributes: for each tensor of ``prepared``, its name and the parameter's.
    """

    prepared: PreparedExperts
    attributes: tuple[tuple[str, str], ...]

    def linear(self, layer: torch.nn.Module, x: Tensor, ids: Tensor, shares: Tensor | None = None) -> Tensor:
        """See `PreparedExperts.linear`."""
        tensors = {name: getattr(layer, attribute) for name, attribute in self.attributes}
        return self.prepared.linear(x, ids, shares, tensors)


class QuipExpertsMethod(FusedMoEMethodBase):
    """Serves the routed experts of one decoder layer.

    Args:
        checkpoint: the checkpoint's config.
        layer: vLLM's RoutedExperts, under construction.
        prefix: its name in vLLM.
        formats: code and bits of each matrix.
    """

    def __init__(
        self, checkpoint: CheckpointConfig, layer: Any, prefix: str, formats: Mapping[str, LayerFormat]
    ) -> None:
        super().__init__(layer.moe_config)
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.names = names_of(layer)
        self.sides = INTERLEAVED if is_interleaved(layer) else SIDES if UP in self.names else UNGATED
        self.formats = formats
        self.activation = _activation(layer, prefix)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Says what is to arrive of every expert. See FusedMoEMethodBase.create_weights.

        Raises:
            ValueError: the experts run in a way that is not served, their sizes have no such format, or a rotation
                cannot be split over the ranks.
        """
        _check_served(layer, self.prefix)
        rank, ranks, size = layer.moe_config.tp_rank, layer.moe_config.tp_size, intermediate_size_per_partition
        outer, down = self.sides
        mapped = layer._map_global_expert_id_to_local_expert_id
        experts = sorted((e for e in range(layer.moe_config.num_experts) if mapped(e) >= 0), key=mapped)
        outputs = size if self.sides is UNGATED else size * len(SIDES[0]) // len(outer)

        def part(expert: int, shard: str) -> Part:
            name, stored = f"{self.prefix}.{expert}.{self.names[shard]}", self.formats[shard]
            if shard in down:
                return linear_part(name, stored, hidden_size, (size * ranks, size), rank, 1)
            return linear_part(name, stored, outputs, (hidden_size, hidden_size), rank, ranks)

        for weight, shards in zip(WEIGHTS, self.sides, strict=True):
            parts = tuple(part(expert, shard) for expert in experts for shard in shards)
            share = Share(self.prefix, parts, self.checkpoint.hadamard_block)
            first = replace(share, parts=parts[: len(shards)])
            first.check_sizes(ranks)
            for i in range(len(shards)):
                _check_backend(first.spec((i,)), self.prefix)
            layer.register_parameter(weight, ExpertsArrival(share, shards, experts))
        if layer.moe_config.has_bias:
            for name, width in (("w13_bias", 2 * size), ("w2_bias", hidden_size)):
                bias = Parameter(torch.zeros(num_experts, width, dtype=params_dtype), requires_grad=False)
                layer.register_parameter(name, bias)
                set_weight_attrs(bias, extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Loads the experts' tensors and lays them out for the backend.

        ``layer.quip_w13_weight`` and ``quip_w2_weight`` are then the calls of each side. Does nothing the second time.

        Raises:
            ValueError: a tensor was not in the checkpoint, or no backend runs the experts.
        """
        for weight in WEIGHTS:
            arrival = layer._parameters.pop(weight, None)
            if not isinstance(arrival, ExpertsArrival):
                return
            calls = [
                _install(layer, f"quip_{weight.removesuffix('_weight')}_{i}", spec, tensors)
                for i, (spec, tensors) in enumerate(_joined(_load(arrival), self.prefix))
            ]
            setattr(layer, f"quip_{weight}", tuple(calls))

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: vLLM's kernels do not run these experts."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The routed experts' outputs, weighted and summed: x [m, k] -> [m, k] in x's dtype.

        On several ranks a rank's share of the sum. Shared experts are vLLM's to add.
        """
        m, t = topk_ids.shape
        ids, weights = topk_ids.long(), topk_weights.float()
        if layer.apply_router_weight_on_input:  # a row for each expert of a token
            x = (x[:, None] * topk_weights.to(x.dtype)[..., None]).view(m * t, -1)
            weights = torch.ones_like(weights)
        if layer.expert_map is not None:
            ids = layer.expert_map.long()[ids]
            weights = weights * (ids >= 0)  # of another rank's expert, which is -1, the biases do not count either
        of_rows = ids.view(x.shape[0], -1)
        outers = [call.linear(layer, x, of_rows) for call in layer.quip_w13_weight]
        outer = (outers[0] if len(outers) == 1 else torch.cat(outers, dim=-1)).view(m, t, -1)
        if layer.moe_config.has_bias:
            outer = outer + layer.w13_bias[ids]
        (down,) = layer.quip_w2_weight
        y = down.linear(layer, self.activation(outer.view(m * t, -1)), ids.view(-1, 1), weights)
        if layer.moe_config.has_bias:
            y = y + (layer.w2_bias[ids].float() * weights[..., None]).sum(1).to(x.dtype)
        return y


def names_of(layer: Any) -> dict[str, str]:
    """The names of the matrices of an expert, as vLLM's code of the model has those on disk, by vLLM's names."""
    if is_interleaved(layer):
        return {shard: weight for weight, (shard,) in zip(WEIGHTS, INTERLEAVED, strict=True)}
    names = {GATE: layer.ckpt_gate_proj_name, UP: layer.ckpt_up_proj_name, DOWN: layer.ckpt_down_proj_name}
    return {shard: name for shard, name in names.items() if name}  # without a gate there is no UP


def is_interleaved(layer: Any) -> bool:
    """Whether vLLM's code of a model loads gate and up of each expert as one matrix, with outputs that take turns."""
    return type(layer).__name__ == "GptOssRoutedExperts"  # which not every version of vLLM has


def expert_formats(
    layer: Any, prefix: str, stored: Callable[[str], LayerFormat | None], names: Mapping[str, str]
) -> dict[str, LayerFormat] | None:
    """Code and bits of each matrix of the experts of a layer; None if all keep an ordinary weight.

    Args:
        layer: vLLM's RoutedExperts.
        prefix: its name.
        stored: name of a layer -> how it is stored.
        names: see `names_of`.

    Raises:
        ValueError: experts differ, or some matrices alone are quantized.
    """
    found = {
        shard: {stored(f"{prefix}.{e}.{name}") for e in range(layer.moe_config.num_experts)}
        for shard, name in names.items()
    }
    if all(formats == {None} for formats in found.values()):
        return None
    formats = {shard: next(iter(own)) for shard, own in found.items()}
    for shard, name in names.items():
        if len(found[shard]) > 1 or formats[shard] is None:
            said = sorted(f"{one.code} at {one.bits} bits" if one else "an ordinary weight" for one in found[shard])
            raise ValueError(
                f"{prefix} has experts whose {name} have {', '.join(said)}: the experts of a layer need one code and "
                "rate; requantize with one for all of them, or with all of them among --ignore"
            )
    return {shard: one for shard, one in formats.items() if one is not None}


def _gated(function: Callable[[Tensor], Tensor], outer: Tensor) -> Tensor:
    """What multiplies the outputs of up, which are behind those of the gate."""
    gate, up = outer.chunk(2, dim=-1)
    return function(gate) * up


def _clamped(outer: Tensor) -> Tensor:
    """The same of GPT-OSS, where outputs of gate and up take turns."""
    gate, up = outer[..., ::2].clamp(max=7.0), outer[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def _squared(outer: Tensor) -> Tensor:
    """Of the outputs of up, where there is no gate."""
    return relu(outer).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(_gated, silu),
    "gelu": partial(_gated, gelu),
    "gelu_tanh": partial(_gated, partial(gelu, approximate="tanh")),
    "swigluoai": _clamped,
    "relu2_no_mul": _squared,
}
"""Of the outputs of gate and up, or of up: by vLLM's names."""


def _activation(layer: Any, prefix: str) -> Callable[[Tensor], Tensor]:
    """The activation of experts. Raises ValueError for one that is not served."""
    name, limit = layer.activation.value, layer.moe_config.swiglu_limit
    if name not in ACTIVATIONS or limit is not None or (ACTIVATIONS[name] is _clamped) != is_interleaved(layer):
        raise ValueError(
            f"{prefix} has experts with the activation {name}{'' if limit is None else ' and a limit'}, which are not "
            "served: requantize with the experts among --ignore"
        )
    return ACTIVATIONS[name]


def _check_served(layer: Any, prefix: str) -> None:
    """Raises ValueError for experts that are run in a way that is not served."""
    moe = layer.moe_config
    sizes = (moe.hidden_dim, moe.intermediate_size_per_partition * moe.tp_size)
    problems = {
        "expert parallelism over data-parallel ranks: serve without --enable-expert-parallel": (
            moe.moe_parallel_config.use_ep and moe.moe_parallel_config.dp_size > 1
        ),
        "copies of experts: serve without --enable-eplb": moe.num_experts != moe.num_logical_experts,
        "LoRA on them: name what else has adapters, as in --lora-target-modules q_proj v_proj": (
            moe.is_lora_enabled and _may_have_adapters()
        ),
        "biases: requantize with the experts among --ignore": moe.has_bias and not is_interleaved(layer),
        f"sizes padded to {sizes}: serve with fewer ranks": sizes != (moe.hidden_dim_unpadded, moe.intermediate_size),
    }
    for clause, present in problems.items():
        if present:
            raise ValueError(f"{prefix}: quantized experts are not served with {clause}")


def _may_have_adapters() -> bool:
    """Whether vLLM would give the experts adapters where it serves LoRA."""
    config = get_current_vllm_config_or_none()
    targets = None if config is None or config.lora_config is None else config.lora_config.target_modules
    return targets is None or any("experts" in target.split(".") for target in targets)


def _check_backend(spec: LinearSpec, prefix: str) -> None:
    """Raises ValueError if experts of this spec run one by one where vLLM compiles or captures what it runs."""
    config = get_current_vllm_config_or_none()
    device = torch.device("cpu" if config is None else config.device_config.device_type)
    backend = select_backend(spec, device)
    if not backend.routes and config is not None and not config.model_config.enforce_eager:
        raise ValueError(
            f"{prefix}: quantized experts run on the {backend.name} backend one by one: serve with --enforce-eager"
        )


def _load(arrival: ExpertsArrival) -> list[Experts]:
    """Each of the matrices, of every expert: this rank's share of its tensors.

    Raises:
        ValueError: a tensor was not in the checkpoint, or is not what it has to be.
    """
    disks: dict[int, DiskLayer] = {}
    for disk, parts, order in sources_of(arrival):
        if order is not None or len(parts) > 1 or len(disk.slices) > 1:
            raise ValueError(f"{arrival.share.prefix}: {disk.name} is no matrix of one expert; {UNSUPPORTED}")
        disks[parts[0]] = disk
    found: list[Experts] = [[] for _ in arrival.matrices]
    for i, part in enumerate(arrival.share.parts):
        params = parameters_of(replace(arrival.share, parts=(part,)))
        if i in disks:
            load_slice(params, disks[i], 0, (0,))
        ((_, spec, tensors),) = fused(params)
        found[i % len(arrival.matrices)].append((spec, tensors))
    return found


def _joined(matrices: list[Experts], prefix: str) -> list[tuple[LinearSpec, list[dict[str, Tensor]]]]:
    """Spec and tensors of the experts for each call: of gate and up together where they share `su` and a format."""
    for experts in matrices:
        if any(spec != experts[0][0] for spec, _ in experts):
            raise ValueError(f"{prefix} has experts with vectors of different dtypes: requantize")
    specs = [experts[0][0] for experts in matrices]
    together = replace(specs[0], output_sizes=tuple(spec.out_features for spec in specs))
    of_expert = [[tensors for _, tensors in one] for one in zip(*matrices, strict=True)]
    if (
        all(replace(spec, output_sizes=together.output_sizes) == together for spec in specs)
        and together.beyond_kernels() is None
        and all(torch.equal(first[SU.name], one[SU.name]) for first, *others in of_expert for one in others)
    ):
        return [(together, [stack(together, parts) for parts in of_expert])]
    return [(spec, [tensors for _, tensors in experts]) for spec, experts in zip(specs, matrices, strict=True)]


def _install(layer: torch.nn.Module, name: str, spec: LinearSpec, experts: list[dict[str, Tensor]]) -> ExpertsCall:
    """Prepares one call's tensors for the backend that runs ``spec`` and registers them as parameters of the layer."""
    prepared = prepare_experts(spec, experts)
    attributes = tuple((one, f"{name}_{one}") for one in prepared.tensors)
    for one, attribute in attributes:
        layer.register_parameter(attribute, Parameter(prepared.tensors[one], requires_grad=False))
    return ExpertsCall(replace(prepared, tensors={}), attributes)
