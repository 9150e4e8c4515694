# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels ahead of time, without a GPU; checks them, and counts what they issue for a weight.

Usage: python scripts/triton_static.py [--check] [--targets 80 90 ..] [--codes hyb ..] [--bits 2 ..] [--rows 8 ..]

Every kernel of decode_gemm has to have tensor-core instructions, no spilled registers and at most 99 KB of shared
memory. At one row it may issue 1.6 times the instructions a weight of the CUDA kernel for the same code and bits
(docs/benchmarks/cuda_static.csv). Writes docs/benchmarks/triton_static.csv and the table of cuda_static.md beside it,
unless it is told --check or to do a part; then it prints the table. Exits with 1 where a check fails. Needs triton,
which brings its own tools.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sass
from benchmarking import ROOT, write_rows
from cuda_static_page import find, launched, read, write_tables
from gpu_model import TARGETS
from quip_vllm.formats.methods import Code, Method, supported_bits
from tqdm import tqdm

ROWS = (8, 64)
SHARED_LIMIT = 99 * 1024
RATIO_LIMIT = 1.6
CODES = {"e8p": supported_bits(Method.QUIP_SHARP)}
CODES |= {code.value: supported_bits(Method.QTIP, code) for code in Code}
COLUMNS = ["code", "bits", "rows", "target", "instructions", "cuda", "ratio", *sass.CLASSES, sass.OTHER]
COLUMNS += ["registers", "spill_bytes", "shared_bytes", "warps", "triton"]
MULTIPLICATIONS = ("HMMA", "HGMMA", "UTCHMMA")
BEGIN, END = "<!-- table of triton_static.py: begin -->", "<!-- table of triton_static.py: end -->"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, checks, writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--targets", nargs="+", type=int, default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--codes", nargs="+", default=list(CODES), choices=list(CODES))
    parser.add_argument("--bits", nargs="+", type=int, default=list(range(1, 9)))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), choices=(8, 16, 32, 64))
    args = parser.parse_args(arguments)
    work = [
        (code, bits, rows, target)
        for code in args.codes
        for bits in CODES[code]
        if bits in args.bits
        for rows in args.rows
        for target in args.targets
    ]
    rows = [figures(*item) for item in tqdm(work, unit="kernel")]
    problems = [problem for row in rows for problem in wrong(row)]
    whole = args == parser.parse_args(["--check"] if args.check else [])
    if whole and not args.check:
        write_rows(ROOT / "docs" / "benchmarks" / "triton_static.csv", COLUMNS, rows)
        write_tables(ROOT / "docs" / "benchmarks" / "cuda_static.md", table(rows), BEGIN, END)
    else:
        print(table(rows))
    print("\n".join(problems) or "every check passes", file=sys.stderr)
    return int(bool(problems))


