# SPDX-License-Identifier: Apache-2.0
"""Any model as a float32 transformers model; our checkpoints are dequantized while they load."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.formats.methods import Method
from quip_vllm.ops import LinearSpec, dequantize

OWN_METHODS = {method.value for method in Method}


def load_model(model: str) -> Any:
    """A float32 causal LM in eval mode: a folder, a hub name, or a checkpoint of ours (dequantized).

    Raises:
        ValueError: the folder is no model, or its tensors do not fit its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(model)
    described = read_json(folder / "config.json").get("quantization_config") if folder.is_dir() else None
    if not described or described.get("quant_method") not in OWN_METHODS:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    loaded = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = loaded.load_state_dict(dense_state(folder), strict=False)
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or ())
    wrong = [name for name in (*missing, *unexpected) if name not in tied]
    if wrong:
        raise ValueError(f"{folder} and its config.json do not belong together: {wrong[0]} is in one of them only")
    loaded.tie_weights()
    return loaded.eval()


def dense_state(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's state dict with every quantized layer as a dense float32 ``weight``."""
    described = CheckpointConfig.from_dict(read_json(folder / "config.json")["quantization_config"])
    reader = CheckpointReader(folder)
    state: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in reader.read(reader.names()).items():
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.su" in reader and leaf != "bias":
            layers.setdefault(owner, {})[leaf] = tensor
        else:
            state[name] = tensor
    for owner, tensors in layers.items():
        bits = described.bits_of(owner)
        if bits is None:
            raise ValueError(f"{owner} holds quantized tensors: config.json says that it has none; quantize again")
        if "lut" in tensors:
            tensors["lut"] = tensors["lut"][None]
        n, k = tensors["sv"].shape[0], tensors["su"].shape[0]
        spec = LinearSpec(described.method, described.code, bits, k, (n,), described.hadamard_block)
        try:
            state[f"{owner}.weight"] = dequantize(spec, tensors)
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from None
    return state
