# SPDX-License-Identifier: Apache-2.0
"""Each header of kernels/ compiles alone, and the numbers that Python repeats are those of the kernels."""

import re
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from quip_vllm.formats.tile import TILE
from quip_vllm.ops import cuda_layout, cuda_shapes

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
COMMAND = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-fconstexpr-ops-limit=200000000"]
COMMAND += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-isystem{path}" for path in include_paths())]
CMAKE = (KERNELS / "CMakeLists.txt").read_text()


def flags(tier):
    """A tier's compiler flags, as CMakeLists.txt sets them."""
    found = re.search(rf"set\(FLAGS_{tier} (.*)\)", CMAKE)
    words = found[1].split() if found else []
    return [flag for word in words for flag in (flags(word[8:-1]) if word.startswith("${FLAGS_") else [word])]


def headers_of(tier):
    """The headers to compile for a tier: those for vectors as AVX2 has them, and all others."""
    return [path for path in sorted(KERNELS.rglob("cpu/**/*.h")) if path.stem.endswith("_avx2") == (tier == "avx2")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("tier", ["avx2", "amx_emulated"])
def test_headers_of_the_cpu_compile_alone(tier):
    result = subprocess.run([*COMMAND, *flags(tier), *headers_of(tier)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.exhaustive
def test_headers_of_the_gpu_compile_alone():
    headers = [path for path in sorted((KERNELS / "cuda").glob("*.h")) if path.stem != "ptx"]
    result = subprocess.run([*COMMAND, *headers], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_python_repeats_the_numbers_of_the_kernels():
    text = "".join((KERNELS / "cuda" / name).read_text() for name in ("layout.h", "thread_block.h"))
    number = {
        name: eval(value, {}, {"kWarpsK": 2, "kDeep": 4}) for name, value in re.findall(r"(k\w+) = ([\w *]+)[;,]", text)
    }
    assert (number["kTile"], number["kChunk"], number["kLanes"]) == (TILE, cuda_layout.CHUNK, cuda_layout.LANES)
    assert (number["kWarpsK"], number["kRowTiles"]) == (cuda_shapes.WARPS_K, cuda_shapes.ROW_TILES)
    assert number["kRun"] == cuda_shapes.RUN
    assert (number["kSpare"], number["kRowBlock"]) == (cuda_layout.SPARE_CHUNKS, cuda_shapes.ROWS[-1])
