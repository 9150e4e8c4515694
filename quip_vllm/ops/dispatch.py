# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a quantized linear layer: one protocol, one ordered table a device."""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU
from quip_vllm.ops.huge_pages import collapse
from quip_vllm.ops.prepared import PreparedExperts, PreparedLayer

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Something that can run layers on a device. It has no state: a choice made for a layer is in its PreparedLayer.

    Attributes:
        name: what QUIP_VLLM_BACKEND calls it.
        routes: whether experts that rows choose are one call, which can be compiled and captured.
    """

    name: str
    routes: bool

    def refusal(self, spec: LinearSpec) -> str | None:
        """None if this backend can run ``spec`` on this machine, else one sentence that says why not."""

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> PreparedLayer:
        """Checks a checkpoint's tensors, named and shaped as ``formats.tensors.layout`` says, and lays them out.

        Raises:
            ValueError: a tensor is missing, or is not what the spec asks for.
        """


@cache
def backends(device_type: str) -> tuple[Backend, ...]:
    """Backends for a device in order of preference. The reference is last and only runs when asked for by name."""
    from quip_vllm.ops.cpu import CpuBackend
    from quip_vllm.ops.cuda import CudaBackend
    from quip_vllm.ops.reference import ReferenceBackend
    from quip_vllm.ops.triton.backend import TritonBackend

    table: dict[str, tuple[Backend, ...]] = {
        "cpu": (CpuBackend(), ReferenceBackend()),
        "cuda": (CudaBackend(), TritonBackend(), ReferenceBackend()),
    }
    return table.get(device_type, (ReferenceBackend(),))


def answers(spec: LinearSpec, device_type: str) -> Iterator[tuple[Backend, str | None]]:
    """Yields a device's backends in order, each with why it does not run ``spec``, or None; the first None is chosen.

    QUIP_VLLM_BACKEND names one backend, the reference included, and takes away the choice.
    """
    wanted = envs.backend()
    for backend in backends(device_type):
        if wanted is not None and backend.name != wanted:
            yield backend, f"QUIP_VLLM_BACKEND asks for {wanted}"
        elif wanted is None and backend.name == "reference":
            yield backend, "slow, runs only with QUIP_VLLM_BACKEND=reference"
        else:
            yield backend, backend.refusal(spec)


def select_backend(spec: LinearSpec, device: torch.device | str) -> Backend:
    """The first backend of ``answers`` that takes ``spec``; the choice is logged once.

    Raises:
        ValueError: no backend takes it; the message lists every refusal.
    """
    device_type = torch.device(device).type
    refusals = []
    for backend, why_not in answers(spec, device_type):
        if why_not is None:
            _log_choice(backend.name, device_type, spec.code, spec.bits)
            return backend
        refusals.append(f"{backend.name}: {why_not}")
    raise ValueError(f"no backend runs {spec} on {device_type}: " + "; ".join(refusals))


def prepare(spec: LinearSpec, tensors: dict[str, Tensor]) -> PreparedLayer:
    """The layer, laid out for the first backend that takes it on the device of its tensors.

    Raises:
        ValueError: no backend takes it, or a tensor is not what the spec asks for.
    """
    layer = _laid_out(spec, tensors)
    for tensor in layer.tensors.values():
        collapse(tensor)
    return layer


def prepare_experts(spec: LinearSpec, experts: Sequence[dict[str, Tensor]]) -> PreparedExperts:
    """Layers of one spec, laid out as `prepare` lays out each, as one. Raises what that raises."""
    layers = [_laid_out(spec, one) for one in experts]
    tensors, own = dict(layers[0].tensors), set()
    for name, first in tensors.items():
        if any(one.tensors[name] is not first for one in layers[1:]) or name == SU.name:
            tensors[name] = torch.stack([one.tensors[name] for one in layers])
            own.add(name)
            collapse(tensors[name])
    together = layers[0].for_all(layers)
    with torch.cuda.device_of(tensors[SU.name]):
        return together.ready(PreparedExperts(together, tensors, frozenset(own)))


def _laid_out(spec: LinearSpec, tensors: dict[str, Tensor]) -> PreparedLayer:
    first = next(iter(tensors.values()))
    with torch.cuda.device_of(first):
        return select_backend(spec, first.device).prepare(spec, tensors)


@cache
def _log_choice(name: str, device_type: str, code: str, bits: int) -> None:
    logger.info("quip_vllm: code %s at %d bits runs on the %s backend (device %s)", code, bits, name, device_type)
