# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a quantized linear layer: one protocol, one ordered table a device."""

import logging
from collections.abc import Iterator
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Something that can run a LinearSpec. Tensors are those of the checkpoint, fused along dimension 0:

    ``packed`` int16 [n/16, k*bits] or ``codes`` int16 [n, k/8] and ``residual_codes`` (uint8 or int16) [n, k/8];
    ``su`` [k], ``sv`` [n]; ``table`` fp16 [parts * 512, 2] for HYB.
    """

    name: str

    def refusal(self, spec: LinearSpec) -> str | None:
        """None if this backend can run ``spec`` on this machine, else one sentence that says why not."""

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checks shapes and dtypes and lays the checkpoint's tensors out for ``linear``; runs once, at load."""

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """y = sv * H(decode(packed) H(su * x)) + bias: x [..., k] -> y [..., n] in x's dtype.

        ``tensors`` from ``prepare``; bias [n] has the dtype of x.
        """

    def embedding(self, spec: LinearSpec, ids: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Rows of the dequantized weight: int64 ids [...] in 0..n-1 -> [..., k] in ``dtype``.

        spec.rotate_output is False. An id outside of the table raises IndexError or RuntimeError, or, on a GPU, gives
        a row of NaN.
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


@cache
def _log_choice(name: str, device_type: str, code: str, bits: int) -> None:
    logger.info("quip_vllm: code %s at %d bits runs on the %s backend (device %s)", code, bits, name, device_type)
