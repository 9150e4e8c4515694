# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint's tensors: this tensor-parallel rank's slice of each, and where it is kept until it is prepared.

The tensors come when `arrival` has seen where vLLM's code puts their layer. A served layer has one or more parts (q, k
and v of qkv_proj). A tensor of the checkpoint covers one part, or several where the model itself fuses them (Phi-3).
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config_or_none

from quip_vllm.formats.tensors import SV, Follows, TensorSpec, tensor_specs
from quip_vllm.vllm_plugin.arrival import Arrival, DiskLayer, sources_of
from quip_vllm.vllm_plugin.share import Share

WEIGHT = "weight"


class QuipParameter(Parameter):
    """This rank's share of one tensor of every part, as a flat run: part after part.

    Vectors and tables are kept as float32 until the layer is prepared, because their dtype in the file is not known.

    Attributes:
        tensor_name: the tensor's name on disk.
        share: what the rank holds of the layer.
        loaded: parts that a loaded tensor covered -> its dtype. Replaced and never changed in place: vLLM keeps copies
            of a parameter's attributes from before loading, for reloading.
        weight_loader_numel: what vLLM, which counts while it reloads, has to wait for here: nothing.
    """

    def __new__(cls, tensor_name: str, share: Share) -> "QuipParameter":
        """Zeros for all parts; the widest dtype of any."""
        specs = [one for i in range(len(share.parts)) if (one := share.tensor(i, tensor_name)) is not None]
        widest = max((dtype for one in specs for dtype in one.dtypes), key=lambda dtype: dtype.itemsize)
        room, every = sum(_sizes(tensor_name, share)), tuple(range(len(share.parts)))
        if len({part.stored for part in share.parts}) == 1:  # one tensor may cover all, and be filled up as a whole
            room = max(room, _elements(tensor_name, share, every))
        return super().__new__(cls, torch.zeros(room, dtype=widest), requires_grad=False)

    def __init__(self, tensor_name: str, share: Share) -> None:
        self.tensor_name = tensor_name
        self.share = share
        self.loaded: dict[tuple[int, ...], torch.dtype] = {}
        if weights_are_dummies():
            dtype = torch.float16 if self.is_floating_point() else self.dtype
            self.loaded = {(i,): dtype for i in range(len(share.parts)) if share.tensor(i, tensor_name) is not None}
        self.weight_loader_numel = 0

    def run(self, part: int) -> Tensor:
        """From the part's first element on: a view."""
        return self.data[sum(_sizes(self.tensor_name, self.share)[:part]) :]

    def stored(self, covered: tuple[int, ...]) -> Tensor:
        """This rank's share of the tensor that covered some parts, in the dtype of the file; a view where it can."""
        one = self.share.tensor(covered[0], self.tensor_name)
        assert one is not None  # it was loaded
        shape = _shape(one, self.share, covered)
        dtype = self.loaded[covered] if self.is_floating_point() else one.dtypes[0]
        return self.run(covered[0])[: math.prod(shape)].view(shape).to(dtype)


def _sizes(name: str, share: Share) -> list[int]:
    """Elements of each part's tensor on this rank."""
    return [_elements(name, share, (i,)) for i in range(len(share.parts))]


def _elements(name: str, share: Share, covered: tuple[int, ...]) -> int:
    """Elements of this rank's share of a tensor that covers some parts."""
    one = share.tensor(covered[0], name)
    return 0 if one is None else math.prod(_shape(one, share, covered))


def _shape(one: TensorSpec, share: Share, covered: tuple[int, ...]) -> tuple[int, ...]:
    return one.shape(share.rows(covered), share.stored(share.parts[covered[0]].in_features))


def load_parameter(param: QuipParameter, loaded_weight: Tensor, covered: tuple[int, ...]) -> None:
    """Fills a parameter with this rank's share of a tensor.

    Args:
        param: the parameter to fill.
        loaded_weight: the checkpoint's tensor, over all ranks.
        covered: the parts that it covers.

    Raises:
        ValueError: the tensor is not what the layer has to have; the message names layer, tensor and both shapes.
    """
    share = param.share
    share.check_split(covered)
    one = _checked(param, loaded_weight, covered)
    target = param.run(covered[0])
    if share.filled(covered):  # then it is not cut
        target[: loaded_weight.numel()].view(loaded_weight.shape).copy_(loaded_weight)
    else:
        _copy_parts(target, one, loaded_weight, share, covered)
    param.loaded = {**param.loaded, covered: loaded_weight.dtype}


def _copy_parts(target: Tensor, one: TensorSpec, loaded: Tensor, share: Share, covered: tuple[int, ...]) -> None:
    """Copies this rank's share of each part that a tensor covers, one behind the other."""
    start = 0
    for i in covered:
        part = share.parts[i]
        piece = share.cut(one, loaded, part, start + part.start, share.stored(part.held))
        room = math.prod(one.shape(share.stored(part.size), share.stored(part.in_features)))
        target[: piece.numel()].view(piece.shape).copy_(piece)
        target[piece.numel() : room].zero_()
        if one.follows in (Follows.INPUTS, Follows.PART):
            return  # one for all that the tensor covers
        start, target = start + share.stored(part.outputs), target[room:]


