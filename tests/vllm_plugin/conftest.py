# SPDX-License-Identifier: Apache-2.0
"""vLLM's own layers at a pretended tensor-parallel rank, on the reference backend."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def set_rank(monkeypatch):
    """set_rank(rank, size): what vLLM's layers built from now on take for their rank."""

    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    def set_rank(rank, size):
        for module in (linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(vocab_parallel_embedding, "tensor_model_parallel_all_reduce", lambda x: x)

    set_rank(0, 1)
    return set_rank


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    """Runs every layer wherever the compiled libraries are not built."""
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "reference")
