# SPDX-License-Identifier: Apache-2.0
"""What tests have compiled: presets of kernels/CMakePresets.json."""

import fcntl
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def compiled(preset: str, root: Path = ROOT, variables: tuple[str, ...] = ()) -> Path:
    """Brings the build of a preset up to date, against this Python's torch; returns its folder, build/PRESET.

    Processes that want the same build wait for each other.

    Args:
        preset: its name.
        root: the source tree.
        variables: of CMake's cache, NAME=VALUE, in place of the preset's.
    """
    folder = root / "build" / preset
    folder.parent.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in ("--preset", preset, *(f"-D{variable}" for variable in variables)), ("--build", "--preset", preset):
            subprocess.run(
                ["cmake", *step],
                cwd=root / "kernels",
                env={**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix},
                check=True,
            )
    return folder
