# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels/cpu into quip_vllm/lib: one object a tier, one for the bindings. Run with the venv's Python.

Usage: python kernels/build.py
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "cpu"
LIBRARY = ROOT / "quip_vllm" / "lib" / "libquip_vllm_cpu.so"
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


def main() -> int:
    """Builds what is older than its sources; returns the exit code."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        print(f"compiler {compiler} is not on the PATH: install g++ (apt-get install g++) or set CXX", file=sys.stderr)
        return 2
    newest = max(path.stat().st_mtime for path in [*SOURCE.iterdir(), Path(__file__)])
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > newest:
        print(f"{LIBRARY.relative_to(ROOT)} is up to date")
        return 0
    objects = ROOT / "build" / "cpu"
    objects.mkdir(parents=True, exist_ok=True)
    LIBRARY.parent.mkdir(exist_ok=True)
    flags = [
        compiler,
        "-std=c++20",
        "-O3",
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
    jobs = [
        [*flags, *tier_flags, f"-DQUIP_TIER={tier}", "-c", str(SOURCE / "tier.cpp"), "-o", str(objects / f"{tier}.o")]
        for tier, tier_flags in tiers.items()
    ]
    jobs.append([*flags, *include, "-c", str(SOURCE / "bindings.cpp"), "-o", str(objects / "bindings.o")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(lambda command: subprocess.run(command).returncode, jobs))
    if any(codes):
        return 1
    fresh = LIBRARY.with_suffix(".tmp")
    # portable.o stays first: of an inline function that several objects hold, the linker keeps the first.
    link = [compiler, "-shared", *(command[-1] for command in jobs), "-o", str(fresh), f"-L{torch_root / 'lib'}"]
    link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    if subprocess.run(link).returncode:
        return 1
    fresh.replace(LIBRARY)
    print(f"built {LIBRARY.relative_to(ROOT)} ({LIBRARY.stat().st_size // 1024} KiB): {', '.join(tiers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
