# SPDX-License-Identifier: Apache-2.0
"""Writes quantized checkpoints of tiny mixtures of experts: random codes under the names of their linear layers."""

import json
import re

import torch
from random_layers import random_layer
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat

WIDTHS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
"""Of the attention, as vLLM has it on a CPU."""
LINEAR = re.compile(r"(_proj|_proj_with_mqa|\.experts\.\d+\.w[123])$")


def save(architecture, folder, **changes):
    """Writes the dense model; returns its folder."""
    return save_model(folder, architecture, **{**WIDTHS, **changes})


def write(out, architecture="Qwen3Moe", code="1mad", bits=2, block=None, seed=0, ignored=("kv_b_proj",), **changes):
    """Makes a model and its folder, all linear layers but routers and `ignored` quantized; returns the folder."""
    save(architecture, out, **changes)
    stored, kept = {}, set()
    for i, (key, tensor) in enumerate(load_file(out / "model.safetensors").items()):
        name = key.removesuffix(".weight")
        if not LINEAR.search(name) or name.endswith(ignored):
            stored[key] = tensor
            if tensor.dim() == 2:
                kept.add(name)
            continue
        n, k = tensor.shape
        spec = LayerFormat(code, bits).spec(k, (n,), block)
        tensors = random_layer(spec, 1000 * seed + i)
        signs = torch.Generator().manual_seed(k + sum(map(int, re.findall(r"\d+", name))))  # gate and up share theirs
        tensors["su"] = torch.randint(0, 2, (k,), generator=signs).mul(2).sub(1).half()
        tensors["sv"] = tensors["sv"] * 0.1
        stored |= {f"{name}.{leaf}": one for leaf, one in tensors.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    described = CheckpointConfig(LayerFormat(code, bits), block, modules_to_not_convert=tuple(sorted(kept)))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": described.to_dict()}))
    return out
