# SPDX-License-Identifier: Apache-2.0
"""Everything a quantization run is told, with every default, as one checked object that is written into its record."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.cuts import chunked
from quip_vllm.formats.spec import FORMATS, LinearSpec, methods
from quip_vllm.quantizer.plan_file import Planned, most_common

BUNDLE, SELF = "bundle", "self"
"""As `calibration`: the text that the package carries; the text that the model itself writes."""
NONE, REFIT, BLOCKS, FULL = "none", "refit", "blocks", "full"
"""As `tune`: vectors as the rotation made them; su and sv fitted to the codes in closed form; then each decoder layer
trained to give what the original gives; then all of them together, to give the original's logits."""
TUNINGS = (NONE, REFIT, BLOCKS, FULL)
LDLQ, NEAREST, GREEDY, DISCQUANT = ROUNDINGS = ("ldlq", "nearest", "greedy", "discquant")
"""As `rounding`: with feedback; without; with feedback, and then each weight again given all others; up or down as
the loss of the whole model says."""
ROUNDING_STEPS = 64
"""Of DISCQUANT, unless the user says otherwise."""
AMOUNTS = {BUNDLE: (64, 1024), SELF: (64, 256)}
"""Sequences, and tokens in each, unless the user says otherwise."""
TEXT_AMOUNT = (256, 2048)
"""The same for all other sources."""
SPLITS = (8, 4, 2)
NARROWEST = 256
"""Into how many chunks rotations are cut, unless the user says otherwise: the most that leave each this many numbers.
Chunks of 128 cost a layer a hundredth of its loss, and whole models more (docs/benchmarks/quality.md#rotation)."""
EPOCHS = 1
"""Of FULL, unless the user says otherwise."""
BATCH_TOKENS = 2048
"""Per batch: few enough that the allocator reuses a layer's temporaries instead of mapping fresh pages."""


