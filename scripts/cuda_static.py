# SPDX-License-Identifier: Apache-2.0
"""Counts what the CUDA kernels issue for a weight, without a GPU: compiles, disassembles, finds the loops.

Usage: python scripts/cuda_static.py [--check [--built]] [--targets 80 90 ...] [--codes hyb e8p ...] [--jobs 2]

Writes docs/benchmarks/cuda_static.csv, a row a kernel and target, and the tables of cuda_static.md there. With --check
it writes nothing, and names what is off: a limit that is missed, or a figure that has left the CSV's by 5 %. Of fewer
targets or codes than all it prints the tables. Needs nvcc and nvdisasm; compiled files are kept in build/cuda_static,
by a hash of the sources. With --built it compiles nothing and reads quip_vllm/lib, for which it needs cuobjdump.
"""

import argparse
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sass
from benchmarking import ORIGIN, ROOT, origin, write_rows
from cuda_static_page import code_of, launched, limit, misses, read, tables, write_tables
from gpu_model import TARGETS, WEIGHTS, Kernel, best_block, kernel_of
from tqdm import tqdm

SOURCES, CACHE = ROOT / "kernels" / "cuda", ROOT / "build" / "cuda_static"
LIBRARY = ROOT / "quip_vllm" / "lib" / "libquip_vllm_cuda.so"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
FILES = {
    "1mad": "gemm_1mad",
    "1mad_int8": "gemm_1mad_bytes",
    "3inst": "gemm_3inst",
    "hyb": "gemm_hyb",
    "e8p": "gemm_e8p",
    "lut": "gemm_lut",
    "rotation": "rotation",
}
"""What --codes names -> the source, without its suffix."""

CLASSES = [*sass.CLASSES, sass.OTHER]
KEYS = ["kernel", "bits", "column_tiles", "depth", "target"]
COLUMNS = [
    *KEYS,
    "instructions",
    *CLASSES,
    "alu",
    "wavefronts",
    "registers",
    "spill_bytes",
    "barriers",
]
COLUMNS += ["warps_n", "shared_bytes", "blocks_per_sm", "warps_per_sm", "tools", *ORIGIN[1:]]
COMPARED = {"instructions": 0.05, "mma": 0.0, "registers": 0.05}
"""Columns that --check compares, and by how much they may differ."""

ALU = ("LOP3", "SHF", "PRMT", "IADD3", "IADD", "VIADD", "ISETP", "LEA", "SEL", "IMNMX", "VIMNMX", "VIADDMNMX", "PLOP3")
Row = dict[str, Any]


