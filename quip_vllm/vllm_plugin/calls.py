# SPDX-License-Identifier: Apache-2.0
"""From loaded parameters to what runs: consecutive parts of equal format become one call of a backend."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, stack
from quip_vllm.ops import prepare
from quip_vllm.ops.prepared import PreparedLayer
from quip_vllm.vllm_plugin.loading import QuipParameter, load_arrived, loaded_parameters, on_disk
from quip_vllm.vllm_plugin.share import Part


@dataclass(frozen=True)
class Call:
    """Consecutive parts of one layer that one call of a backend computes.

    Attributes:
        prepared: the parts, without their tensors, which the vLLM layer holds as parameters.
        attributes: for each tensor of ``prepared``, its name and the parameter's.
        of, x_start: of its first part, see `Part`.
    """

    prepared: PreparedLayer
    attributes: tuple[tuple[str, str], ...]
    of: int
    x_start: int

    @property
    def outputs(self) -> int:
        """n over the call's parts."""
        return self.prepared.spec.out_features

    def tensors(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """The tensors of ``prepared`` as the layer holds them now: reloading puts the first parameters back."""
        return {name: getattr(layer, attribute) for name, attribute in self.attributes}

    def linear(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., inputs of the layer] -> [..., n] in x's dtype, n over the call's parts."""
        x = x.narrow(-1, self.x_start, self.prepared.spec.in_features)
        return self.prepared.linear(x, bias, self.tensors(layer))

    def embedding(self, layer: torch.nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [...] -> rows of the weight, [..., k] in ``dtype``."""
        return self.prepared.embedding(ids, dtype, self.tensors(layer))


@dataclass(frozen=True)
class Ordinary:
    """A part with an ordinary weight, beside quantized ones of its layer: `attribute` is the parameter [n, k]."""

    attribute: str
    outputs: int
    of: int
    x_start: int = 0

    def linear(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n] in x's dtype, which is the weight's."""
        return torch.nn.functional.linear(x, getattr(layer, self.attribute), bias)


def prepare_calls(layer: Any) -> None:
    """Loads a layer's tensors, repacks them for the backends, frees them, and sets ``layer.quip_calls``.

    Where vLLM wants the outputs in another order than the parts have, ``layer.quip_order`` is that order, int64 [n].
    Does nothing the second time.

    Raises:
        ValueError: a tensor was not in the checkpoint, or no backend runs the layer.
    """
    params = loaded_parameters(layer)
    if not params:
        return
    order, weights = load_arrived(layer)
    layer.register_parameter(
        "quip_order", None if order is None else Parameter(order.to(params[SU.name].device), False)
    )
    calls: list[Call | Ordinary] = [_install(layer, i, *call) for i, call in enumerate(fused(params))]
    for of, weight in weights.items():
        layer.register_parameter(f"quip_weight{of}", Parameter(weight, requires_grad=False))
        calls.append(Ordinary(f"quip_weight{of}", len(weight), of))
    for name in params:
        delattr(layer, name)
    layer.quip_calls = tuple(sorted(calls, key=lambda call: call.of))


def fused(params: dict[str, QuipParameter]) -> list[tuple[Part, LinearSpec, dict[str, Tensor]]]:
    """First part, spec and tensors of each call: consecutive parts of equal format and equal ``su`` make one."""
    share = params[SU.name].share
    runs: list[tuple[Part, LinearSpec, list[dict[str, Tensor]]]] = []
    last = -1
    for covered in on_disk(params):
        tensors = {name: param.stored(covered) for name, param in params.items() if covered in param.loaded}
        spec, part = replace(share.spec(covered), vector_dtype=tensors[SU.name].dtype), share.parts[covered[0]]
        follows, last = part.of - last <= 1, share.parts[covered[-1]].of  # no ordinary weight is between
        if runs and follows and part.x_start == runs[-1][0].x_start:
            first, before, parts = runs[-1]
            sizes = (*before.output_sizes, *spec.output_sizes)
            together = replace(spec, output_sizes=sizes)
            same = together == replace(before, output_sizes=sizes) and together.beyond_kernels() is None
            if same and torch.equal(parts[0][SU.name], tensors[SU.name]):
                runs[-1] = (first, together, [*parts, tensors])
                continue
        runs.append((part, spec, [tensors]))
    return [(first, spec, {name: _own(one) for name, one in stack(spec, parts).items()}) for first, spec, parts in runs]


def _own(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the memory that it is a view of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _install(layer: torch.nn.Module, index: int, first: Part, spec: LinearSpec, tensors: dict[str, Tensor]) -> Call:
    """Prepares one call's tensors for the backend that runs ``spec`` and registers them as parameters of the layer."""
    prepared = prepare(spec, tensors)
    attributes = tuple((name, f"quip{index}_{name}") for name in prepared.tensors)
    for name, attribute in attributes:
        layer.register_parameter(attribute, Parameter(prepared.tensors[name], requires_grad=False))
    return Call(replace(prepared, tensors={}), attributes, first.of, first.x_start)
