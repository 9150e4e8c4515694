# SPDX-License-Identifier: Apache-2.0
"""What the tables of the pages have in common: names, numbers and Markdown."""

import re
from collections.abc import Iterable, Sequence

from benchmarking import ROOT

FOLDER = ROOT / "docs" / "benchmarks"
Rows = list[dict[str, str]]

CPUS = {"": "AMD EPYC (Zen 4), AVX-512 VNNI", "_avx2": "AMD EPYC (Zen 3), AVX2", "_amx": "Intel Xeon, AMX"}
"""By the end of a CSV's name: the CPU that made it."""
BASELINES = {"bf16": "bf16", "float32": "bf16 model, computed in float32", "dense": "torch, bf16"}
BASELINES["gptq-int4"] = "GPTQ int4, vLLM's kernel"
LLAMA = "llama.cpp-"
"""Before the type in the name of a GGUF file's row."""


def label(name: str) -> str:
    """quip_sharp-2 -> quip_sharp, 2 bits; names of baselines as in BASELINES."""
    if name in BASELINES:
        return BASELINES[name]
    if name.startswith(LLAMA):
        return name.replace("-", " ")
    words, _, bits = name.rpartition("-")
    return f"{words.replace('-', ' ')}, {bits} bits"


def bits_of(name: str) -> int:
    """The bits in a format's name; 16 for a baseline of 16 or 32 bits."""
    if name.startswith(LLAMA) or name == "gptq-int4":
        return int(re.sub(r"\D", "", name.removeprefix(LLAMA))[0])
    return int(name[-1]) if name[-2] == "-" else 16


def is_peer(name: str) -> bool:
    """Whether a row is another program's format, not ours."""
    return name in BASELINES or name.startswith(LLAMA)


def by_bits(names: Iterable[str]) -> list[str]:
    """Peers beside each other: more bits first, other programs' formats before ours."""
    return sorted(dict.fromkeys(names), key=lambda name: (-bits_of(name), not is_peer(name)))


def fixed(value: str | float, digits: int = 1) -> str:
    """A number with a fixed count of decimals, or with commas between thousands from 1000 on."""
    return f"{float(value):,.0f}" if float(value) >= 1000 else f"{float(value):.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
