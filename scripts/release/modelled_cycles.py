# SPDX-License-Identifier: Apache-2.0
"""Models the loops that multiply one row of int8 activations with trellis codes on CPUs that are not at hand.

Usage: python scripts/release/modelled_cycles.py [--csv docs/benchmarks/cpu_modelled.csv] [--cxx g++]

Compiles the loop of each code and bit rate for the tiers avx2 and avx512_vnni, and lets llvm-mca run its instructions
on the models of CPUs that LLVM has. Prints the cycles per 1000 weights and writes them. All data are in the
first-level cache of a model, so memory costs nothing. Needs g++ and llvm-mca (Debian: package llvm-19; older releases
do not know znver4), and no particular CPU. LLVM 19 takes znver5 for znver4, so it is left out.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["tier", "code", "bits", "cpu", "cycles_per_1000_weights"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512 += ["-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2", "-mgfni", "-mfma", "-mf16c"]
TIERS = {
    "avx2": (["-mavx2", "-mfma", "-mf16c"], ["znver3", "sapphirerapids"]),
    "avx512_vnni": (AVX512, ["znver4", "icelake-server", "sapphirerapids"]),
}
"""Flags of kernels/CMakeLists.txt, and the CPUs."""
COMMON = ["-std=c++20", "-O3", "-DNDEBUG", "-S", "-ffp-contract=fast", "-fconstexpr-ops-limit=200000000", "-Wno-psabi"]
FORMATS = {
    "1mad": "Bytes8<{bits}, TileOrder::kOurs, OneMadBytes>",
    "mul1": "Bytes8<{bits}, TileOrder::kSwapped, Mul1Bytes>",
    "3inst": "Halves16<{bits}, TileOrder::kOurs, kThreeInstFactor, kThreeInstTerm>",
    "mcg": "Halves16<{bits}, TileOrder::kSwapped, kMcgFactor, 0>",
    "hyb": "Hyb8<{bits}, HybGrid>",
    "grid": "Grid8<{bits}>",
}
BITS = [2, 3, 4]
MORE = {"grid": [5, 8]}
"""Bit rates of a code besides."""
SOURCE = """
#include "int8/panel.h"
using namespace quip;
template <class Format>
[[gnu::flatten]] inline void row(const Weight& w, const int32_t* x, const Output& out) {{
  few_rows<Format, 1>(Format(w), w.packed, 0, w.k, x, out, 0, 16);
}}
extern "C" const int weights_of_one = vectors_of<{format}>() * kRowsOfSums * {format}::kColumns;
extern "C" void loop_of_one(const Weight& w, const int32_t* x, const Output& out) {{ row<{format}>(w, x, out); }}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "docs/benchmarks/cpu_modelled.csv")
    parser.add_argument("--cxx", default="g++")
    args = parser.parse_args(arguments)
    tool = find_llvm_mca()
    if tool is None or not shutil.which(args.cxx):
        print(f"There is no llvm-mca or no {args.cxx}: install the packages llvm-19 and g++.", file=sys.stderr)
        return 2
    rows = []
    for tier, (flags, cpus) in TIERS.items():
        for code, template in FORMATS.items():
            for bits in [*BITS, *MORE.get(code, [])]:
                loop, weights = longest_loop(compiled(args.cxx, flags, template.format(bits=bits)))
                for cpu in cpus:
                    cycles = modelled(tool, cpu, loop)
                    rows.append([tier, code, bits, cpu, f"{1000 * cycles / weights:.0f}"])
                    print(*rows[-1], flush=True)
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return 0


def find_llvm_mca() -> str | None:
    """The newest on PATH that knows Zen 4, or None."""
    names = [f"llvm-mca-{version}" for version in range(25, 16, -1)] + ["llvm-mca"]
    found = [tool for name in names if (tool := shutil.which(name))]
    return found[0] if found else None


def compiled(cxx: str, flags: list[str], format_: str) -> str:
    """The assembler source of a function that multiplies one row."""
    with TemporaryDirectory() as folder:
        source, assembler = Path(folder, "loop.cpp"), Path(folder, "loop.s")
        source.write_text(SOURCE.format(format=format_))
        include = f"-I{ROOT / 'kernels/cpu'}"
        subprocess.run([cxx, *COMMON, *flags, include, str(source), "-o", str(assembler)], check=True)
        return assembler.read_text()


def longest_loop(assembler: str) -> tuple[str, int]:
    """The instructions of the longest loop without others inside, and the weights that one turn multiplies."""
    weights = int(re.search(r"^weights_of_one:\n\s*\.long\s+(\d+)", assembler, re.MULTILINE).group(1))
    return "\n".join(max(loops(assembler.splitlines()), key=len)), weights


def loops(lines: list[str]) -> Iterator[list[str]]:
    """The instructions between each label and a jump back to it, where no other label lies between."""
    begin, label = 0, ""
    for i, line in enumerate(lines):
        if found := re.match(r"(\.L\w+):", line):
            begin, label = i + 1, found.group(1)
        elif label and re.match(rf"\s+j\w+\s+{re.escape(label)}$", line):
            yield lines[begin : i + 1]


def modelled(tool: str, cpu: str, loop: str) -> float:
    """Cycles of one turn."""
    turns = 200
    command = [tool, "-mtriple=x86_64-linux-gnu", f"-mcpu={cpu}", f"-iterations={turns}"]
    done = subprocess.run(command, input=loop, check=True, capture_output=True, text=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", done.stdout).group(1)) / turns


if __name__ == "__main__":
    sys.exit(main())
