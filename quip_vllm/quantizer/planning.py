# SPDX-License-Identifier: Apache-2.0
"""From a target, bits per weight or bytes in all, to a plan: code and bits of every layer (docs/quantizer.md)."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from quip_vllm import __version__
from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.hub import local_folder
from quip_vllm.formats.spec import FORMATS, methods
from quip_vllm.formats.tensors import layout
from quip_vllm.quantizer import checks
from quip_vllm.quantizer.allocation import Choice, allocate, evenly
from quip_vllm.quantizer.devices import usable_devices
from quip_vllm.quantizer.losses import measure
from quip_vllm.quantizer.noise import noisy_divergences
from quip_vllm.quantizer.plan import bytes_of, make_plan, with_split
from quip_vllm.quantizer.settings import Settings, default_code
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel

LEAST, MOST = 1.5, 8.0
"""Bits a weight that may be asked for."""
TOKENS = 20_480
"""Tokens of the calibration text that are used at most: four fifths to measure, the rest to compare with noise."""
HEADER_BYTES = 128
"""What a tensor takes in the header of its file, about."""

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What a plan is to reach, by one of two words.

    Attributes:
        bits: the mean of the code bits of the weights inside the decoder layers, `ignore`d ones left out.
        size: bytes of all tensors. Head and embedding are then planned, too, unless the settings give their bits.
        code: the only code; None takes the default one of each bit rate.

    Raises:
        ValueError: the bits are out of range.
    """

    bits: float | None
    size: int | None = None
    code: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what was not said."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __post_init__(self) -> None:
        if self.bits is not None and not LEAST <= self.bits <= MOST:
            raise ValueError(f"--bits is {self.bits:g}: give bits per weight from {LEAST:g} to {MOST:g}")


