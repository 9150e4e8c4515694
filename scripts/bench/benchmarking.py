# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts share: names of formats, random layers, where a figure comes from, CSV files."""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.formats import spec as specs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV, Follows, layout, tensor_specs
from quip_vllm.formats.trellis_codes import HYB

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("quip_vllm", "kernels", "scripts", "pyproject.toml")
ORIGIN = ["threads", "commit", "machine", "command"]
"""Columns that every benchmark's CSV ends with; see ``origin``."""


def format_name(stored: LayerFormat) -> str:
    """quip_sharp-2, qtip-1mad-2: method, code where the method has several, bits."""
    method = stored.format.method
    return "-".join([method, *([stored.code] if method == "qtip" else []), str(stored.bits)])


FORMATS: dict[str, LayerFormat] = {
    format_name(LayerFormat(code, bits)): LayerFormat(code, bits)
    for code, format in specs.FORMATS.items()
    if format.quantized
    for bits in format.bits
}
"""Every format by its name."""

COMMON = [name for name, stored in FORMATS.items() if 2 <= stored.bits <= 4]
"""Formats that the benchmarks measure unless told otherwise: every code at 2 to 4 bits."""


def random_layer(spec: LinearSpec, su: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes in the tensors of a checkpoint, so scaled that unit inputs give outputs of about unit size.

    Args:
        spec: a layer of one part or several.
        su: fp16 [k], the input signs.
        generator: source of the codes and of the output signs.

    Returns:
        The tensors that ``quip_vllm.formats.tensors.layout`` names; each owns its memory.
    """
    types, tensors = layout(spec), {}
    for one in tensor_specs(spec):
        shape, dtype = types[one.name].shape, one.dtypes[0]
        if one.name == SU.name:
            tensors[one.name] = su.clone()
        elif one.name == SV.name:
            tensors[one.name] = random_signs(spec.out_features, generator) * spec.in_features**-0.5
        elif one.follows is Follows.PART:
            tensors[one.name] = HYB.table(spec.bits).repeat(len(spec.output_sizes), 1)
        else:
            kind = torch.iinfo(dtype)
            tensors[one.name] = torch.randint(kind.min, kind.max + 1, shape, dtype=dtype, generator=generator)
    return tensors


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """fp16 [n] of +1 and -1."""
    return torch.randint(0, 2, (n,), generator=generator).half() * 2 - 1


Clock = Callable[[], float]


def seconds(
    call: Callable[[], Any], least_s: float = 0.2, least_calls: int = 3, clock: Clock = time.perf_counter
) -> float:
    """Median time of a call, after one that does not count; goes on until both limits are met."""
    call()
    times: list[float] = []
    while len(times) < least_calls or sum(times) < least_s:
        begin = clock()
        call()
        times.append(clock() - begin)
    return median(times)


def origin(threads: int | str) -> dict[str, Any]:
    """Where a figure comes from: threads, commit ("+" after it: changed since), machine, command without folders."""
    arguments = [re.sub(r"[^\s=]*/", "", argument) for argument in sys.argv[1:]]
    command = " ".join(["python", f"scripts/bench/{Path(sys.argv[0]).name}", *arguments])
    return {"threads": threads, "commit": _commit(), "machine": _machine(), "command": command}


def _commit() -> str:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *MEASURED], cwd=ROOT).returncode == 0
    return head.stdout.strip() + ("" if clean else "+")


def _machine() -> str:
    """Processor, cores this process may use, memory."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name.group(1).strip() if name else 'unknown processor'}, {cores} cores, {memory:.0f} GiB"


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the CSV file; a column that a row lacks stays empty, floats keep five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        for row in rows:
            table.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
