# SPDX-License-Identifier: Apache-2.0
"""Everything a quantization run is told, as one checked object that is written into its record."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from quip_vllm.checkpoint.config import LayerFormat


@dataclass(frozen=True)
class Settings:
    """Attributes as the flags of ``quip-vllm quantize`` name them.

    sequences and sequence_length count calibration tokens; ignore and overrides are regular expressions searched in
    the module names of the model; damping is relative to the mean of the Hessian's diagonal; drift_correction is the
    share of hessian.drift_correction that is applied (1 overdoes it: docs/benchmarks/quality.md); lm_head is the bits
    of the output head (and of the embedding where tied), None where it keeps its weight.

    Raises:
        ValueError: names the setting, its value and the rule.
    """

    model: str
    code: str
    bits: int
    calibration: str = "self"
    sequences: int = 256
    sequence_length: int = 2048
    seed: int = 0
    hadamard_block: int | None = None
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()
    damping: float = 0.01
    drift_correction: float = 0.35
    lm_head: int | None = None

    def __post_init__(self) -> None:
        head = [] if self.lm_head is None else [self.lm_head]
        for bits in (self.bits, *(bits for _, bits in self.overrides), *head):
            LayerFormat(self.code, bits).check()
        for pattern in (*self.ignore, *(pattern for pattern, _ in self.overrides)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is not a regular expression ({error}): mend --ignore or --override"
                ) from None
        for name in ("sequences", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.drift_correction <= 1:
            raise ValueError(f"drift_correction is {self.drift_correction}: give a share from 0 to 1")

    def bits_of(self, name: str) -> int | None:
        """Bits of the linear layer ``name``, None where it is ignored. The last matching override wins."""
        if any(re.search(pattern, name) for pattern in self.ignore):
            return None
        bits = self.bits
        for pattern, override in self.overrides:
            if re.search(pattern, name):
                bits = override
        return bits

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        raw = dataclasses.asdict(self)
        raw["ignore"] = list(self.ignore)
        raw["overrides"] = [list(item) for item in self.overrides]
        return raw
