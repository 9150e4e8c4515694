# SPDX-License-Identifier: Apache-2.0
"""Sources of the CUDA kernels with a mistake on purpose, compiled over the emulator."""

import os
import shutil
import subprocess
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
COMPILER = os.environ.get("CXX", "g++")


def link(folder: Path, objects: Path, file: str, old: str, new: str, unit: str, flags: list[str], target: str) -> Path:
    """Changes ``old``, which stands once in ``file``, compiles ``unit``.cu again and links it with the other objects.

    Args:
        folder: an empty one, for the copy.
        objects: the folder with the unchanged objects.
        file, old, new, unit: of kernels/cuda.
        flags: of the compiler and of the linker.
        target: what is linked, in ``folder``.
    """
    for part in ("cuda", "emulator"):
        shutil.copytree(KERNELS / part, folder / part)
    for header in KERNELS.glob("*.h"):
        shutil.copy(header, folder)
    source, fresh = folder / "cuda" / file, folder / f"{unit}.o"
    text = source.read_text()
    assert text.count(old) == 1, f"{file} has changed: say what this mutation is now"
    source.write_text(text.replace(old, new))
    rates = "-DQUIP_RATES=0x6"  # 1 and 2, of the tests that see mistakes
    compile_ = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", rates, *flags, "-xc++", "-c"]
    subprocess.run([*compile_, str(folder / "cuda" / f"{unit}.cu"), "-o", str(fresh)], check=True)
    others = [str(path) for path in objects.rglob("*.o") if path.name != f"{unit}.cu.o"]
    # The first of equal templates is taken.
    subprocess.run([COMPILER, str(fresh), *others, *flags, "-o", str(folder / target)], check=True)
    return folder / target
