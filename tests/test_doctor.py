# SPDX-License-Identifier: Apache-2.0
"""quip-vllm doctor: versions, tier, and which backend serves what, also where the library is missing."""

import platform

import pytest
import torch

from quip_vllm import __version__, doctor
from quip_vllm.cli import main
from quip_vllm.formats.spec import FORMATS
from quip_vllm.ops import cpu, cpu_tier, cpu_tiers, cuda, extension


def test_doctor(capsys):
    if extension.cpu_library_problem() is not None:
        pytest.skip(extension.cpu_library_problem())
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"quip_vllm     {__version__}, Python {platform.python_version()}, {platform.machine()}"
    assert f"torch         {torch.__version__}" in lines
    assert "CPU library   loaded" in lines
    tiers = [line.split()[1:] for line in lines if line.startswith("  tier ")]
    assert [name for name, *_ in tiers] == [name for name in cpu_tiers() if name != "amx_emulated"]
    if cpu_tier() != "amx_emulated":
        assert [cpu_tier(), "in", "use"] in tiers
    assert "portable" in tiers[-1]
    served = [line for line in lines if line.startswith("  cpu ")]
    assert len(served) == len(FORMATS)
    assert all("cpu yes (" in line for line in served)
    assert all("; reference no (slow, runs only with QUIP_VLLM_BACKEND=reference)" in line for line in served)
    assert served[0].startswith("  cpu   quip_sharp e8p, 2 to 4 bits:")
    assert any("qtip hyb, 1 to 4 bits:" in line for line in served)


def test_doctor_without_the_library(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "CPU_LIBRARY", tmp_path / "gone.so")
    for module in (doctor, cpu):
        monkeypatch.setattr(module, "cpu_library_problem", extension.cpu_library_problem.__wrapped__)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    why = extension.cpu_library_problem.__wrapped__()
    assert why.startswith(f"the compiled library {tmp_path / 'gone.so'} is not there: install quip-vllm again")
    assert f"CPU library   {why}" in out
    assert out.count(f"cpu no ({why})") == len(FORMATS) and "cpu yes" not in out


def test_doctor_with_a_broken_library(capsys, monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(extension, "CPU_LIBRARY", tmp_path / "broken.so")
    monkeypatch.setattr(doctor, "cpu_library_problem", extension.cpu_library_problem.__wrapped__)
    monkeypatch.setattr(doctor, "_version", lambda name: "not installed")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    report = doctor.report()
    assert "CPU library   the compiled library does not load (" in report
    assert "install quip-vllm again beside this torch" in report
    assert "vllm          not installed" in report and "nvcc          not found" in report


def on_a_gpu(monkeypatch, capability):
    """The doctor's lines where torch sees a GPU and there is no CUDA library."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of a test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(cuda, "cuda_library_problem", lambda: "no library")
    lines = doctor.report().splitlines()
    served = [line.split(" bits: ")[1].strip() for line in lines if line.startswith("  cuda ")]
    assert len(served) == len(FORMATS)
    return lines, served


def test_doctor_on_a_gpu_without_the_library(monkeypatch):
    pytest.importorskip("triton")
    lines, served = on_a_gpu(monkeypatch, (9, 0))
    assert "GPU           GPU of a test, compute capability 9.0" in lines
    reference = "reference no (slow, runs only with QUIP_VLLM_BACKEND=reference)"
    assert set(served) == {f"cuda no (no library); triton yes; {reference}"}
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "reference")
    asked = "no (QUIP_VLLM_BACKEND asks for reference)"
    assert set(on_a_gpu(monkeypatch, (9, 0))[1]) == {f"cuda {asked}; triton {asked}; reference yes"}


def test_doctor_on_a_gpu_that_is_too_old(monkeypatch):
    pytest.importorskip("triton")
    why = "no (this GPU has compute capability 7.5: the kernels need 8.0 or above; take a newer one, or a CPU)"
    assert all(line.startswith(f"cuda {why}; triton {why};") for line in on_a_gpu(monkeypatch, (7, 5))[1])


def test_a_lacking_feature_is_named():
    needs = {"avx512f": True, "amx-int8": False}
    assert doctor._tier("amx", needs) == "amx         no: this CPU has no amx-int8" or cpu_tier() == "amx"
