# SPDX-License-Identifier: Apache-2.0
"""The trellis search in several processes, on this machine or on those of a Ray cluster.

A tile is searched by itself. So however many searchers there are, and whichever is lost in the middle, the codes are
those of one process, bit for bit.
"""

import importlib.util
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quip_vllm.quantizer.rounding.encoders import Encoder, TrellisEncoder, make_encoder

Array = np.ndarray[Any, Any]
Found = tuple[str, Array, dict[str, Array]]
"""Who searched; values; tensors of codes."""
LOST = 3
"""Processes that are lost one after the other, without a result between them, before the run ends."""


class Searchers(Protocol):
    """Who searches beside this process.

    Attributes:
        done: name -> weights that it has found codes for.
    """

    done: Counter[str]

    @property
    def count(self) -> int:
        """How many search at the same time."""

    def search(self, code: str, bits: int, pieces: Sequence[Array]) -> list[Found]:
        """`TrellisEncoder.encode` of each piece, float32 [n, 16], in the order of the pieces."""


class SpreadEncoder:
    """A trellis encoder whose tiles others search, in equal shares."""

    def __init__(self, encoder: TrellisEncoder, searchers: Searchers):
        self._encoder, self._searchers = encoder, searchers
        self.columns, self.rows, self.rms = encoder.columns, encoder.rows, encoder.rms

    def encode(self, block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See Encoder."""
        tiles = block.unflatten(0, (-1, self.rows)).tensor_split(min(self._searchers.count, len(block) // self.rows))
        pieces = [part.flatten(0, 1).cpu().numpy() for part in tiles]
        found = self._searchers.search(self._encoder.code.name, self._encoder.bits, pieces)
        for (name, _, _), piece in zip(found, pieces, strict=True):
            self._searchers.done[name] += piece.size
        values = np.concatenate([values for _, values, _ in found])
        codes = {key: np.concatenate([codes[key] for *_, codes in found]) for key in found[0][2]}
        there = {key: torch.from_numpy(array).to(block.device) for key, array in codes.items()}
        return torch.from_numpy(values).to(block.device), there

    def stored(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Encoder."""
        return self._encoder.stored(codes)


def spread(encoder: Encoder, searchers: Searchers | None) -> Encoder:
    """The encoder, whose tiles the searchers search if there are some; other searches are too short to be sent away."""
    return SpreadEncoder(encoder, searchers) if searchers and isinstance(encoder, TrellisEncoder) else encoder


def search_piece(code: str, bits: int, piece: Array, threads: int) -> Found:
    """What a searcher does."""
    torch.set_num_threads(threads)
    values, codes = make_encoder(code, bits).encode(torch.from_numpy(np.array(piece)))
    return f"{socket.gethostname()}:{os.getpid()}", values.numpy(), {key: value.numpy() for key, value in codes.items()}


class Processes:
    """Processes of this machine, which share its cores."""

    def __init__(self, count: int):
        self.count, self.done = count, Counter[str]()
        self._threads = max(1, torch.get_num_threads() // count)
        self._pool = self._made()

    def search(self, code: str, bits: int, pieces: Sequence[Array]) -> list[Found]:
        """See Searchers. Raises ValueError where process after process is lost."""
        found: dict[int, Found] = {}
        lost = 0
        while len(found) < len(pieces):
            before = len(found)
            missing = [i for i in range(len(pieces)) if i not in found]
            try:
                waiting = {i: self._pool.submit(search_piece, code, bits, pieces[i], self._threads) for i in missing}
                for i, future in waiting.items():
                    found[i] = future.result()
            except BrokenProcessPool:
                self.close()
                self._pool = self._made()
                lost = lost + 1 if len(found) == before else 0
                if lost == LOST:
                    raise ValueError(
                        f"--workers is {self.count}: the processes end before they find anything, as where memory is "
                        "short; give fewer, then --resume"
                    ) from None
        return [found[i] for i in range(len(pieces))]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)

    def _made(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.count, get_context("spawn"))


class Cluster:
    """The machines of a Ray cluster, with all cores of each. Ray does again what a lost machine or process was doing.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at `address`.
    """

    def __init__(self, address: str):
        if importlib.util.find_spec("ray") is None:
            raise ValueError("--ray needs Ray: install it with `pip install ray`, here and on the other machines")
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = str(error).strip().splitlines()
            raise ValueError(
                f"--ray is {address}: no cluster was reached ({said[0] if said else type(error).__name__}); start one "
                "with `ray start --head`, then give its address, or auto on one of its machines"
            ) from None
        self._ray = ray
        self._task = ray.remote(max_retries=-1)(search_piece)
        self._machines = self._alive()
        self.done = Counter[str]()

    @property
    def count(self) -> int:
        """Machines that were there after the last search."""
        return len(self._machines)

    def search(self, code: str, bits: int, pieces: Sequence[Array]) -> list[Found]:
        """See Searchers."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At

        waiting = []
        for (machine, cores), piece in zip(self._machines, pieces, strict=False):  # of few tiles, fewer pieces
            task = self._task.options(scheduling_strategy=At(machine, soft=True))
            waiting.append(task.remote(code, bits, piece, cores))
        found: list[Found] = self._ray.get(waiting)
        self._machines = self._alive()
        return found

    def close(self) -> None:
        """Leaves the cluster."""
        self._ray.shutdown()

    def _alive(self) -> list[tuple[str, int]]:
        """(id, cores) of each."""
        there = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        return [(node["NodeID"], int(node["Resources"]["CPU"])) for node in there]


@contextmanager
def searchers(workers: int | None, ray: str | None) -> Iterator[Searchers | None]:
    """Those that the user asks for: `workers` processes, or a Ray cluster's; None, this process alone, for neither.

    Raises:
        ValueError: the user asks for both, for less than one, or for a cluster that is not there.
    """
    if workers is not None and ray is not None:
        raise ValueError("--workers are processes of this machine, --ray has those of a cluster: give one of them")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}: give at least 1")
    made = Processes(workers) if workers else Cluster(ray) if ray else None
    try:
        yield made
    finally:
        if made:
            made.close()
