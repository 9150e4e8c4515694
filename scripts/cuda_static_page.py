# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/benchmarks/cuda_static.md, from the rows of its CSV."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sass
from benchmarking import read_rows
from gpu_model import ENOUGH_WARPS, GPUS, KIB, cycles

CODES = ("e8p", "hyb", "1mad", "1mad_int8", "3inst", "lut")
SHOWN_BITS, SHOWN_TARGETS = (2, 3, 4), (80, 90)
TEXT = ("kernel", "tools", "commit", "machine", "command")
"""Columns of the CSV that are no numbers."""
BEGIN, END = "<!-- tables of cuda_static.py: begin -->", "<!-- tables of cuda_static.py: end -->"
LIMITS = {"hyb": 3.3, "e8p": 3.8, "1mad": 4.8, "1mad_int8": 3.2, "3inst": 5.6}
"""Instructions a weight of one row at 2 bits."""
LIMITED, MORE_BITS, MORE_ROWS = (80, 90), 0.5, 0.7
"""Targets with limits; what 3 and 4 bits, and 16 rows, may take more."""

PEERS = {
    "QTIP, HYB (3.7, 4.6 on sm_120)": {"A100": 0.60, "H100": 0.56, "RTX 3090": 1.2, "RTX 4090": 2.6, "RTX 5090": 1.8},
    "QuIP#, E8P (3.8)": {"A100": 0.62, "H100": 0.57, "RTX 3090": 1.2, "RTX 4090": 2.6, "RTX 5090": 1.8},
    "EXL3, one row (9.5)": {"A100": 0.25, "H100": 0.23, "RTX 3090": 0.50, "RTX 4090": 1.1, "RTX 5090": 0.77},
}
"""Others' kernels at 2 bits, with instructions a weight: their share by the same model. Counted once, not here."""

Row = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the CSV, see ``numbers``."""
    return [numbers(row) for row in read_rows(path)]


def numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """A CSV's row with numbers for what are numbers, without its empty cells."""
    return {key: value if key in TEXT else _number(value) for key, value in row.items() if value != ""}


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def code_of(row: Row) -> str:
    """The code of a kernel, without the size of its tables."""
    return str(row["kernel"]).removesuffix("_large")


