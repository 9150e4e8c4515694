# SPDX-License-Identifier: Apache-2.0
"""The wheel: its tag, what is in it, and that it runs where nothing of the checkout is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import make_wheel
import pytest


def test_the_newest_glibc_counts():
    text = (
        "0x0010: Name: GLIBC_2.34  Flags: none\n Name: GLIBC_2.4 Version: 3\n Name: GLIBCXX_3.4.29\n Name: CXXABI_1.3"
    )
    assert make_wheel.glibc_of(text) == (2, 34)
    assert make_wheel.glibc_of("Name: GLIBC_2.4") == (2, 17)


def test_no_library_is_said_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_wheel, "LIBRARIES", tmp_path)
    assert make_wheel.main([]) == 2
    assert "make build" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    assert make_wheel.main(["--folder", str(folder)]) == 0
    return next(folder.glob("*.whl"))


def test_the_tag_and_the_libraries(wheel):
    assert "-cp310-abi3-manylinux_2_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "quip_vllm/lib/libquip_vllm_cpu.so" in names and "quip_vllm/py.typed" in names
    assert not any(name.startswith(("tests/", "kernels/")) for name in names)


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
        assert "make build" in problem
