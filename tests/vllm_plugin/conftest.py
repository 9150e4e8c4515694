# SPDX-License-Identifier: Apache-2.0
"""vLLM's own linear layers at a pretended tensor-parallel rank, and random checkpoint tensors to load in them."""

import importlib.util

import pytest
import torch

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def set_rank(monkeypatch):
    """set_rank(rank, size): what vLLM's layers and parameters built from now on take for their rank."""

    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def set_rank(rank, size):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    set_rank(0, 1)
    return set_rank


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "reference")


@pytest.fixture
def quant_config():
    """quant_config(code, bits, layers={name: (code, bits)}, ...): a config for vLLM."""

    from quip_vllm.vllm_plugin.config import CONFIGS

    def quant_config(code="1mad", bits=2, layers=None, **kwargs):
        formats = {name: LayerFormat(*stored) for name, stored in (layers or {}).items()}
        checkpoint = CheckpointConfig(LayerFormat(code, bits), layers=formats, **kwargs)
        config = CONFIGS[checkpoint.method](checkpoint)
        config.packed_modules_mapping = dict(FUSED)
        return config

    return quant_config


@pytest.fixture
def random_tensors():
    """random_tensors(code, bits, n, k, seed): a linear layer as checkpoint format 1 stores it, written out by hand."""

    def random_tensors(code, bits, n, k, seed=0):
        generator = torch.Generator().manual_seed(1000 * seed + bits)

        def words(*shape, dtype=torch.int16):
            info = torch.iinfo(dtype)
            return torch.randint(info.min, info.max + 1, shape, generator=generator).to(dtype)

        tensors = {
            # The seed leaves su alone: parts of one layer share it.
            "su": torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(k)).mul(2).sub(1).half(),
            "sv": torch.randn(n, generator=generator).half(),
        }
        if code == "e8p":
            tensors["codes"] = words(n, k // 8)
            if bits > 2:
                tensors["residual_codes"] = words(n, k // 8, dtype=torch.uint8 if bits == 3 else torch.int16)
        else:
            tensors["packed"] = words(n // 16, k * bits)
        if code == "hyb":
            tensors["table"] = torch.randn(512, 2, generator=generator).half()
        return tensors

    return random_tensors


@pytest.fixture
def load():
    """load(layer, tensors, shard_id): what a vLLM model does with each tensor of the checkpoint."""

    def load(layer, tensors, *shard_id):
        for name, tensor in tensors.items():
            param = getattr(layer, name)
            param.weight_loader(param, tensor, *shard_id)

    return load