@torch.no_grad()
def make_plan_file(settings: Settings, target: Target, folder: Path) -> dict[str, Any]:
    """Measures the model and chooses.

    Args:
        settings: as for a run; `bits` counts only for what `target` leaves open.
        target: what to reach.
        folder: for temporary files.

    Returns:
        The plan as a JSON object: what `plan_file.read_plan` reads, and figures for a person.

    Raises:
        ValueError: the target cannot be reached, or the model cannot be quantized.
    """
    trust, (device,) = settings.trust_remote_code, usable_devices(settings.devices[:1])
    source = LayeredModel(local_folder(settings.model, trust), trust, str(device))
    settings = with_split(settings, source)
    checks.check_window(settings, source)
    planner = _Planner(settings, target, source)
    tokens = calibration_tokens(settings, source.folder, source.vocabulary)
    count = min(len(tokens), max(2, TOKENS // tokens.shape[1]))
    chosen = tokens[torch.arange(count) * len(tokens) // count]
    held = torch.arange(count) % 5 == 4 if count > 4 else torch.arange(count) == count - 1
    checks.check_memory(replace(settings, drift_correction=1.0), source, count)
    formats = planner.by_layer(planner.formats)
    losses, of_noise = measure(source, formats, chosen[~held], settings.batch, settings, folder)
    of_choice: dict[str, dict[Choice, float]] = {
        name: {one: sum(losses[layer][one] for layer in planner.layers(name)) if one else 0.0 for one in of}
        for name, of in planner.with_kept().items()
    }
    best = allocate(of_choice, planner.sizes, planner.budget)
    even = planner.even(best)
    plan = planner.to_dict(best, losses)
    if any(even[name] != best[name] for name in best):
        variances = [
            {
                name: losses[name][stored] / of_noise[name]
                for name, stored in planner.by_layer(each).items()
                if of_noise.get(name) and stored
            }
            for each in (best, even)
        ]
        ours, evens = noisy_divergences(source, chosen[held], settings.batch, variances, settings.seed)
        other = planner.to_dict(even, losses)
        if evens < ours:
            _LOG.warning("an even mixture of the same size is better on held-out text: the plan is that")
        plan |= {"kl_with_noise": ours, **(other if evens < ours else {})}
        plan["even"] = {"loss": other["loss"], "kl_with_noise": evens, "chosen": evens < ours}
    return plan


class _Planner:
    """The formats between which to choose, their sizes, and the budget.

    The first expert of a mixture stands for all of them: the gates of all get one format, and so do the ups and downs.

    Attributes:
        formats: layer -> its formats; the linear layers in the order of the model, then embedding and head. Those that
            keep their weight in any case are left out.
        sizes: layer -> choice -> size, in the unit of `budget`; None keeps the weight.
        budget: what they may take in all.

    Raises:
        ValueError: no choice fits the budget, or the formats do not reach it.
    """

    def __init__(self, settings: Settings, target: Target, source: LayeredModel):
        self.settings, self.target, self.source = settings, target, source
        mixtures = [mixture for index in range(len(source.layers)) for mixture in source.mixtures(index)]
        self._alike = {names[0]: names for mixture in mixtures for names in mixture.alike}
        others = {name for names in self._alike.values() for name in names[1:]}
        self.linears = [[one for one in source.linears(i) if one not in others] for i in range(len(source.layers))]
        specs = make_plan(settings, source).specs  # what can be quantized, and what the user wants of single layers
        said = {name: spec for name, spec in specs.items() if name not in others}
        inside = [name for of_layer in self.linears for name in of_layer if name in said]
        rows = {name for name in (source.embedding_name, source.head_name) if name is not None}
        self.choosable = sorted(rows - set(said)) if target.size is not None else []
        rows &= {*said, *self.choosable}
        shapes = source.reader.shapes
        self.weights = {name: len(self.layers(name)) * math.prod(shapes[f"{name}.weight"]) for name in inside}
        replaced = {f"{one}.weight" for name in [*inside, *rows] for one in self.layers(name)}
        replaced |= source.head_weights if source.tied and rows else set()
        kept = [size for name, size in source.reader.bytes_of.items() if name not in replaced]
        self.other_bytes = sum(kept) + HEADER_BYTES * len(kept)
        method = FORMATS[settings.code].method
        rates = sorted({bits for one in methods()[method] for bits in one.bits})
        all_rates = [LayerFormat(target.code or default_code(method, bits), bits) for bits in rates]
        ladder = [one for one in all_rates if one.bits in one.format.bits]
        given = {name: [LayerFormat(spec.code, spec.bits)] for name, spec in said.items()}
        self.formats = {name: given.get(name, ladder) for name in sorted(rows)}
        about = target.bits or self._bits_of_size(ladder)
        near = [one for one in ladder if math.floor(about) - 1 <= one.bits <= math.ceil(about) + 2]
        overridden = {name for name in inside if settings.overridden(name)}
        self.formats = {name: given[name] if name in overridden else near for name in inside} | self.formats
        self.sizes = {name: {one: self._size(name, one) for one in of} for name, of in self.with_kept().items()}
        self.budget = target.size - self.other_bytes if target.size else int(about * sum(self.weights.values()) + 1e-6)
        least = sum(min(of.values()) for of in self.sizes.values())
        if least > self.budget or about > ladder[-1].bits or not near:
            raise ValueError(self._out_of_reach(least, ladder))

    def layers(self, name: str) -> list[str]:
        """The layers for which `name` stands."""
        return self._alike.get(name, [name])

    def by_layer(self, chosen: Mapping[str, T]) -> dict[str, T]:
        """What is chosen, of every layer."""
        return {layer: what for name, what in chosen.items() for layer in self.layers(name)}

    def with_kept(self) -> dict[str, list[Choice]]:
        """Layer -> what it may become."""
        return {name: [*of, *[None][: name in self.choosable]] for name, of in self.formats.items()}

    def bytes(self, name: str, stored: Choice) -> int:
        """Of a layer's tensors and their headers."""
        if stored is None:
            return self.source.reader.bytes_of[f"{name}.weight"] + HEADER_BYTES
        n, k = self.source.reader.shapes[f"{name}.weight"]
        spec = self.settings.spec(name, stored, n, k, rotate_output=name in self.weights)
        return len(self.layers(name)) * (bytes_of(spec) + HEADER_BYTES * len(layout(spec)))

    def _size(self, name: str, stored: Choice) -> int:
        """Bytes where the target is a size; else bits, of which rows of tokens have none."""
        if self.target.size is not None:
            return self.bytes(name, stored)
        return self.weights.get(name, 0) * stored.bits if stored is not None else 0

    def _bits_of_size(self, ladder: Sequence[LayerFormat]) -> float:
        """About how many bits per weight a size leaves for the linear layers, where head and embedding have 4."""
        four = {name: min(of, key=lambda one: abs(one.bits - 4)) for name, of in self.formats.items()}
        left = (self.target.size or 0) - self.other_bytes - sum(self.bytes(*one) for one in four.items())
        return min(max(8 * left / max(1, sum(self.weights.values())), ladder[0].bits), ladder[-1].bits)

    def _out_of_reach(self, least: int, ladder: Sequence[LayerFormat]) -> str:
        if self.target.size is not None:
            return (
                f"--size is {self.target.size:,} bytes, and the smallest formats make {least + self.other_bytes:,}: "
                "give at least that, or another --method"
            )
        method, bits = FORMATS[self.settings.code].method, [one.bits for one in ladder]
        return (
            f"--bits is {self.target.bits:g}, and {method} makes {bits[0]} to {bits[-1]} bits per weight, --override "
            "excepted: give bits between, or another --method"
        )

    def even(self, best: Mapping[str, Choice]) -> dict[str, Choice]:
        """The even mixture as large as `best`, of the linear layers that have a choice; all else as in `best`."""
        free = [[name for name in of_layer if len(self.formats.get(name, ())) > 1] for of_layer in self.linears]
        sizes = {name: self.sizes[name] for of_layer in free for name in of_layer}
        budget = sum(of[best[name]] for name, of in sizes.items())
        return {**best, **(evenly(sizes, [one for one in free if one], budget) if sizes else {})}

    def to_dict(
        self, chosen: Mapping[str, Choice], losses: Mapping[str, Mapping[LayerFormat, float]]
    ) -> dict[str, Any]:
        """The plan as JSON."""
        inside = [name for index in range(len(self.linears)) for name in self.source.linears(index)]
        layers: dict[str, Any] = {name: {"code": None, "bits": None} for name in inside}
        for name, stored in self.by_layer(chosen).items():
            table = [
                {"code": of.code, "bits": of.bits, "loss": float(f"{loss:.6g}")} for of, loss in losses[name].items()
            ]
            layers[name] = {"code": stored and stored.code, "bits": stored and stored.bits, "losses": table}
        coded = sum(size * stored.bits for name, size in self.weights.items() if (stored := chosen[name]) is not None)
        return {
            "quip_vllm": __version__,
            "target": self.target.to_dict(),
            "settings": self.settings.to_dict(),
            "bits": coded / max(1, sum(self.weights.values())),
            "bytes": self.other_bytes + sum(self.bytes(*one) for one in chosen.items()),
            "loss": sum(losses[name][stored] for name, stored in self.by_layer(chosen).items() if stored is not None),
            "layers": layers,
        }
