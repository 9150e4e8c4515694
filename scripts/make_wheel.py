# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel with the compiled libraries that are in quip_vllm/lib, and tags it for what they need.

Usage: python scripts/make_wheel.py [--folder build/wheel]

The libraries use LibTorch's stable ABI and no Python API: one wheel is for every Python from 3.10 on. Its platform is
the newest glibc that a symbol of a library asks for.
"""

import argparse
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ROOT / "quip_vllm" / "lib"
OLDEST = (2, 17)
"""glibc of the oldest manylinux that pip knows by this scheme."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds and tags; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheel")
    folder: Path = parser.parse_args(arguments).folder
    libraries = sorted(LIBRARIES.glob("*.so"))
    if not libraries:
        print(f"make_wheel: no library in {LIBRARIES}: run make build first", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    major, minor = max(glibc_of(read_versions(path)) for path in libraries)
    tags = ["--python-tag=cp310", "--abi-tag=abi3", f"--platform-tag=manylinux_{major}_{minor}_{platform.machine()}"]
    subprocess.run(
        [sys.executable, "-m", "wheel", "tags", "--remove", *tags, str(wheel)], check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    names = ", ".join(path.name for path in libraries)
    print(f"built {wheel} ({wheel.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - begin:.0f} s): {names}")
    return 0


def read_versions(library: Path) -> str:
    """What readelf says of the versions that a library needs."""
    return subprocess.run(["readelf", "-V", str(library)], check=True, capture_output=True, text=True).stdout


def glibc_of(versions: str) -> tuple[int, int]:
    """The newest glibc named in readelf's answer, at least OLDEST."""
    found = [(int(major), int(minor)) for major, minor in re.findall(r"\bGLIBC_(\d+)\.(\d+)", versions)]
    return max([OLDEST, *found])


if __name__ == "__main__":
    sys.exit(main())
