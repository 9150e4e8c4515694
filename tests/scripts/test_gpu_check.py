# SPDX-License-Identifier: Apache-2.0
"""scripts/release/gpu_check.sh and bench_cuda.py, as far as they go without a GPU."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import bench_cuda
import bench_generate
import pytest
import torch
from benchmarking import read_rows

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
HAS_VENV = pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="gpu_check.sh runs .venv/bin/python")


def run(*words):
    return subprocess.run(["scripts/release/gpu_check.sh", *words], cwd=ROOT, capture_output=True, text=True)


@HAS_VENV
def test_reports_what_needs_no_gpu():
    result = run("--without-gpu")
    assert result.returncode == 0, result.stderr
    assert "machine: passed" in result.stdout and "bench: skipped, no GPU" in result.stdout
    with tarfile.open(ROOT / "build" / "gpu_report.tar.gz") as report:
        log = report.extractfile("gpu_report/machine.log").read().decode()
        assert "gpu_report/summary.txt" in report.getnames()
    assert "commit " in log and "which backend serves what" in log


@HAS_VENV
@WITHOUT_GPU
def test_no_gpu_is_said_in_one_sentence():
    result = run("results")
    assert result.returncode == 2 and "torch sees no GPU" in result.stderr


def test_an_unknown_step_is_named():
    result = run("speed")
    assert result.returncode == 2 and "speed is no step" in result.stderr


def test_every_file_and_option_that_it_names_exists():
    text = (ROOT / "scripts" / "release" / "gpu_check.sh").read_text()
    for word in {word.strip("'\"`;:,.") for word in text.split()}:
        if word.startswith(("scripts/", "tests/", "kernels/")):
            assert (ROOT / word).exists(), word


def test_every_step_runs_both_backends(tmp_path):
    """What it runs where there is a GPU: with a Python that only notes how it was called."""
    noted = tmp_path / "noted"
    for name in (".venv/bin/python", "bin/compute-sanitizer"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text(f'#!/bin/sh\necho "$QUIP_VLLM_BACKEND,$QUIP_VLLM_TRITON_TUNE: $*" >> {noted}\n')
        file.chmod(0o755)
    script = tmp_path / "scripts" / "release" / "gpu_check.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "release" / "gpu_check.sh", script)
    own = {name: value for name, value in os.environ.items() if not name.startswith("QUIP_VLLM_")}
    own["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{own['PATH']}"
    done = subprocess.run([script], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = noted.read_text().splitlines()
    sanitized = [line for line in lines if "test_gpu.py" in line and "--tool" in line]
    assert len(sanitized) == 2 and not any(re.search("cuda|triton", line) for line in sanitized)  # in no -k: both
    assert sum("--block 128" in line for line in lines) == 2  # with one launch and without
    assert sum("--ways" in line for line in lines) == sum("--humming" in line for line in lines) == 1
    assert ",: -m pytest -q tests/ops/test_gpu.py --durations 10" in lines
    assert ",: scripts/bench/bench_cuda.py --csv build/gpu_report/cuda_kernels.csv" in lines  # both by default
    assert ",1: scripts/bench/bench_cuda.py --backends triton --csv build/gpu_report/triton_tuned.csv" in lines
    assert ",: -m cmake -S kernels --preset release" in lines
    encoded = [line for line in lines if "scripts/bench/bench_encode.py --device cuda" in line]
    assert ["searches.csv" in line or "--model build/gpu_report/model" in line for line in encoded] == [True, True]
    served = [line.split(":")[0] for line in lines if "quip_vllm.cli verify" in line]
    assert served == [",", "triton,"]


def test_rows_of_humming(monkeypatch):
    """Its kernels are stood in for, and the clock: what is called, and the columns."""

    class Layer(torch.nn.Linear):
        def __init__(self, shape_n, shape_k, weight_config, torch_dtype):
            super().__init__(shape_k, shape_n, bias=False, dtype=torch_dtype)
            self.given, self.ready = weight_config, False

        def load_from_unquantized(self, weight):
            assert weight.shape == self.weight.shape

        def transform(self):
            self.ready = True

    called = []

    def seconds(calls):
        called.append([call() for call in calls])
        return 2e-6 if len(called) % 2 else 1e-6  # cuBLAS, then the kernels

    monkeypatch.setitem(sys.modules, "humming", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "humming.layer", SimpleNamespace(HummingLayer=Layer))
    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda, "copies", lambda size: 3)
    monkeypatch.setattr(bench_cuda, "seconds", seconds)
    args = SimpleNamespace(humming=True, sizes=["32x16"], rows=[1, 4])
    found = [row for case in bench_cuda._cases(args) for row in case(args, 1.0)]
    assert [(row["format"], row["rows"]) for row in found] == [(f"int{b}-g128", m) for b in (2, 3, 4) for m in (1, 4)]
    assert all(len(one) == 3 and one[0].shape[1] == 32 for one in called)
    assert all(row["over_cublas"] == 2 and row["packed_bytes"] == 2 * 32 * 16 for row in found)
    assert all(
        row["bound_microseconds"] == pytest.approx(1.024) and set(row) <= set(bench_cuda.COLUMNS) for row in found
    )


def test_tokens_per_second_in_transformers(monkeypatch, tmp_path, quantized, tiny_model):
    file = tmp_path / "generated.csv"
    given = ["bench_generate", f"fp={tiny_model()}", f"quip_sharp-2={quantized()}", "--device", "cpu"]
    monkeypatch.setattr(
        sys, "argv", [*given, "--dtype", "float32", "--batches", "1", "2", "--repeats", "1", "--csv", str(file)]
    )
    assert bench_generate.main() == 0
    rows = read_rows(file)
    assert [(row["name"], row["batch"]) for row in rows] == [(n, b) for n in ("fp", "quip_sharp-2") for b in ("1", "2")]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows) and [row["over_first"] for row in rows[:2]] == ["1", "1"]


@WITHOUT_GPU
def test_the_benchmark_wants_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_cuda"])
    assert bench_cuda.main() == 2
    assert "no GPU" in capsys.readouterr().err
