# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels into quip_vllm/lib: the CPU library with g++, and the CUDA library where nvcc is. Run with the
venv's Python.

Usage: python kernels/build.py [cpu|cuda|emulator ...] [--sanitize address|thread]

    cpu        kernels/cpu, one object a tier, one for the bindings
    cuda       kernels/cuda for every GPU of TARGETS, and PTX for newer ones; default only where nvcc is on the PATH
    emulator   kernels/cuda on the CPU, for tests: build/emulator/libquip_vllm_cuda.so

With --sanitize, quip_vllm/lib stays as it is: build/address gets an instrumented CPU library, build/address and
build/thread the programs of tests/kernels/panels.cpp, build/emulator_address and build/emulator_thread that of
gemm_check.cpp. `make sanitize` runs them.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
LIBRARIES = ROOT / "quip_vllm" / "lib"
PROGRAM = ROOT / "tests" / "kernels" / "panels.cpp"
GEMM_PROGRAM = PROGRAM.with_name("gemm_check.cpp")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2", "-mgfni"]
X86_TIERS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "amx": [*VNNI, "-mamx-tile", "-mamx-int8"],
    "amx_emulated": [*VNNI, "-DQUIP_AMX_EMULATED"],
}
TARGETS = ("80", "86", "89", "90", "100", "120")
"""GPUs that the CUDA library has code for, by compute capability; it has PTX of the last."""
STABLE_ABI = "0x020a000000000000"  # torch 2.10
TORCH = Path(torch.__file__).parent
TORCH_INCLUDE = ["-isystem", str(TORCH / "include"), f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
TORCH_LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
SANITIZERS = {
    # Checks as calls: inlined, they make a kernel that keeps 16 sums in registers compile for hours.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}


@dataclass(frozen=True)
class Build:
    """Objects (name -> compiler's command without -c and -o) and what is linked from them (file -> command)."""

    folder: Path
    sources: list[Path]
    objects: dict[str, list[str]]
    links: dict[Path, list[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds what is older than its sources; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["cpu", "cuda", "emulator", []], metavar="cpu|cuda|emulator")
    parser.add_argument("--sanitize", choices=SANITIZERS, help="an instrumented build, in build/")
    args = parser.parse_args(arguments)
    compiler = os.environ.get("CXX", "g++")
    parts = args.parts or ["cpu", *(["cuda"] if shutil.which("nvcc") and not args.sanitize else [])]
    for tool in (compiler, *(["nvcc"] if "cuda" in parts else [])):
        if shutil.which(tool) is None:
            print(
                f"compiler {tool} is not on the PATH: install it (apt-get install {tool}) or set CXX", file=sys.stderr
            )
            return 2
    makers = {"cpu": _cpu, "cuda": _cuda, "emulator": _emulator}
    return max(_run(makers[part](compiler, args.sanitize)) for part in parts)


def _cpu(compiler: str, sanitizer: str | None) -> Build:
    source, folder = KERNELS / "cpu", ROOT / "build" / (sanitizer or "cpu")
    flags = [
        compiler,
        *_flags(sanitizer),
        "-Wno-uninitialized",
        "-ffp-contract=fast",
        "-fconstexpr-ops-limit=200000000",
    ]
    tiers = {"portable": [], **(X86_TIERS if platform.machine() in ("x86_64", "AMD64") else {})}
    # portable.o stays first: of an inline function that several objects hold, the linker keeps the first.
    objects = {
        tier: [*flags, *tier_flags, f"-DQUIP_TIER={tier}", str(source / "tier.cpp")]
        for tier, tier_flags in tiers.items()
    }
    links: dict[Path, list[str]] = {}
    link = [compiler, *SANITIZERS.get(sanitizer or "", [])]
    if sanitizer != "thread":  # under Python libgomp is not instrumented: its barriers would be reported as races
        objects["bindings"] = [*flags, *TORCH_INCLUDE, str(source / "bindings.cpp")]
        library = (folder if sanitizer else LIBRARIES) / "libquip_vllm_cpu.so"
        links[library] = [*link, "-shared", *(f"{name}.o" for name in objects), "-Wl,--no-as-needed", *TORCH_LIBRARIES]
    if sanitizer:
        for name, macro in ((PROGRAM.stem + "_planted", ["-DQUIP_PLANTED"]), (PROGRAM.stem, [])):
            objects[name] = [*flags, *macro, f"-I{source}", str(PROGRAM)]
            links[folder / name] = [*link, *(f"{tier}.o" for tier in tiers), f"{name}.o", "-pthread"]
    return Build(folder, [*source.iterdir(), *([PROGRAM] if sanitizer else [])], objects, links)


def _cuda(compiler: str, sanitizer: str | None) -> Build:
    source, folder = KERNELS / "cuda", ROOT / "build" / "cuda"
    code = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    code.append(f"-gencode=arch=compute_{TARGETS[-1]},code=compute_{TARGETS[-1]}")
    flags = [
        "nvcc",
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fPIC",
        f"-ccbin={compiler}",
        *code,
    ]
    objects = {
        path.stem: [*flags, *(TORCH_INCLUDE if path.stem == "bindings" else []), str(path)]
        for path in sorted(source.glob("*.cu"))
    }
    # torch's libraries are found before Python has opened them only if they are named: --no-as-needed keeps the names.
    link = ["nvcc", "-shared", f"-ccbin={compiler}", "-cudart=static", *(f"{name}.o" for name in objects)]
    links = {LIBRARIES / "libquip_vllm_cuda.so": [*link, "-Xlinker", "--no-as-needed", *TORCH_LIBRARIES]}
    return Build(folder, list(source.iterdir()), objects, links)


def _emulator(compiler: str, sanitizer: str | None) -> Build:
    source, folder = KERNELS / "cuda", ROOT / "build" / f"emulator{'_' + sanitizer if sanitizer else ''}"
    flags = [compiler, *_flags(sanitizer, "-O2"), "-Wno-unknown-pragmas", f"-I{source}", "-xc++"]
    runtime = [compiler, *_flags(None if sanitizer == "thread" else sanitizer, "-O2")]  # it tells TSan of its fibers
    objects = {path.stem: [*flags, str(path)] for path in sorted(source.glob("*.cu")) if path.stem != "bindings"}
    objects["runtime"] = [*runtime, str(KERNELS / "emulator" / "runtime.cpp")]
    sources = [*source.iterdir(), *(KERNELS / "emulator").iterdir()]
    if sanitizer:
        objects[GEMM_PROGRAM.stem] = [*flags, str(GEMM_PROGRAM)]
        link = [compiler, *SANITIZERS[sanitizer], *(f"{name}.o" for name in objects)]
        return Build(folder, [*sources, GEMM_PROGRAM], objects, {folder / GEMM_PROGRAM.stem: link})
    objects["bindings"] = [*flags, *TORCH_INCLUDE, str(source / "bindings.cu")]
    link = [compiler, "-shared", *(f"{name}.o" for name in objects), "-Wl,--no-as-needed", *TORCH_LIBRARIES]
    return Build(folder, sources, objects, {folder / "libquip_vllm_cuda.so": link})


def _flags(sanitizer: str | None, optimize: str = "-O3") -> list[str]:
    sanitized = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS[sanitizer]] if sanitizer else [optimize]
    return ["-std=c++20", *sanitized, "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"]


def _run(build: Build) -> int:
    newest = max(path.stat().st_mtime for path in [*build.sources, Path(__file__)])
    if all(target.exists() and target.stat().st_mtime > newest for target in build.links):
        for target in build.links:
            print(f"{target.relative_to(ROOT)} is up to date")
        return 0
    build.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[*command, "-c", "-o", f"{name}.o"] for name, command in build.objects.items()]
        if any(pool.map(lambda command: subprocess.run(command, cwd=build.folder).returncode, commands)):
            return 1
    for target, command in build.links.items():
        target.parent.mkdir(exist_ok=True)
        fresh = target.with_suffix(".tmp")
        if subprocess.run([*command, "-o", str(fresh)], cwd=build.folder).returncode:
            return 1
        fresh.replace(target)
        print(f"built {target.relative_to(ROOT)} ({target.stat().st_size // 1024} KiB): {', '.join(build.objects)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
