# SPDX-License-Identifier: Apache-2.0
"""Fixtures of more than one folder, made once a session: tiny models, and the CUDA kernels on the CPU."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from compiled import compiled
from engine import Engine
from safetensors.torch import load_file, save_file

if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["quantizer", "evaluation", "test_cli.py"]


def pytest_addoption(parser):
    parser.addoption("--cpu-library", type=Path, help="test this build of the CPU library")
    parser.addoption("--cuda-library", type=Path, help="test this build of the emulated CUDA library")
    parser.addoption("--sanitize", action="store_true", help="build and run tests/kernels/test_sanitizers.py (minutes)")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # they share the cores, and so do the processes that they start
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    library = config.getoption("--cpu-library")
    if library is not None:
        from quip_vllm.ops import extension

        extension.CPU_LIBRARY = library.resolve()
        problem = extension.cpu_library_problem()
        if problem is not None:
            raise pytest.UsageError(f"--cpu-library is {library}: {problem}")


@pytest.fixture(scope="session")
def cuda(request):
    """A CudaBackend over the emulated library (--cuda-library names another build of it)."""
    from quip_vllm.ops import extension
    from quip_vllm.ops.cuda import CudaBackend

    library = request.config.getoption("--cuda-library")
    if library is None:
        library = compiled("emulator") / "libquip_vllm_cuda.so"
    extension.CUDA_LIBRARY = library.resolve()
    extension.cuda_library_problem.cache_clear()
    assert extension.cuda_library_problem() is None
    return CudaBackend()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A UTF-8 text file of 6000 bytes, a token each."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_models.text(), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(architecture, **config): the folder of a tiny random model; never write in it."""
    made = {}

    def tiny_model(architecture="Llama", **changes):
        key = architecture + json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = tiny_models.save_model(tmp_path_factory.mktemp(architecture), architecture, **changes)
        return made[key]

    return tiny_model


@pytest.fixture
def damaged(tiny_model, tmp_path):
    """damaged(change): a copy of the tiny model whose tensors went through ``change``."""

    def damaged(change):
        folder = tmp_path / "damaged"
        shutil.copytree(tiny_model(), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return damaged


@pytest.fixture(scope="session")
def make_settings(tiny_text):
    """make_settings(model, ...): quip_sharp at 2 bits with 8 sequences of 48 tokens, unless told otherwise."""
    from quip_vllm.quantizer.settings import Settings

    def make_settings(model, **changes):
        usual = {"code": "e8p", "bits": 2, "calibration": str(tiny_text), "two_sided": False, "tune": "none"}
        return Settings(str(model), **{**usual, "sequences": 8, "sequence_length": 48, **changes})

    return make_settings


@pytest.fixture(scope="session")
def quantized(tiny_model, make_settings, tmp_path_factory):
    """quantized(architecture, model, ...settings): the folder of a tiny quantized checkpoint; never write in it.

    `model` is what `tiny_model` takes besides the architecture.
    """
    from quip_vllm.quantizer.run import quantize

    made = {}

    def quantized(architecture="Llama", model=(), **changes):
        key = repr((architecture, model, sorted(changes.items(), key=str)))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized")
            quantize(make_settings(tiny_model(architecture, **dict(model)), **changes), made[key])
        return made[key]

    return quantized


@pytest.fixture(scope="session")
def engine():
    """The process in which vLLM serves one model after another: see engine.py."""
    made = Engine()
    yield made
    made.close()
