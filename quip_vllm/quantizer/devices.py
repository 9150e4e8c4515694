# SPDX-License-Identifier: Apache-2.0
"""Several devices: the first runs the model, and all of them round the groups of a decoder layer at the same time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from quip_vllm.ops.extension import require_cpu_library, require_cuda_library, usable_device
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.rounding.searchers import Searchers

T = TypeVar("T")


def usable_devices(names: Sequence[str], searchers: Searchers | None = None) -> list[torch.device]:
    """The devices of their names, as cuda:0 and cuda:1, with the libraries that search there.

    Raises:
        RuntimeError: a library is missing.
        ValueError: torch cannot use one, they are of different kinds, or there are searchers as well.
    """
    require_cpu_library()
    devices = [usable_device(name) for name in names]
    kinds = {device.type for device in devices}
    if len(kinds) > 1:
        raise ValueError(
            f"--device is {','.join(names)}: devices of different kinds would make codes depend on which was free; "
            "give GPUs alone, or cpu"
        )
    if len(devices) > 1 and searchers:
        raise ValueError(
            f"--device is {','.join(names)}, which search at the same time, as --workers and --ray do: give one "
            "device, or neither of those"
        )
    if "cuda" in kinds:
        require_cuda_library()
    return devices


def on_devices(devices: Sequence[torch.device], groups: Sequence[Inputs], work: Callable[[Inputs], T]) -> Iterator[T]:
    """work(group) of each group, in order; as many are under work as there are devices, each moved to one that is free.

    A group's result does not depend on which of the devices made it, as they are of one kind.
    """
    if len(devices) == 1:
        yield from map(work, groups)
        return
    free: SimpleQueue[torch.device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def there(group: Inputs) -> T:
        device = free.get()
        try:
            with torch.no_grad():  # which a thread has of its own
                return work(group.on(device))
        finally:
            free.put(device)

    pool = ThreadPoolExecutor(len(devices))
    try:
        yield from pool.map(there, groups)
    finally:
        pool.shutdown(cancel_futures=True)
