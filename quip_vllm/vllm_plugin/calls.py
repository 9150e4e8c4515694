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


@dataclass(frozen=True)
class Call:
    """Consecutive parts of one layer that one call of a backend computes.

    Attributes:
        prepared: the parts, without their tensors, which the vLLM layer holds as parameters.
        attributes: for each tensor of ``prepared``, its name and the parameter's.
    """

    prepared: PreparedLayer
    attributes: tuple[tuple[str, str], ...]

    def tensors(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """The tensors of ``prepared`` as the layer holds them now: reloading puts the first parameters back."""
        return {name: getattr(layer, attribute) for name, attribute in self.attributes}

    def linear(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n] in x's dtype, n over the call's parts."""
        return self.prepared.linear(x, bias, self.tensors(layer))

    def embedding(self, layer: torch.nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [...] -> rows of the weight, [..., k] in ``dtype``."""
        return self.prepared.embedding(ids, dtype, self.tensors(layer))


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
    order = load_arrived(layer)
    layer.register_parameter(
        "quip_order", None if order is None else Parameter(order.to(params[SU.name].device), False)
    )
    calls = [_install(layer, i, *call) for i, call in enumerate(_fused(params))]
    for name in params:
        delattr(layer, name)
    layer.quip_calls = tuple(calls)


def _fused(params: dict[str, QuipParameter]) -> list[tuple[LinearSpec, dict[str, Tensor]]]:
    """Spec and tensors of each call: consecutive parts of equal format and equal ``su`` make one."""
    runs: list[tuple[LinearSpec, list[dict[str, Tensor]]]] = []
    for covered in on_disk(params):
        tensors = {name: param.stored(covered) for name, param in params.items() if covered in param.loaded}
        spec = replace(params[SU.name].share.spec(covered), vector_dtype=tensors[SU.name].dtype)
        if runs:
            before, parts = runs[-1]
            sizes = (*before.output_sizes, *spec.output_sizes)
            together = replace(spec, output_sizes=sizes)
            same = together == replace(before, output_sizes=sizes) and together.beyond_kernels() is None
            if same and torch.equal(parts[0][SU.name], tensors[SU.name]):
                runs[-1] = (together, [*parts, tensors])
                continue
        runs.append((spec, [tensors]))
    return [(spec, {name: _own(one) for name, one in stack(spec, parts).items()}) for spec, parts in runs]


def _own(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the memory that it is a view of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _install(layer: torch.nn.Module, index: int, spec: LinearSpec, tensors: dict[str, Tensor]) -> Call:
    """Prepares one call's tensors for the backend that runs ``spec`` and registers them as parameters of the layer."""
    prepared = prepare(spec, tensors)
    attributes = tuple((name, f"quip{index}_{name}") for name in prepared.tensors)
    for name, attribute in attributes:
        layer.register_parameter(attribute, Parameter(prepared.tensors[name], requires_grad=False))
    return Call(replace(prepared, tensors={}), attributes)
