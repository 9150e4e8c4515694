# SPDX-License-Identifier: Apache-2.0
"""What a run cost: instructions, sectors of global memory, wavefronts of shared memory."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

_SECTOR = 32
_BANKS = 32
_WARP = 32


@dataclass
class Site:
    """One instruction of the code and what it cost, summed over the warps that ran it.

    Atomics count as instructions only. cp.async counts its reads and its writes.

    Attributes:
        line: Its line in the .ptx file.
        opcode: Its opcode with all qualifiers.
        text: Its source.
        executed: How often a warp issued it.
        requests: How often it accessed global memory: one a warp for each issue with an active lane.
        shared_requests: The same for shared memory.
        lane_bytes: Bytes that lanes asked for, of both memories.
        sectors: Sectors of 32 bytes of global memory, each counted once a request.
        wavefronts: Passes through shared memory.
        conflicts: Those of them that are due to bank conflicts: without, a request takes one for each 128 bytes.
    """

    line: int
    opcode: str
    text: str
    executed: int = 0
    requests: int = 0
    shared_requests: int = 0
    lane_bytes: int = 0
    sectors: int = 0
    wavefronts: int = 0
    conflicts: int = 0


class Report:
    """The costs of a run; all zero unless it was measured."""

    def __init__(self, instructions=()) -> None:
        self.sites = [Site(i.line, i.opcode, i.text) for i in instructions]

    def select(self, prefix: str = "") -> list[Site]:
        """The sites that ran and whose opcode starts with a prefix."""
        return [s for s in self.sites if s.executed and s.opcode.startswith(prefix)]

    def counts(self) -> Counter:
        """Issued instructions by opcode."""
        total: Counter = Counter()
        for site in self.select():
            total[site.opcode] += site.executed
        return total

    def total(self, field: str, prefix: str = "") -> int:
        """The sum of a field of `Site` over the selected sites."""
        return sum(getattr(s, field) for s in self.select(prefix))

    def count(self, index: int, mask: np.ndarray) -> None:
        """Counts an instruction for the warps with a lane in the mask."""
        if index < len(self.sites):
            self.sites[index].executed += int(mask.reshape(-1, _WARP).any(1).sum())

    def access(self, index: int, space: str, offsets: np.ndarray, lanes: np.ndarray, width: int) -> None:
        """Counts an access of `width` aligned bytes a lane."""
        if space not in ("global", "shared"):
            return
        site = self.sites[index]
        warps = np.unique(lanes // _WARP).size
        site.lane_bytes += width * lanes.size
        if space == "global":
            site.requests += warps
            site.sectors += np.unique((lanes // _WARP << 48) + offsets // _SECTOR).size
        else:
            site.shared_requests += warps
            passes = _wavefronts(offsets, lanes, width)
            site.wavefronts += sum(passes)
            site.conflicts += sum(passes) - len(passes)


def _wavefronts(offsets: np.ndarray, lanes: np.ndarray, width: int) -> list[int]:
    # 8 bytes a lane are served to half of a warp at a time, 16 to a quarter.
    group = lanes // (_WARP * 4 // max(width, 4))
    words = (offsets[:, None] + np.arange(0, width, 4)) // 4
    keys = np.unique((group[:, None] << 32) + words)
    banks, loads = np.unique((keys >> 32) * _BANKS + keys % _BANKS, return_counts=True)
    worst: dict[int, int] = {}
    for bank, load in zip((banks // _BANKS).tolist(), loads.tolist(), strict=True):
        worst[bank] = max(load, worst.get(bank, 0))
    return list(worst.values())