def launched(rows: Iterable[Row]) -> list[Row]:
    """Of the kernels for the same code, bits, rows and target the one expected to run.

    Where shared memory is scarce a deep pipeline leaves few warps: of those with two warps a scheduler the deepest,
    else the one with the most warps.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "instructions" in row:
            groups.setdefault((row["kernel"], row["bits"], row["column_tiles"], row["target"]), []).append(row)
    return [
        max(group, key=lambda row: (min(row["warps_per_sm"], ENOUGH_WARPS), row["depth"])) for group in groups.values()
    ]


def find(rows: Iterable[Row], code: str, bits: int, column_tiles: int, target: int) -> Row | None:
    """The row of ``launched`` rows that has these; None: there is none."""
    wanted = bits, column_tiles, target
    found = (r for r in rows if code_of(r) == code and (r["bits"], r["column_tiles"], r["target"]) == wanted)
    return next(found, None)


def limit(rows: Sequence[Row], code: str, bits: int, column_tiles: int, target: int) -> float | None:
    """The most instructions a weight that a kernel may take; None: as many as it likes."""
    if code not in LIMITS or target not in LIMITED or bits not in SHOWN_BITS or column_tiles > 2:
        return None
    if column_tiles == 1:
        return LIMITS[code] + (MORE_BITS if bits > 2 else 0)
    one = find(rows, code, bits, 1, target)
    return one["instructions"] + MORE_ROWS if one else None


def misses(row: Row, most: float | None) -> bool:
    """Whether a row is above its limit, as both are written: with two digits."""
    return most is not None and round(row["instructions"], 2) > round(most, 2)


def shares(row: Row, code: str, bits: int, gpu: str) -> tuple[float, str]:
    """The share of DRAM bandwidth that the instructions of a row allow, and what limits it."""
    parts = cycles(GPUS[gpu], code, row)
    slowest = max(parts, key=lambda part: parts[part])
    return GPUS[gpu].slots(bits) / parts[slowest], slowest


def tables(rows: Sequence[Row]) -> str:
    """All tables, in Markdown."""
    chosen = launched(rows)
    parts = [
        _origin(rows),
        "Instructions a weight, in all:",
        _instructions(chosen),
        "By class, 2 bits, one row, sm_90 (`MMA`: HMMA or IMMA; `other` is what has no column):",
        _classes(chosen, 90),
        "Depth, registers, KiB of shared memory of the largest block, and warps that a multiprocessor holds of it:",
        _blocks(chosen),
        "Predicted share of DRAM bandwidth, one row, 2 bits / 4 bits:",
        _shares(chosen),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _origin(rows: Sequence[Row]) -> str:
    row = rows[0]
    return f"`{row['command']}`, {row['tools']}, commit {row['commit']}, {row['machine']}."


def _instructions(chosen: Sequence[Row]) -> str:
    places = [(tiles, target) for tiles in (1, 2) for target in SHOWN_TARGETS]
    head = ["code", "bits", *(f"{'one row' if tiles == 1 else '16 rows'}, sm_{target}" for tiles, target in places)]
    lines = []
    for code in CODES:
        for bits in SHOWN_BITS:
            cells = [_count(chosen, code, bits, *place) for place in places]
            if any(cells):
                most = limit(chosen, code, bits, 1, SHOWN_TARGETS[0])
                lines.append([code, str(bits), *cells, f"{most:.1f}" if most else "", f"{MORE_ROWS}" if most else ""])
    return _table([*head, "limit, one row", "limit of what 16 rows add"], lines)


def _count(chosen: Sequence[Row], code: str, bits: int, tiles: int, target: int) -> str:
    row = find(chosen, code, bits, tiles, target)
    if row is None:
        return ""
    text = f"{row['instructions']:.2f}"
    return f"**{text}**, missed" if misses(row, limit(chosen, code, bits, tiles, target)) else text


def _classes(chosen: Sequence[Row], target: int) -> str:
    names = [*sass.CLASSES, sass.OTHER]
    found = {code: find(chosen, code, 2, 1, target) for code in CODES}
    head = ["code", "all", *(name if name == sass.OTHER else name.upper() for name in names)]
    lines = [
        [code, *(f"{row[name]:.2f}" if row[name] else "" for name in ("instructions", *names))]
        for code, row in found.items()
        if row
    ]
    return _table(head, lines)


def _blocks(chosen: Sequence[Row]) -> str:
    places = [(tiles, target) for tiles in (1, 2) for target in SHOWN_TARGETS]
    head = ["code", "bits", *(f"{'one row' if tiles == 1 else '16 rows'}, sm_{target}" for tiles, target in places)]
    lines = []
    for code in CODES:
        for bits in SHOWN_BITS:
            found = [find(chosen, code, bits, *place) for place in places]
            if any(found):
                lines.append([code, str(bits), *(_block(row) if row else "" for row in found)])
    return _table(head, lines)


def _block(row: Row) -> str:
    kib = row["shared_bytes"] / KIB
    return f"{row['depth']}, {row['registers']}, {kib:.0f}, {row['warps_per_sm']}"


def _shares(chosen: Sequence[Row]) -> str:
    lines = []
    for code in CODES:
        cells = [_share(chosen, code, gpu) for gpu in GPUS]
        if any(cells) and code != "lut":
            row = find(chosen, code, 2, 1, GPUS["A100"].target)
            lines.append([code, *cells, shares(row, code, 2, "A100")[1] if row else ""])
    for name, known in PEERS.items():
        lines.append([name, *(f"{known[gpu]:.2f}" if gpu in known else "" for gpu in GPUS), ""])
    return _table(["code", *GPUS, "bound by, on an A100, 2 bits"], lines)


def _share(chosen: Sequence[Row], code: str, gpu: str) -> str:
    found = [find(chosen, code, bits, 1, GPUS[gpu].target) for bits in (2, 4)]
    if not all(found):
        return ""
    return " / ".join(f"{shares(row, code, row['bits'], gpu)[0]:.2f}" for row in found if row)


def write_tables(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replaces what is between two marks of the page.

    Raises:
        ValueError: it lacks one of them.
    """
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{page} needs one line {begin} and one {end}: the tables go between them")
    before, rest = whole.split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
