# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels/cpu into quip_vllm/lib: one object a tier, one for the bindings. Run with the venv's Python.

Usage: python kernels/build.py [--sanitize address|thread]

With --sanitize, quip_vllm/lib stays as it is. build/address gets an instrumented library, and build/address and
build/thread the programs of tests/kernels/panels.cpp. `make sanitize` runs them.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "cpu"
LIBRARY = ROOT / "quip_vllm" / "lib" / "libquip_vllm_cpu.so"
PROGRAM = ROOT / "tests" / "kernels" / "panels.cpp"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2", "-mgfni"]
X86_TIERS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "amx": [*VNNI, "-mamx-tile", "-mamx-int8"],
    "amx_emulated": [*VNNI, "-DQUIP_AMX_EMULATED"],
}
STABLE_ABI = "0x020a000000000000"  # torch 2.10
SANITIZERS = {
    # Checks as calls: inlined, they make a kernel that keeps 16 sums in registers compile for hours.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds what is older than its sources; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", choices=SANITIZERS, help="an instrumented build, in build/")
    sanitizer = parser.parse_args(arguments).sanitize
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        print(f"compiler {compiler} is not on the PATH: install g++ (apt-get install g++) or set CXX", file=sys.stderr)
        return 2
    objects = ROOT / "build" / (sanitizer or "cpu")
    library = objects / LIBRARY.name if sanitizer else LIBRARY
    program = objects / PROGRAM.stem
    last = program if sanitizer else library
    sources = [*SOURCE.iterdir(), Path(__file__), *([PROGRAM] if sanitizer else [])]
    if last.exists() and last.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        print(f"{last.relative_to(ROOT)} is up to date")
        return 0
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(exist_ok=True)
    flags = [
        compiler,
        "-std=c++20",
        *(["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS[sanitizer]] if sanitizer else ["-O3"]),
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-ffp-contract=fast",
        "-fconstexpr-ops-limit=200000000",
    ]
    torch_root = Path(torch.__file__).parent
    include = ["-isystem", str(torch_root / "include"), f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    tiers = {"portable": [], **(X86_TIERS if platform.machine() in ("x86_64", "AMD64") else {})}
    jobs = {
        tier: [*flags, *tier_flags, f"-DQUIP_TIER={tier}", str(SOURCE / "tier.cpp")]
        for tier, tier_flags in tiers.items()
    }
    # portable.o stays first: of an inline function that several objects hold, the linker keeps the first.
    links: dict[Path, list[str]] = {}
    if sanitizer != "thread":  # under Python libgomp is not instrumented: its barriers would be reported as races
        jobs["bindings"] = [*flags, *include, str(SOURCE / "bindings.cpp")]
        torch_libraries = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        links[library] = ["-shared", *(f"{name}.o" for name in jobs), *torch_libraries]
    if sanitizer:
        for name, macro in ((PROGRAM.stem + "_planted", ["-DQUIP_PLANTED"]), (PROGRAM.stem, [])):
            jobs[name] = [*flags, *macro, f"-I{SOURCE}", str(PROGRAM)]
            links[objects / name] = [*(f"{tier}.o" for tier in tiers), f"{name}.o", "-pthread"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[*command, "-c", "-o", f"{name}.o"] for name, command in jobs.items()]
        if any(pool.map(lambda command: subprocess.run(command, cwd=objects).returncode, commands)):
            return 1
    for target, parts in links.items():
        fresh = target.with_suffix(".tmp")
        command = [compiler, *SANITIZERS.get(sanitizer, []), *parts, "-o", str(fresh)]
        if subprocess.run(command, cwd=objects).returncode:
            return 1
        fresh.replace(target)
        print(f"built {target.relative_to(ROOT)} ({target.stat().st_size // 1024} KiB): {', '.join(tiers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
