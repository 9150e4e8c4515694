# SPDX-License-Identifier: Apache-2.0
"""A prepared layer keeps its choices: what is prepared after it, under other settings, does not move it."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from random_layers import random_layer

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.cpu import CpuBackend, _takes_int8
from quip_vllm.ops.triton.backend import TritonBackend

SPEC = LinearSpec("1mad", 2, 272, (48, 16), 16)


def check(backend, monkeypatch, variable, value):
    """Outputs of two layers of one spec, the second prepared with the variable set."""
    tensors, x = random_layer(SPEC), torch.randn(3, 272).bfloat16()
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "exact")
    first = backend.prepare(SPEC, tensors)
    before = first.linear(x)
    monkeypatch.setenv(variable, value)
    second = backend.prepare(SPEC, tensors)
    other = second.linear(x)
    assert torch.equal(first.linear(x), before)
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "exact")
    assert torch.equal(second.linear(x), other)
    return first, second, before, other


def test_cpu(monkeypatch):
    if not _takes_int8("1mad", 2):
        pytest.skip("this tier has no int8 activations")
    *_, exact, rounded = check(CpuBackend(), monkeypatch, "QUIP_VLLM_ACTIVATIONS", "int8")
    assert not torch.equal(exact, rounded)


def test_cuda(cuda, monkeypatch):
    *_, exact, rounded = check(cuda, monkeypatch, "QUIP_VLLM_ACTIVATIONS", "int8")
    assert not torch.equal(exact, rounded)
    first, second, *_ = check(cuda, monkeypatch, "QUIP_VLLM_DENSE_ROWS", "1")
    assert (first.dense_rows, second.dense_rows) == (256, 1)
    first, second, *_ = check(cuda, monkeypatch, "QUIP_VLLM_WIDE_ROWS", "2")
    assert not first.wide and second.wide[0] == 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":  # chosen when triton is imported
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_triton"]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    from quip_vllm.ops.triton import shapes

    monkeypatch.setattr(shapes, "_timed", {})
    slow = iter(range(1000, 0, -1))  # of each number of rows, the last candidate is the fastest
    monkeypatch.setattr(shapes, "milliseconds", lambda call: next(slow))
    first, second, *_ = check(TritonBackend(), monkeypatch, "QUIP_VLLM_TRITON_TUNE", "1")
    assert first.shapes != second.shapes
