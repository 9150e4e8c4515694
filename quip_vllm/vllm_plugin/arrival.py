# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's code puts each row of a weight, and how quantized tensors follow it.

vLLM's models rename, split and rearrange weights while they load them: Falcon and BLOOM store q, k and v interleaved by
head. The rows of a quantized weight cannot be rearranged, because its rotation mixes them. So a model's code never
sees quantized tensors. In their place it gets an ordinary ``weight`` whose elements are numbers, and loads it as it
would load the weight; where the numbers arrive says which tensors belong there, and in what order the outputs.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import get_current_vllm_config_or_none

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.hub import at_hand
from quip_vllm.checkpoint.layers import DAMAGED, tensor_names
from quip_vllm.checkpoint.store import Header
from quip_vllm.formats.tensors import SU, SV
from quip_vllm.vllm_plugin.reload import Loaded, checked, noted, source_now
from quip_vllm.vllm_plugin.share import Share

UNSUPPORTED = "quip_vllm cannot serve this layer: requantize with the layer among --ignore"
MAPPED = ("auto", "hf", "safetensors")
"""Load formats whose tensors stay valid: others reuse their memory for the next tensors."""


@dataclass(frozen=True, eq=False)
class DiskLayer:
    """A quantized layer of the checkpoint.

    Attributes:
        name: on disk.
        slices: the tensors of each of its slices, or of the whole, by their names without the layer's.
        first: the number of its first element, different for each layer of a checkpoint.
        rows, columns: outputs and inputs of its weight.
    """

    name: str
    slices: tuple[dict[str, Tensor], ...]
    first: int
    rows: int
    columns: int

    def read(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor as the format of a slice has them."""
        tensors = self.slices[index]
        yield from exl3.tensors(tensors) if exl3.TRELLIS in tensors else tensors.items()

    @property
    def end(self) -> int:
        """The first number beyond those of this layer."""
        return self.first + 2 * self.rows + self.columns

    def numbers(self) -> Tensor:
        """int32 [n, k] that stands for the weight: element (i, j) is ``first + 2 i + j``. It holds 2 n + k elements."""
        numbers = torch.arange(self.first, self.end, dtype=torch.int32, device="cpu")
        return numbers.as_strided((self.rows, self.columns), (2, 1))


_SENT: WeakValueDictionary[int, DiskLayer] = WeakValueDictionary()
"""The layers whose numbers are on their way through a model's code, by `DiskLayer.first`."""


class Arrival(Parameter):
    """Stands for the weight of one vLLM layer while the checkpoint is read: the number of each output's first element.

    int32 [outputs over all ranks].

    Attributes:
        share: what this rank holds of the layer.
        arrived: part -> the layers on disk that its rows came from.
        weights: part -> this rank's share of its ordinary weight. Both are replaced and never changed in place: vLLM
            keeps copies of a parameter's attributes from before loading, for reloading.
        announced: the same before a reload: vLLM 0.30 loads the numbers when the model's code has ended and its layers
            would be gone.
        weight_loader: what vLLM calls with the numbers.
        output_dim, input_dim: some models rearrange only weights that have them.
    """

    def __new__(cls, share: Share) -> "Arrival":
        """No row has arrived."""
        size = sum(part.outputs for part in share.parts)
        return super().__new__(cls, torch.zeros(size, dtype=torch.int32), requires_grad=False)

    def __init__(self, share: Share) -> None:
        self.share = share
        self.arrived: dict[int, tuple[DiskLayer, ...]] = {}
        self.announced = self.arrived
        self.weights: dict[int, Tensor] = {}
        self.weight_loader = note_arrival
        self.output_dim, self.input_dim = 0, 1

    def run(self, part: int) -> Tensor:
        """The numbers of a part's rows: a view."""
        parts = self.share.parts
        return self.data.narrow(0, sum(one.outputs for one in parts[:part]), parts[part].outputs)


def note_arrival(param: Arrival, loaded_weight: Tensor, loaded_shard_id: object = None) -> None:
    """The ``weight_loader`` of an `Arrival`. vLLM also calls it on the meta device, before a reload.

    Args:
        param: the layer's.
        loaded_weight: what the model's code has made of the numbers of layers on disk.
        loaded_shard_id: as `Share.covered` takes it.

    Raises:
        ValueError: the model's code has changed the numbers other than by moving rows.
    """
    covered = param.share.covered(loaded_shard_id)
    if any(param.share.parts[i].stored is None for i in covered):
        return _keep_weights(param, loaded_weight, covered)
    rows = _rows(param.share, covered, loaded_weight)
    pieces = rows.split([param.share.parts[i].outputs for i in covered])
    for i, piece in zip(covered, pieces, strict=True):
        if not param.is_meta and i in param.arrived and not torch.equal(param.run(i).cpu(), piece.cpu()):
            raise ValueError(
                f"{param.share.label((i,))} is in the checkpoint twice, both fused and by part or under two names: "
                "remove one of the two or requantize"
            )
        param.run(i).copy_(piece)
    found = {i: _sources(piece) for i, piece in zip(covered, pieces, strict=True)}
    if param.is_meta:
        param.announced = {**param.announced, **found}
        return
    param.arrived = {**param.arrived, **found}


def _keep_weights(param: Arrival, loaded: Tensor, covered: tuple[int, ...]) -> None:
    """Keeps this rank's share of the ordinary weight of some parts. Raises ValueError for anything else."""
    parts = [param.share.parts[i] for i in covered]
    shape = (sum(part.outputs for part in parts), parts[0].inputs)
    if any(part.stored for part in parts) or not loaded.is_floating_point() or tuple(loaded.shape) != shape:
        raise ValueError(
            f"{param.share.label(covered)}: vLLM's code brings a weight of {loaded.dtype} {list(loaded.shape)}, where "
            f"an ordinary weight of {list(shape)} is wanted: {DAMAGED}"
        )
    for i, part, rows in zip(covered, parts, loaded.split([part.outputs for part in parts]), strict=True):
        param.run(i).copy_(torch.zeros(part.outputs))  # which vLLM counts
        if not param.is_meta:
            own = rows.narrow(0, part.start, part.held).narrow(1, part.in_start, part.in_features)
            param.weights = {**param.weights, i: own.to(param.device, copy=True)}


def _rows(share: Share, covered: tuple[int, ...], loaded: Tensor) -> Tensor:
    """The first number of each row. Raises ValueError unless ``loaded`` consists of whole rows of weights."""
    label, shape = share.label(covered), (sum(share.parts[i].outputs for i in covered), share.parts[0].inputs)
    if tuple(loaded.shape) != shape:
        raise ValueError(
            f"{label}: vLLM's code brings a weight of {list(loaded.shape)} in place of {list(shape)}: the checkpoint "
            f"does not belong to its config.json, or {UNSUPPORTED}"
        )
    moved = loaded.dtype != torch.int32 or loaded.stride() != (2, 1)
    if moved and not (
        loaded.dtype == torch.int32
        and torch.equal(
            loaded - loaded[:, :1], torch.arange(shape[1], dtype=torch.int32, device=loaded.device).expand(shape)
        )
    ):
        raise ValueError(f"{label}: vLLM's code of this model changes the weight as it loads it; {UNSUPPORTED}")
    return loaded[:, 0].contiguous()


def _sources(rows: Tensor) -> tuple[DiskLayer, ...]:
    """The layers that some rows are of."""
    numbers = rows.cpu()
    whole = _SENT.get(int(numbers[0]))  # the usual case, at once: a model may have very many experts
    if whole is not None and torch.equal(numbers, whole.numbers()[:, 0]):
        return (whole,)
    layers = sorted(_SENT.values(), key=lambda layer: layer.first)
    return tuple(one for one in layers if ((numbers >= one.first) & (numbers < one.end)).any())


def sources_of(arrival: Arrival) -> Iterator[tuple[DiskLayer, tuple[int, ...], Tensor | None]]:
    """Yields each layer on disk that has arrived, the parts it covers, and the order of its outputs.

    The order is int64 [n], the row on disk of each output; None where they are as on disk.

    Raises:
        ValueError: the rows of a layer on disk do not make up whole parts, each row once.
    """
    share = arrival.share
    for disk in dict.fromkeys(one for layers in arrival.arrived.values() for one in layers):
        parts = tuple(sorted(i for i, layers in arrival.arrived.items() if disk in layers))
        order = (torch.cat([arrival.run(i) for i in parts]).cpu().long() - disk.first) // 2
        own = torch.arange(disk.rows)
        together = parts == tuple(range(parts[0], parts[-1] + 1))
        if not together or not torch.equal(order.sort().values, own):
            raise ValueError(
                f"{share.prefix}: vLLM's code of this model puts rows of {disk.name} into several layers or repeats "
                f"them; {UNSUPPORTED}"
            )
        moved = not torch.equal(order, own)
        if moved and (not share.rotate_output or any(share.parts[i].size != share.parts[i].outputs for i in parts)):
            raise ValueError(
                f"{share.prefix}: vLLM's code of this model rearranges the rows of {disk.name}, which cannot be split "
                "into tensor-parallel shares; serve with --tensor-parallel-size 1"
            )
        yield disk, parts, order if moved else None


def carry_tensors(model_class: Any) -> None:
    """Makes ``load_weights`` of a class of vLLM models give the model's code numbers in place of quantized tensors.

    Models without a quantized layer of ours load as before. Does nothing the second time.
    """
    load: Callable[..., Any] = model_class.load_weights
    if getattr(load, "quip_carries", False):
        return

    @functools.wraps(load)
    def load_weights(self: Module, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        arrivals = [param for param in self.parameters() if isinstance(param, Arrival)]
        if not arrivals:
            return load(self, weights, *args, **kwargs)
        before, headers = getattr(self, "quip_loaded", None), dict[str, Header]()
        copied = _copied()
        if arrivals[0].is_meta:  # vLLM has prepared the model for reloading
            weights, copied = checked(self, weights, before, copied), False  # it has copied them
        else:
            weights = _fetched(weights)
        sent: list[DiskLayer] = []  # holds the tensors until the model's code has put the numbers where they belong
        with OnlyArrivals():
            result = load(self, _numbered(noted(weights, headers), sent, copied), *args, **kwargs)
        self.quip_loaded = Loaded(source_now(), headers)  # type: ignore[assignment]  # an attribute of any type
        return result

    load_weights.quip_carries = True  # type: ignore[attr-defined]
    model_class.load_weights = load_weights


class OnlyArrivals(TorchDispatchMode):
    """Under it, numbers that stand for a quantized layer cannot be copied into an ordinary weight.

    Raises:
        ValueError: vLLM's code of the model has built a layer without asking how it is stored.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        if func is torch.ops.aten.copy_.default and args[0].is_floating_point() and args[1].dtype == torch.int32:
            known = args[1].numel() > 0 and not args[1].is_meta
            number = args[1][(0,) * args[1].dim()].item() if known else -1
            for layer in _SENT.values():
                if layer.first <= number < layer.end:
                    raise ValueError(
                        f"{layer.name} is quantized, but vLLM's code of this model loads it as an ordinary weight; "
                        f"{UNSUPPORTED}"
                    )
        return func(*args, **(kwargs or {}))


def send(
    name: str, slices: Sequence[dict[str, Tensor]], sent: list[DiskLayer], size: tuple[int, int] | None = None
) -> Tensor:
    """The numbers that stand for a layer's weight; the layer is appended to ``sent``, which the caller holds.

    Args:
        name: on disk.
        slices: its tensors by their names without the layer's, of each slice if it is stored in slices.
        sent: the layers before it.
        size: outputs and inputs, where its tensors' sizes do not say them: EXL3 pads these.

    Raises:
        ValueError: the layer has no ``su`` or no ``sv``, or they are not vectors.
    """
    if size is None:
        (tensors,) = slices
        for vector in (SU.name, SV.name):
            if vector not in tensors or tensors[vector].dim() != 1:
                raise ValueError(f"{name} has no vector {vector}: {DAMAGED}")
        size = len(tensors[SV.name]), len(tensors[SU.name])
    disk = DiskLayer(name, tuple(slices), sent[-1].end if sent else 0, *size)
    sent.append(disk)
    _SENT[disk.first] = disk
    return disk.numbers()


def _fetched(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights. vLLM fetches a hub name's files for the first of them: their headers are checked before it.

    Raises:
        ValueError: see `QuipConfig.check_files`.
    """
    config: Any = get_current_vllm_config_or_none()
    source, weights = source_now(), iter(weights)
    try:
        first = list(itertools.islice(weights, 1))
    finally:  # also in place of what vLLM says of a damaged file
        if config is not None and source and not Path(source["model"]).is_dir():  # a folder's have been checked
            folder = at_hand(source["model"], source["revision"], config.load_config.download_dir)
            config.quant_config.check_files(folder)
    yield from itertools.chain(first, weights)


def _copied() -> bool:
    """Whether a tensor that vLLM reads is valid only until it reads the next one."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format not in MAPPED


def _numbered(
    weights: Iterable[tuple[str, Tensor]], sent: list[DiskLayer], copied: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, those of each quantized layer replaced by one ``weight`` of numbers, at the end.

    With ``copied``, tensors that are kept until then are copied: see `_copied`.
    """
    config = get_current_vllm_config_or_none()
    checkpoint = getattr(getattr(config, "quant_config", None), "on_disk", None)
    specs = checkpoint.specs if isinstance(checkpoint, exl3.Exl3Config) else {}
    layers: dict[str, dict[str, Tensor]] = {}
    for full, tensor in weights:
        name, _, leaf = full.rpartition(".")
        if leaf in (exl3.LEAVES if name in specs else tensor_names()):
            if leaf in layers.setdefault(name, {}):
                raise ValueError(f"{full} is in two files of the checkpoint: remove the one that does not belong there")
            layers[name][leaf] = tensor.clone() if copied else tensor
        elif leaf == "bias" and name in specs:
            yield full, tensor[: specs[name].out_features]  # EXL3 pads it as well
        else:
            yield full, tensor
    _SENT.clear()
    sliced = exl3.slices(layers)
    whole = {one: name for name, names in sliced.items() for one in names}
    shapes = {name: (spec.out_features, spec.in_features) for name, spec in specs.items()}
    if isinstance(checkpoint, CheckpointConfig):
        shapes |= checkpoint.shapes
    for name in dict.fromkeys(whole.get(one, one) for one in layers):
        names = sliced.get(name, [name])
        size = shapes.get(name) if name in layers else exl3.joined(name, [shapes.get(one, (0, 0)) for one in names])
        parts = checkpoint.parts_of(name) if isinstance(checkpoint, CheckpointConfig) else []
        numbers = send(name, [layers[one] for one in names], sent, size)
        pieces = numbers.split([rows for _, rows in parts]) if parts else [numbers]
        for (part, _), piece in zip(parts or [(name, 0)], pieces, strict=True):
            yield f"{part}.weight", piece
