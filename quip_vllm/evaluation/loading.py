# SPDX-License-Identifier: Apache-2.0
"""Any model as a float32 transformers model; a quantized checkpoint is dequantized while it loads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.layers import layer_specs, read_config, read_layer, stored_names
from quip_vllm.checkpoint.store import CheckpointReader, local_folder, read_json
from quip_vllm.formats.spec import methods
from quip_vllm.ops import dequantize


def is_quantized(folder: Path) -> bool:
    """Whether config.json names one of our methods. Raises ValueError if its quantization_config is ill-typed."""
    described = read_json(folder / "config.json").get("quantization_config") or {}
    method = described.get("quant_method", "") if isinstance(described, dict) else None
    if not isinstance(method, str):
        raise ValueError(
            f"{folder / 'config.json'} has quantization_config {described!r:.200}: it must name quant_method"
        )
    return method in methods() or method == exl3.METHOD


def load_model(model: str) -> Any:
    """A float32 causal LM in eval mode, from a folder or a hub name; a quantized checkpoint of ours is dequantized.

    Raises:
        ValueError: the folder holds no model, or its tensors do not fit its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = local_folder(model)
    quantized = is_quantized(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds for a config.json that it does not understand
        raise ValueError(f"{folder / 'config.json'} cannot be used: {error}") from None
    if not quantized:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    del config.quantization_config
    state = dense_state(folder)
    if f"{exl3.HEAD}.weight" in state:  # EXL3 has a quantized head beside the embedding that it is tied to
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    loaded = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        missing, unexpected = loaded.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder} and its config.json do not belong together: {error}") from None
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or ())
    wrong = [name for name in (*missing, *unexpected) if name not in tied]
    if wrong:
        raise ValueError(f"{folder} and its config.json do not belong together: {wrong[0]} is in one of them only")
    loaded.tie_weights()
    return loaded.eval()


def dense_state(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's state dict with every quantized layer as a dense float32 ``weight``."""
    reader = CheckpointReader(folder)
    specs = layer_specs(reader, read_config(folder))
    quantized = {full for name, spec in specs.items() for full in stored_names(reader, name, spec)}
    state = reader.read(name for name in reader.names() if name not in quantized)
    for name, spec in specs.items():
        try:
            state[f"{name}.weight"] = dequantize(spec, read_layer(reader, name, spec))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.bias"][: spec.out_features]  # EXL3's is padded
    for layer, names in exl3.slices(specs).items():
        parts = [state.pop(f"{name}.weight") for name in names]
        state[f"{layer}.weight"] = torch.cat(parts, dim=1 if exl3.cuts_inputs(layer) else 0)
    return state