def _checked(param: QuipParameter, loaded: Tensor, covered: tuple[int, ...]) -> TensorSpec:
    """What a loaded tensor is. Raises ValueError unless it has the shape and dtype that the parts it covers ask for."""
    share, label = param.share, param.share.label(covered)
    formats = sorted({stored for i in covered if (stored := share.parts[i].stored)})
    if len(formats) > 1:
        said = " and ".join(f"{stored.code} at {stored.bits} bits" for stored in formats)
        raise ValueError(f"{label} is one tensor in the checkpoint but is said to be {said}: give it one format")
    one = share.tensor(covered[0], param.tensor_name)
    shape = () if one is None else one.shape(*share.on_disk(covered))
    if one is None or tuple(loaded.shape) != shape or loaded.dtype not in one.dtypes:
        expected = "none" if one is None else f"{' or '.join(map(str, one.dtypes))} {list(shape)}"
        raise ValueError(
            f"{label}: tensor {param.tensor_name} is {loaded.dtype} {list(loaded.shape)}, expected {expected}: the "
            "checkpoint is damaged or does not belong to its config.json; copy it again or requantize"
        )
    return one


def load_arrived(layer: Any) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Fills the layer's parameters with the tensors of the layers on disk whose numbers have arrived.

    Returns:
        int64 [n], for each output of the layer its place among the outputs that the parts have as stored, or None where
        all are in place; and part -> this rank's share of its ordinary weight, in the model's dtype.

    Raises:
        ValueError: see `sources_of` and `load_parameter`; or a tensor is not of the layer's format.
    """
    arrival = layer._parameters.pop(WEIGHT, None)
    if not isinstance(arrival, Arrival):
        raise ValueError(f"{layer} was prepared before its weight was loaded")
    params, order = loaded_parameters(layer), None
    starts = list(itertools.accumulate((part.size for part in arrival.share.parts), initial=0))
    for disk, covered, moved in sources_of(arrival):
        for i in range(len(disk.slices)):
            own = [j for j, part in enumerate(params[SV.name].share.parts) if part.of in covered and part.slice == i]
            if own:  # not of another rank
                load_slice(params, disk, i, tuple(own))
        if moved is not None:
            order = torch.arange(starts[-1]) if order is None else order
            order[starts[covered[0]] : starts[covered[-1] + 1]] = starts[covered[0]] + moved
    weights = {i: _weight(arrival, i) for i, part in enumerate(arrival.share.parts) if part.stored is None}
    return order, {i: weight.to(layer.params_dtype) for i, weight in weights.items()}


def load_slice(params: dict[str, QuipParameter], disk: DiskLayer, index: int, covered: tuple[int, ...]) -> None:
    """Fills parameters with the tensors of one slice of a layer on disk, or of the whole, which covers some parts."""
    for name, tensor in disk.read(index):
        if name not in params:
            raise ValueError(
                f"{params[SV.name].share.label(covered)}: tensor {name} of {disk.name} is none of its format: the "
                "checkpoint does not belong to its config.json; copy it again or requantize"
            )
        load_parameter(params[name], tensor, covered)


def _weight(arrival: Arrival, index: int) -> Tensor:
    """This rank's share of a part's ordinary weight."""
    part = arrival.share.parts[index]
    if index in arrival.weights:
        return arrival.weights[index]
    if not weights_are_dummies():
        raise ValueError(f"{arrival.share.prefix}: the weight of {part.name} is not in the checkpoint: copy it again")
    return torch.zeros(part.size, part.in_features)


def allocate(layer: Module, share: Share, quantized: Share | None = None) -> None:
    """Registers a parameter for each tensor that a part of the layer has, under its name, and one for the arrival.

    Args:
        layer: of vLLM.
        share: what the rank holds of the parts that vLLM knows.
        quantized: the same of those that are quantized, in the slices that the checkpoint has; None if that is `share`.
    """
    layer.register_parameter(WEIGHT, Arrival(share))
    for name, param in parameters_of(share if quantized is None else quantized).items():
        layer.register_parameter(name, param)


def parameters_of(share: Share) -> dict[str, QuipParameter]:
    """A parameter for each tensor that some part has, by its name."""
    names = (one.name for i in range(len(share.parts)) for one in tensor_specs(share.spec((i,))))
    return {name: QuipParameter(name, share) for name in dict.fromkeys(names)}


def loaded_parameters(layer: Module) -> dict[str, QuipParameter]:
    """The layer's parameters that await `process_weights_after_loading`, by name."""
    return {name: param for name, param in layer._parameters.items() if isinstance(param, QuipParameter)}


def weights_are_dummies() -> bool:
    """Whether vLLM runs with ``--load-format dummy`` and will load nothing."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def on_disk(params: dict[str, QuipParameter]) -> list[tuple[int, ...]]:
    """The parts, in order, those together that are one tensor on disk.

    Raises:
        ValueError: a part lacks a tensor that its format has, or has it twice.
    """
    share = params[SV.name].share
    covered = {name: list(itertools.chain.from_iterable(param.loaded)) for name, param in params.items()}
    for name, loaded in covered.items():
        missing = [i for i in range(len(share.parts)) if share.tensor(i, name) is not None and i not in loaded]
        if missing:
            raise ValueError(
                f"{share.prefix}: tensor {name} of {share.label(missing)} is not in the checkpoint: copy it again "
                "or requantize (or list the layer in modules_to_not_convert, if it was not quantized)"
            )
    for name, param in params.items():
        if len(covered[name]) != len(set(covered[name])) or not set(param.loaded) <= set(params[SV.name].loaded):
            raise ValueError(
                f"{share.prefix}: tensor {name} is in the checkpoint both fused and by part "
                f"({share.label(covered[name])}): remove one of the two or requantize"
            )
    return sorted(params[SV.name].loaded)
