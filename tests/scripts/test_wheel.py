# SPDX-License-Identifier: Apache-2.0
"""scripts/release/wheel.sh: the wheel's tag, what is in it, and that it runs where nothing of the checkout is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from compiled import compiled

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    compiled("release")  # what the wheel takes along
    folder = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["scripts/release/wheel.sh", str(folder)], cwd=ROOT, env=environment, check=True)
    (file,) = folder.iterdir()
    return file


def test_the_tag_and_the_libraries(wheel):
    assert "-cp310-abi3-manylinux_2_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "quip_vllm/lib/libquip_vllm_cpu.so" in names and "quip_vllm/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"quip_vllm"}  # nor torch's libraries


def test_it_runs_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    script = (
        "import quip_vllm; from quip_vllm.ops import cpu_tier\n"
        "from quip_vllm.ops.extension import cuda_library_problem\n"
        "print(quip_vllm.__file__); print(cpu_tier()); print(cuda_library_problem())"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    file, tier, problem = result.stdout.splitlines()
    assert Path(file).is_relative_to(target) and tier
    if any(name.endswith("cuda.so") for name in zipfile.ZipFile(wheel).namelist()):
        assert problem == "None"  # it loads where torch has no CUDA
    else:
        assert "nvcc" in problem
