# SPDX-License-Identifier: Apache-2.0
"""A plan in a file: code and bits of every layer, the losses beside, for a person to read and to edit."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.store import read_json

Planned = tuple[tuple[str, LayerFormat | None], ...]
"""(layer, its format) for every linear layer, embedding and head that a plan names; None keeps the weight."""


def read_plan(file: Path) -> Planned:
    """The layers of a plan file. What else is in it is for a person.

    Raises:
        ValueError: the file cannot be read, or is no plan; the message names the layer.
    """
    raw = read_json(file).get("layers")
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(f"{file} has no object layers: make a plan with `quip-vllm plan MODEL --bits BITS --out FILE`")
    return tuple((name, _format(f"{file}: layers.{name}", one)) for name, one in raw.items())


def _format(key: str, raw: object) -> LayerFormat | None:
    if not isinstance(raw, Mapping) or "bits" not in raw:
        raise ValueError(f"{key} is {raw!r:.100}: give an object with code and bits; bits null keeps the weight")
    if raw["bits"] is None:
        return None
    stored = LayerFormat(raw.get("code"), raw["bits"])  # type: ignore[arg-type]  # checked next
    try:
        stored.check()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return stored


def most_common(planned: Planned) -> LayerFormat:
    """The format of most layers. Raises ValueError where all keep their weight."""
    counts = Counter(stored for _, stored in planned if stored is not None)
    if not counts:
        raise ValueError("the plan keeps the weight of every layer: give one of them code and bits")
    return counts.most_common(1)[0][0]


def format_plan(plan: Mapping[str, Any]) -> str:
    """The table of a plan for a person: bits of every linear layer, one line a decoder layer, and its totals."""
    rows: dict[str, dict[str, str]] = {}
    for name, one in plan["layers"].items():
        path = name.split(".")
        at = next((i for i, word in enumerate(path) if word.isdecimal()), None)
        column = ".".join(path[-2:]) if any("shared_expert" in one for one in path) else path[-1]
        row, column = (path[at], column) if at is not None else (name, "")
        rows.setdefault(row, {})[column] = "-" if one["bits"] is None else str(one["bits"])
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(map(len, rows))
    lines = ["  ".join([" " * width, *columns]).rstrip()]
    for row, bits in rows.items():
        cells = [bits.get(column, "").rjust(len(column)) for column in columns] if "" not in bits else [bits[""]]
        lines.append("  ".join([row.rjust(width), *cells]).rstrip())
    lines.append(f"{plan['bits']:.3f} bits per weight in the decoder layers, {plan['bytes']:,} bytes in all")
    figures = f"estimated KL divergence {plan['loss']:.4g}"
    if plan.get("even") is not None:
        figures += (
            f", of an even mixture of equal size {plan['even']['loss']:.4g}; with noise of that size on held-out text "
            f"{plan['kl_with_noise']:.4g} and {plan['even']['kl_with_noise']:.4g}"
        )
        if plan["even"]["chosen"]:
            figures += ": the even mixture was better there, so the bits are its own"
    return "\n".join([*lines, figures])