def gemm(code: str, bits: int, rows: int, target: int) -> Any:
    """decode_gemm as Triton compiles it: its asm has "ptx" and "cubin", its metadata `shared` and `num_warps`."""
    from quip_vllm.ops.triton.decode_gemm import decode_gemm_kernel
    from quip_vllm.ops.triton.launch import gemm_options, numbers
    from quip_vllm.ops.triton.shapes import WARPS, candidates

    shape = candidates(rows, WARPS[target // 10])[0]
    element = "fp16" if code == "lut" else "u32"
    pointers = {"packed": "*u32", "table": f"*{element}", "x": "*fp16", "partial": "*fp32"}
    scalars = dict.fromkeys(("m", "tiles", "chunks", "split_chunks"), "i32")
    constants = {"CODE": code, "BITS": bits, "SECOND": numbers(code, bits)[2], "PROJECTIONS": ()}
    constants |= {"WARPS": shape.warps, "BM": shape.rows, "UNROLL": shape.unroll}
    options = gemm_options(code, shape)
    return compile_kernel(decode_gemm_kernel, {**pointers, **scalars}, constants, target, options)


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: int, options: dict[str, Any]
) -> Any:
    """What Triton compiles for sm_<target>; pointers are aligned to 16 bytes, integers unknown."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    whole = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(kernel, whole, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def figures(code: str, bits: int, rows: int, target: int) -> Row:
    """A kernel's row of the CSV."""
    import triton

    compiled = gemm(code, bits, rows, target)
    usage, listing = disassemble(compiled.asm["cubin"])
    parts = next(iter(sass.functions(listing).values()))
    row: Row = {"code": code, "bits": bits, "rows": rows, "target": target, "triton": triton.__version__}
    row |= {"registers": usage["REG"], "spill_bytes": usage["STACK"] + usage["LOCAL"]}
    row |= {"shared_bytes": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    turn, weights = main_loop(parts, rows, two=code == "e8p" and bits > 2)
    if weights:
        row |= {"instructions": round(len(turn) / weights, 3)}
        row |= {name: round(count / weights, 3) for name, count in sass.by_class(turn).items()}
    cuda = cuda_instructions(code, bits, target) if rows == 8 else None
    if cuda and weights:
        row |= {"cuda": cuda, "ratio": round(len(turn) / weights / cuda, 3)}
    return row


def main_loop(parts: list[sass.Block], rows: int, two: bool) -> tuple[list[sass.Instruction], float]:
    """A turn of the loop that multiplies, the longest where it is unrolled, and a lane's weights in it."""
    best: list[sass.Instruction] = []
    for loop in sass.loops(parts):
        if any(parts[block].multiplications for block in loop.blocks):
            best = max(best, sass.turn(parts, loop), key=len)
    # m16n8k16 takes eight weights of a lane, for eight rows of x; one weight is multiplied in each of two stages.
    products = sum(instruction.opcode == "HMMA" for instruction in best)
    return best, products * 8 / (rows // 8) / (2 if two else 1)


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Registers and memory that a kernel uses, and its listing, by the tools in triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    handle, name = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        usage = _output(tools / "cuobjdump", "-res-usage", name)
        listing = _output(tools / "nvdisasm", "-c", name)
    finally:
        os.unlink(name)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}, listing


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


@cache
def _cuda_rows() -> list[Mapping[str, Any]]:
    """The CUDA kernels that are launched, from their CSV; empty where there is none."""
    file = ROOT / "docs" / "benchmarks" / "cuda_static.csv"
    return launched(row for row in read(file) if row.get("column_tiles") == 1) if file.exists() else []


def cuda_instructions(code: str, bits: int, target: int) -> float | None:
    """What the CUDA kernel for one row issues for a weight, from its CSV; None where that has none."""
    row = find(_cuda_rows(), code, bits, 1, target)
    return float(row["instructions"]) if row else None


def wrong(row: Row) -> Iterable[str]:
    """Sentences about what is not as it should be."""
    name = f"{row['code']} at {row['bits']} bits, {row['rows']} rows, sm_{row['target']}"
    if not row.get("instructions"):
        yield f"{name}: no loop has tensor-core instructions"
    if row["spill_bytes"]:
        yield f"{name}: {row['spill_bytes']} bytes of a thread's own memory"
    if row["shared_bytes"] > SHARED_LIMIT:
        yield f"{name}: {row['shared_bytes']} bytes of shared memory, {SHARED_LIMIT} are there"
    if row.get("ratio", 0) > RATIO_LIMIT:
        yield f"{name}: {row['instructions']} instructions a weight are {row['ratio']} times those of CUDA"


def table(rows: Sequence[Row]) -> str:
    """Instructions a weight at one row, and how many times the CUDA kernels' that is: Markdown."""
    one = [row for row in rows if row["rows"] == 8]
    targets = sorted({row["target"] for row in one})
    lines = ["| code | bits | " + " | ".join(f"sm_{target}" for target in targets) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(targets))
    found = {(row["code"], row["bits"], row["target"]): row for row in one}
    for code, bits in dict.fromkeys((row["code"], row["bits"]) for row in one):
        cells = (found.get((code, bits, target), {}) for target in targets)
        lines.append(f"| {code} | {bits} | " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if "instructions" not in row:
        return ""
    return f"{row['instructions']:.2f}" + (f" ({row['ratio']:.2f})" if "ratio" in row else "")


if __name__ == "__main__":
    sys.exit(main())
