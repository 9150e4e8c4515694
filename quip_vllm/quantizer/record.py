# SPDX-License-Identifier: Apache-2.0
"""OUT/.quantize: what a run has finished, so that a killed run loses at most the layer under work.

It holds the settings, the calibration tokens and, per unit (a decoder layer, or the output head), the unit's tensors
and its entries of the report. Once all units are there, it holds the plan of the checkpoint's shards.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.shards import (
    copy_shard,
    plan_shards,
    read_shard,
    shard_name,
    tensor_sizes,
    write_index,
    write_shard,
)
from quip_vllm.checkpoint.store import CheckpointReader, read_json, write_json

FOLDER = ".quantize"
PLAN = "plan.json"
LOCK = "lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps every other run out of `out`; the system ends that when the process ends, however it does.

    Raises:
        ValueError: another run is there, or nothing can be written there.
    """
    folder = out / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115  # closed below
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error.strerror}): give a new folder on a disk that can be written"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another process"
            raise ValueError(f"{out} is being written by {holder}: wait until it ends, or give a new folder") from None
        except OSError as error:
            raise ValueError(f"{out} cannot be locked ({error.strerror}): give a new folder on another disk") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        try:
            yield
        finally:
            if [file.name for file in folder.glob("*")] == [LOCK]:  # nothing was begun, or all is finished
                (folder / LOCK).unlink()
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    out.rmdir()


def check_empty(out: Path, *more: Path) -> None:
    """Raises ValueError where a folder holds files other than `more` and those of a run that has not begun."""
    own = (out / FOLDER / "settings.json", out / FOLDER / LOCK, *more)
    if any(file.is_file() and file not in own for file in out.rglob("*")):
        raise ValueError(f"{out} is not empty: give a new folder, or --resume to go on with an unfinished run")


class Record:
    """The record of the run in `out`.

    Args:
        out: folder of the checkpoint.
        wanted: what must be equal for a run to be resumed, ready for JSON.
        resume: go on with an unfinished run. False starts a new one.

    Raises:
        ValueError: `out` is not empty, holds nothing to resume, or was begun with other settings.
    """

    def __init__(self, out: Path, wanted: dict[str, Any], resume: bool):
        self.out, self.folder = out, out / FOLDER
        state = self.folder / "settings.json"
        if not resume:
            check_empty(out, self.folder / PLAN)
            write_json(state, wanted)
            return
        if (out / "config.json").exists():
            raise ValueError(f"{out} is finished: there is nothing to resume; give a new folder to quantize again")
        if not state.exists():
            raise ValueError(f"{out} holds no unfinished run: leave --resume away")
        found, wanted = read_json(state), json.loads(json.dumps(wanted))
        changed = [f"{key} was {found.get(key)!r} and is now {wanted[key]!r}" for key in wanted]
        changed = [said for key, said in zip(wanted, changed, strict=True) if found.get(key) != wanted[key]]
        if changed:
            raise ValueError(
                f"{out} was begun with other settings: {'; '.join(changed)}; give the same or a new folder"
            )

    def tokens(self, make: Callable[[], Tensor]) -> Tensor:
        """The calibration tokens, int64 [sequences, sequence_length]; `make` is called where they are not there yet."""
        file = self.folder / "calibration.safetensors"
        if not file.exists():
            write_shard(file, {"tokens": make()})
        tokens = read_shard(file).get("tokens")
        if tokens is None or tokens.dtype is not torch.int64 or tokens.dim() != 2 or not tokens.numel():
            raise self._damaged(file)
        return tokens

    def shard(self, unit: str) -> Path:
        """The file of a unit's tensors, until they are merged."""
        return self.folder / f"{unit}.safetensors"

    def has(self, unit: str) -> bool:
        """Whether a unit is finished."""
        return self.shard(unit).exists() and self._entries(unit).exists()

    def write(
        self,
        unit: str,
        tensors: dict[str, Tensor],
        entries: list[dict[str, Any]],
        digest: str,
        tuning: list[dict[str, Any]] | None = None,
    ) -> None:
        """Keeps a finished unit: its tensors by full name, what the report says, and the digest of its original."""
        write_shard(self.shard(unit), tensors)
        write_json(self._entries(unit), {"layers": entries, "digest": digest, "tuning": tuning or []})

    def digest(self, unit: str) -> str | None:
        """The digest of the model's tensors from which a finished unit was made; None for one that is not finished."""
        return str(self._told(unit, "digest", str)) if self._entries(unit).exists() else None

    def entries(self, unit: str) -> list[dict[str, Any]]:
        """Report entries of a finished unit."""
        return list(self._told(unit, "layers", list))

    def tuning(self, unit: str) -> list[dict[str, Any]]:
        """What the report says of a finished unit's training."""
        return list(self._told(unit, "tuning", list))

    @property
    def all_units_done(self) -> bool:
        """Whether nothing is left but to merge the units, or what is left of them."""
        return (self.folder / "shards.json").exists()

    def merge(self, units: Iterable[str], others: Iterable[str], reader: CheckpointReader) -> None:
        """Moves the units' tensors, and copies the tensors `others` of the model, into the checkpoint's shards.

        Of a tensor that several have, the last unit's counts, and the model's least.
        A unit's file is removed as soon as its last tensor is in a shard, so one shard at most is on the disk twice.
        """
        file = self.folder / "shards.json"
        if not file.exists():
            unit_of = {name: unit for unit in units for name in tensor_sizes(self.shard(unit))}
            sizes = {name: size for unit in units for name, size in tensor_sizes(self.shard(unit)).items()}
            planned = plan_shards(sizes | {name: reader.bytes_of[name] for name in others})
            write_json(file, {"shards": [{name: unit_of.get(name) for name in names} for names in planned]})
        shards = self._planned(file, set(units), reader)
        for index, shard in enumerate(shards):
            path = self.out / shard_name(index, len(shards))
            if not path.exists():
                files = {n: self.shard(unit) if unit else reader.file_of[n] for n, unit in shard.items()}
                copy_shard(path, files, {n: reader.stored_as[n] for n, unit in shard.items() if not unit})
            later = {unit for names in shards[index + 1 :] for unit in names.values()}
            for unit in set(shard.values()) - later:
                if unit is not None:
                    self.shard(unit).unlink(missing_ok=True)
        write_index(self.out, len(shards))

    def remove(self) -> None:
        """Ends the run: removes the record."""
        shutil.rmtree(self.folder)

    def _planned(self, file: Path, units: set[str], reader: CheckpointReader) -> list[dict[str, str | None]]:
        """The unit of each tensor of each shard. Raises ValueError where the file names anything else."""
        shards = read_json(file).get("shards")
        if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
            raise self._damaged(file)
        if any(
            unit not in units if unit is not None else name not in reader
            for one in shards
            for name, unit in one.items()
        ):
            raise self._damaged(file)
        return shards

    def _told(self, unit: str, key: str, kind: type) -> Any:
        """What a unit's JSON says under a key."""
        found = read_json(self._entries(unit)).get(key)
        if not isinstance(found, kind):
            raise self._damaged(self._entries(unit))
        return found

    def _damaged(self, file: Path) -> ValueError:
        return ValueError(f"{file} is damaged: begin again, in a new folder")

    def _entries(self, unit: str) -> Path:
        return self.folder / f"{unit}.json"