class StaticError(RuntimeError):
    """Something needed is not installed, or a source does not compile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts, then writes, prints or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--built", action="store_true", help="with --check: the built library, whole")
    parser.add_argument("--targets", nargs="+", type=int, default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--codes", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--jobs", type=int, default=2, help="compilations side by side")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "benchmarks" / "cuda_static.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks" / "cuda_static.md")
    args = parser.parse_args(arguments)
    try:
        if args.built and not args.check:
            raise StaticError("--built goes with --check: the CSV is of compiled files.")
        rows, problems = measure_built() if args.built else measure(args.codes, args.targets, args.jobs)
    except StaticError as error:
        print(error, file=sys.stderr)
        return 2
    problems += violations(rows)
    if args.check:
        problems += drift(rows, read(args.csv) if args.csv.exists() else [], args.codes, args.targets)
    elif len(args.codes) < len(FILES) or len(args.targets) < len(TARGETS):
        print(tables(rows))
    else:
        write_rows(args.csv, COLUMNS, rows)
        write_tables(args.page, tables(read(args.csv)))
        print(f"wrote {args.csv} and the tables of {args.page}")
    print("\n".join(problems) or "every limit is met", file=sys.stderr)
    return int(bool(problems) and args.check)


def measure(codes: Iterable[str], targets: Iterable[int], jobs: int) -> tuple[list[Row], list[str]]:
    """Compiles and counts: the rows of the table, and a sentence for each kernel that is not as it should be.

    Raises:
        StaticError: no nvcc, no nvdisasm, or a source does not compile.
    """
    compiler, disassembler = find_nvcc(), find_tool("nvdisasm")
    shared = {"tools": f"{_version('nvcc', compiler)}, {_version('nvdisasm', disassembler)}", **origin("")}
    del shared["threads"]
    work = [(FILES[code], target) for code in codes for target in targets]
    rows: list[Row] = []
    problems: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        listings = pool.map(lambda item: listing(compiler, disassembler, *item), work)
        try:
            for (_, target), (text, log) in zip(work, tqdm(listings, total=len(work), unit="file"), strict=True):
                more, wrong = figures(text, log, target)
                rows += more
                problems += wrong
        except StaticError:
            pool.shutdown(cancel_futures=True)
            raise
    return [row | shared for row in rows], problems


def measure_built(library: Path = LIBRARY) -> tuple[list[Row], list[str]]:
    """The same of a built library, with all that is in it.

    Raises:
        StaticError: no cuobjdump, no nvdisasm, no library, or one older than its sources.
    """
    extractor, disassembler = find_tool("cuobjdump"), find_tool("nvdisasm")
    newest = max(path.stat().st_mtime for path in SOURCES.iterdir())
    if not library.exists() or library.stat().st_mtime < newest:
        raise StaticError(f"{library} is not there, or older than its sources: run make build.")
    tools = f"the library's nvcc, {_version('nvdisasm', disassembler)}"
    rows: list[Row] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        _run([extractor, "-xelf", "all", str(library)], folder)
        files = [path for target in TARGETS for path in sorted(Path(folder).glob(f"*.sm_{target}.cubin"))]
        logs = pool.map(lambda path: _run([extractor, "-res-usage", str(path)])[0], files)
        texts = pool.map(lambda path: _run([disassembler, "-c", str(path)])[0], files)
        for path, text, log in zip(files, texts, logs, strict=True):
            more, wrong = figures(text, log, int(path.suffixes[-2].removeprefix(".sm_")))
            rows += more
            problems += wrong
    return [row | {"tools": tools} for row in rows], problems


def find_nvcc() -> str:
    """The compiler on PATH or in CUDA_HOME.

    Raises:
        StaticError: there is none.
    """
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    found = shutil.which("nvcc") or (str(home) if home.exists() else None)
    if found is None:
        raise StaticError("There is no nvcc: install the CUDA toolkit 13, or set CUDA_HOME to where it is.")
    return found


def find_tool(name: str) -> str:
    """nvdisasm or cuobjdump on PATH, of the package nvidia-cuda-NAME, or of triton.

    Raises:
        StaticError: there is none.
    """
    if found := shutil.which(name):
        return found
    for folder in map(Path, site.getsitepackages()):
        for path in [
            *folder.glob(f"nvidia/*/bin/{name}"),
            folder / "triton" / "backends" / "nvidia" / "bin" / name,
        ]:
            if path.exists():
                path.chmod(path.stat().st_mode | 0o111)  # the package forgets to
                return str(path)
    raise StaticError(f"There is no {name}: pip install nvidia-cuda-{name}, or put one on PATH.")


def _version(name: str, tool: str) -> str:
    text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d[\d.]*)", text)
    return f"{name} {found.group(1) if found else 'unknown'}"


def listing(compiler: str, disassembler: str, name: str, target: int) -> tuple[str, str]:
    """The machine code of a source for a target, and what ptxas says; compiled once for each state of the sources.

    Raises:
        StaticError: a tool fails.
    """
    source, flags = SOURCES / f"{name}.cu", [*FLAGS, f"-arch=sm_{target}"]
    state = hashlib.sha256(" ".join([_version("nvcc", compiler), *flags]).encode())
    for path in [source, *sorted(SOURCES.glob("*.h"))]:
        state.update(path.read_bytes())
    cubin = CACHE / f"{name}.sm_{target}.{state.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".txt")
    if not log.exists():
        for old in CACHE.glob(f"{name}.sm_{target}.*"):
            old.unlink()
        CACHE.mkdir(parents=True, exist_ok=True)
        log.with_suffix(".tmp").write_text(_run([compiler, *flags, str(source), "-o", str(cubin)])[1])
        log.with_suffix(".tmp").rename(log)
    return _run([disassembler, "-c", str(cubin)])[0], log.read_text()


def _run(command: list[str], folder: str | None = None) -> tuple[str, str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise StaticError(f"{' '.join(command)} fails:\n{done.stderr[-2000:]}")
    return done.stdout, done.stderr


USED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    r"(?:, used (\d+) barriers)?",
    re.DOTALL,
)


OF_BUILT = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")


def resources(log: str) -> dict[str, Row]:
    """Mangled name -> what ptxas -v, or cuobjdump, says that a kernel uses; of the stack that is for spills here."""
    compiled = {
        name: {"registers": int(registers), "spill_bytes": int(stores) + int(loads), "barriers": int(barriers or 0)}
        for name, stores, loads, registers, barriers in USED.findall(log)
    }
    built = OF_BUILT.findall(log)
    return compiled | {name: {"registers": int(regs), "spill_bytes": int(stack)} for name, regs, stack in built}


def figures(text: str, log: str, target: int) -> tuple[list[Row], list[str]]:
    """The rows of a listing, and a sentence for each kernel that is not as it should be."""
    used, rows, problems = resources(log), [], []
    for name, parts in sass.functions(text).items():
        kernel = kernel_of(name)
        if kernel is not None and not kernel.runs_on(TARGETS[target]):
            continue
        row = {"target": target, **used[name]}
        if kernel is None:
            row["kernel"] = next(known for known in ("rotate_in", "rotate_out", name) if known in name)
        else:
            row |= identity(kernel)
            try:
                row |= counts(kernel, parts, target, row["registers"])
            except sass.ShapeError as error:
                problems.append(f"{label(row)}: {error}.")
        problems += [f"{label(row)}: {fault}." for fault in faults(kernel, parts, row)]
        rows.append(row)
    return sorted(rows, key=lambda row: [str(row.get(key, "")) for key in KEYS]), problems


def identity(kernel: Kernel) -> Row:
    """The columns that name a kernel."""
    sizes = {"bits": kernel.bits, "column_tiles": kernel.column_tiles, "depth": kernel.depth}
    return {"kernel": kernel.code, **sizes}


def label(row: Row) -> str:
    """How a sentence names a row."""
    if not row.get("bits"):
        return f"{row['kernel']} on sm_{row['target']}"
    sizes = f"{row['bits']} bits, {row['column_tiles']} column tiles, depth {row['depth']}"
    return f"{row['kernel']}, {sizes}, on sm_{row['target']}"


def faults(kernel: Kernel | None, parts: list[sass.Block], row: Row) -> list[str]:
    """What no kernel may have, and what one that multiplies must have."""
    found = [f"has {opcode}" for opcode in sass.forbidden(parts)]
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if kernel is not None:
        found += [] if sass.has(parts, "HMMA", "IMMA") else ["has no multiplication on the tensor cores"]
        found += [] if sass.has(parts, sass.COPY) else ["has no asynchronous copy"]
    return found


def counts(kernel: Kernel, parts: list[sass.Block], target: int, registers: int) -> Row:
    """Instructions a weight of the loop over stages, and the block that is launched.

    Raises:
        sass.ShapeError: the loops are not those of the source.
    """
    block = best_block(kernel, TARGETS[target], registers)
    if block is None:
        return {"warps_per_sm": 0}  # such a depth is not chosen
    tail, stages = sass.nest(parts)
    stage = sass.turn(parts, stages, tail, kernel.copies(block.warps_n))
    weights = sass.by_class(stage)["mma"] * kernel.weights_per_multiplication
    if weights != WEIGHTS * kernel.depth:
        raise sass.ShapeError(
            f"a stage has {weights:g} weights of a lane, where {kernel.depth} chunks have {WEIGHTS} each"
        )

    def spread(count: Any) -> float:
        return count(stage) / weights

    classes = {name: spread(lambda found, name=name: sass.by_class(found)[name]) for name in CLASSES}
    return {
        "instructions": spread(len),
        **classes,
        "alu": spread(lambda found: sum(i.opcode in ALU for i in found)),
        "wavefronts": spread(sass.wavefronts) + kernel.conflicts,
        "warps_n": block.warps_n,
        "shared_bytes": kernel.shared_bytes(block.warps_n),
        "blocks_per_sm": block.blocks,
        "warps_per_sm": block.warps,
    }


def violations(rows: Iterable[Row]) -> list[str]:
    """A sentence for each limit that a kernel which is launched misses, and for each kernel that fits no block."""
    rows = list(rows)
    chosen, found = launched(rows), []
    for row in chosen:
        most = limit(chosen, code_of(row), row["bits"], row["column_tiles"], row["target"])
        if misses(row, most):
            found.append(f"{label(row)}: {row['instructions']:.2f} instructions a weight, the limit is {most:.2f}.")
    runs = {tuple(row[key] for key in KEYS if key != "depth") for row in chosen}
    for row in rows:
        if row.get("warps_per_sm") == 0 and tuple(row[key] for key in KEYS if key != "depth") not in runs:
            found.append(f"{label(row)}: no block of it fits a multiprocessor.")
    return found


def drift(rows: Iterable[Row], written: Iterable[Row], codes: Sequence[str], targets: Sequence[int]) -> list[str]:
    """A sentence for each figure that is no longer the CSV's, and for each kernel that only one of them has."""
    new, old = ({tuple(row.get(key) for key in KEYS): row for row in some} for some in (rows, written))
    found = []
    for key, row in old.items():
        code = "rotation" if row["kernel"].startswith("rotate") else code_of(row)
        if code in codes and row["target"] in targets and key not in new:
            found.append(f"{label(row)}: only the CSV has it.")
    for key, row in new.items():
        if key not in old:
            found.append(f"{label(row)}: the CSV does not have it.")
            continue
        for column, tolerance in COMPARED.items():
            now, was = row.get(column, 0), old[key].get(column, 0)
            if abs(now - was) > tolerance * was + 0.0005:
                found.append(f"{label(row)}: {column} is {now:.5g}, {was:.5g} in the CSV.")
    if found:
        tools = [next(iter(some.values()), {}).get("tools") for some in (old, new)]
        found.append(f"Run scripts/cuda_static.py if that is meant; the CSV is of {tools[0]}, this run of {tools[1]}.")
    return found


if __name__ == "__main__":
    sys.exit(main())