@dataclass(frozen=True)
class Settings:
    """What the flags of ``quip-vllm quantize`` say.

    Attributes:
        model: folder or hub name.
        code: name of the code of every quantized layer.
        bits: code bits per weight, where `overrides` says nothing else.
        calibration: BUNDLE, SELF, a text file or ``hub:DATASET[:SPLIT[:COLUMN]]``, or several of them with commas
            between them, which have equal shares of the sequences.
        sequences: number of calibration sequences. None takes that of `calibration`'s first source.
        sequence_length: tokens per sequence. None takes that of `calibration`'s first source.
        seed: of the signs, the choice of sequences and the self-written text.
        hadamard_block: None for full-width rotations, else their largest block.
        split: over how many tensor-parallel ranks the layers can be cut: full-width rotations act on that many equal
            chunks of the side that is cut (`checkpoint.cuts`), one by one. None is what `plan.with_split` chooses, and
            whole rows until then.
        ignore: regular expressions, searched in module names; a layer that one matches keeps its weight.
        overrides: (regular expression, bits) pairs; the last that matches a module name counts.
        damping: what is added to a Hessian's diagonal, relative to its mean.
        rounding: one of ROUNDINGS.
        rounding_steps: how many steps DISCQUANT takes; None for the others.
        drift_correction: the share of the correction of `curvature.drift` that is applied. All of it is too much
            (docs/benchmarks/quality.md). None is 0 with DISCQUANT, which knows all errors, and 0.2 with the others.
        token_weights: share of what a token counts in the Hessians that is as much as the loss feels the layer's output
            there; for the rest all tokens count the same. None is 0.2 where `two_sided` is, else 0.
        two_sided: whether rounding feeds errors back along the outputs, too, by Hessians of theirs. None is whether
            `rounding` is LDLQ.
        hessians: folder where the backward pass leaves what these two need, or has left it. None keeps nothing.
        tune: one of TUNINGS.
        epochs: at most how often FULL goes through the calibration text; None for the others.
        lm_head: bits of the output head. None keeps its weight.
        embedding: bits of the input embedding. None keeps its weight. Where the two are tied, either says both.
        plan: (name, code and bits or None) of every linear layer, and of head and embedding where it names them; the
            default, none at all, goes by the rest. Then `code` and `bits` are those of most layers.
        device: torch's name of where the model runs, is rounded and is trained, or several with commas between, which
            round together. DISCQUANT takes its steps on the CPU.
        trust_remote_code: whether Python code among the model's files may run.

    Raises:
        ValueError: names the setting, its value and the rule.
    """

    model: str
    code: str
    bits: int
    calibration: str = BUNDLE
    sequences: int = None  # type: ignore[assignment]  # __post_init__ replaces None
    sequence_length: int = None  # type: ignore[assignment]
    seed: int = 0
    hadamard_block: int | None = None
    split: int | None = None
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()
    damping: float = 0.01
    rounding: str = LDLQ
    rounding_steps: int | None = None
    drift_correction: float = None  # type: ignore[assignment]
    token_weights: float = None  # type: ignore[assignment]
    two_sided: bool = None  # type: ignore[assignment]
    hessians: str | None = None
    tune: str = FULL
    epochs: int | None = None
    lm_head: int | None = None
    embedding: int | None = None
    plan: Planned = ()
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        sequences, sequence_length = AMOUNTS.get(self.sources[0], TEXT_AMOUNT)
        self._default("sequences", sequences)
        self._default("sequence_length", sequence_length)
        token_rows = [bits for bits in (self.lm_head, self.embedding) if bits is not None]
        for bits in (self.bits, *(bits for _, bits in self.overrides), *token_rows):
            LayerFormat(self.code, bits).check()
        self._check_rounding()
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
        if not all(self.sources):
            raise ValueError(f"calibration is {self.calibration!r}: give sources with one comma between two")
        if self.sequences < len(self.sources):
            raise ValueError(
                f"sequences is {self.sequences}: give at least one for each of the {len(self.sources)} sources of "
                f"calibration {self.calibration}"
            )
        if self.plan and (self.ignore or self.overrides or self.lm_head is not None or self.embedding is not None):
            raise ValueError(
                "a plan says the bits of every layer: leave --ignore, --override, --lm-head and --embedding away"
            )
        if self.hadamard_block is not None:
            self._default("split", 1)
        if self.split is not None and (self.split < 1 or (self.split > 1 and self.hadamard_block is not None)):
            raise ValueError(
                f"split is {self.split}: give a number of ranks, and no --hadamard-block, whose blocks can be split"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}: give a number from 0 to {(1 << 63) - 1}")
        for name in ("drift_correction", "token_weights"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")
        if self.tune not in TUNINGS:
            raise ValueError(f"tune is {self.tune!r}: it must be one of {', '.join(TUNINGS)}")
        self._default("epochs", EPOCHS if self.tune == FULL else None)
        if self.epochs is not None and (self.tune != FULL or self.epochs < 1):
            raise ValueError(f"epochs is {self.epochs} with tune {self.tune}: give at least 1, with {FULL}")

    def _check_rounding(self) -> None:
        """Fills in what depends on `rounding`; raises ValueError for what does not go with it."""
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {self.rounding!r}: it must be one of {', '.join(ROUNDINGS)}")
        whole = self.rounding == DISCQUANT
        self._default("two_sided", self.rounding == LDLQ)
        self._default("token_weights", 0.2 if self.two_sided else 0.0)
        self._default("drift_correction", 0.0 if whole else 0.2)
        self._default("rounding_steps", ROUNDING_STEPS if whole else None)
        if self.two_sided and self.rounding != LDLQ:
            raise ValueError(
                f"rounding is {self.rounding}, which feeds nothing back along outputs: leave --two-sided away"
            )
        if whole and self.drift_correction:
            raise ValueError(
                f"drift_correction is {self.drift_correction}: {DISCQUANT} knows all layers' errors; leave it away"
            )
        if self.rounding_steps is not None and (not whole or self.rounding_steps < 1):
            raise ValueError(
                f"rounding_steps is {self.rounding_steps} with rounding {self.rounding}: give at least 1, with "
                f"{DISCQUANT}"
            )
        codes = {self.code, *(stored.code for _, stored in self.plan if stored is not None)}
        foreign = [code for code in sorted(codes) if not FORMATS[code].quantized]
        if foreign:
            raise ValueError(
                f"code is {foreign[0]}, whose tables come with checkpoints of other programs: nothing here makes one; "
                "give another --code"
            )
        others = [code for code in sorted(codes) if FORMATS[code].method != "quip"]
        if self.rounding in (GREEDY, DISCQUANT) and others:
            raise ValueError(
                f"rounding is {self.rounding}, which moves single weights, and a weight of code {others[0]} has no "
                "level of its own: give --method quip, or another --rounding"
            )

    def _default(self, name: str, value: float | None) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def batch(self) -> int:
        """Sequences that are run at a time, where there are so many."""
        return max(1, BATCH_TOKENS // self.sequence_length)

    @property
    def trains(self) -> bool:
        """Whether something is trained, against the outputs of the original layers."""
        return self.tune in (BLOCKS, FULL)

    @property
    def sources(self) -> list[str]:
        """The sources that `calibration` names."""
        return self.calibration.split(",")

    @property
    def devices(self) -> list[str]:
        """Names of the devices, of which the first runs and trains the model."""
        return self.device.split(",")

    @property
    def backward(self) -> bool:
        """Whether the original model runs backwards once."""
        return self.token_weights > 0 or self.two_sided

    @cached_property
    def _planned(self) -> dict[str, LayerFormat | None]:
        return dict(self.plan)

    def layer_format(self, name: str) -> LayerFormat | None:
        """Code and bits of the linear layer `name` inside the decoder layers; None where it keeps its weight."""
        if self.plan:
            return self._planned[name]
        if any(re.search(pattern, name) for pattern in self.ignore):
            return None
        bits = [bits for pattern, bits in self.overrides if re.search(pattern, name)]
        return LayerFormat(self.code, bits[-1] if bits else self.bits)

    def spec(self, name: str, stored: LayerFormat, n: int, k: int, rotate_output: bool = True) -> LinearSpec:
        """The layer `name` of n outputs and k inputs, with rotations that can be cut as the settings ask.

        Raises:
            ValueError: it is not known how vLLM cuts the layer, or its sizes cannot be cut.
        """
        if self.split is not None and self.split > 1 and rotate_output:
            stored = chunked(name, stored, n, k, self.split)
        return stored.spec(k, (n,), self.hadamard_block, rotate_output)

    def with_plan(self, planned: Planned) -> "Settings":
        """The same with a plan, which replaces what was said of single layers. Raises ValueError where it keeps all."""
        usual = most_common(planned)
        none: dict[str, Any] = {"ignore": (), "overrides": (), "lm_head": None, "embedding": None}
        return dataclasses.replace(self, code=usual.code, bits=usual.bits, plan=planned, **none)

    @property
    def described(self) -> str:
        """What a run does, for its progress bar."""
        return "quantize by plan" if self.plan else f"quantize to {self.bits} bits"

    def overridden(self, name: str) -> bool:
        """Whether one of `overrides` says the bits of the linear layer `name`."""
        return any(re.search(pattern, name) for pattern, _ in self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: lists where the attributes are tuples, and of the plan 16 hexadecimal digits of its digest."""
        raw = dataclasses.asdict(self)
        plan = hashlib.sha256(repr(self.plan).encode()).hexdigest()[:16] if self.plan else None
        return raw | {"ignore": list(self.ignore), "overrides": [list(item) for item in self.overrides], "plan": plan}


def default_code(method: str, bits: int) -> str:
    """The code of a method where the user names none (docs/benchmarks: quality.md, cpu.md).

    For qtip it is hyb up to 2 bits: a CPU serves hyb at least 1.6 times as fast as 1mad, for 1 % of perplexity. Above 2
    bits it is 1mad: at 4 bits hyb's 1024 vectors make the proxy loss a sixth larger, and hyb has no higher bit rates.
    """
    if method == "qtip":
        return "hyb" if bits <= 2 else "1mad"
    return methods()[method][0].name
