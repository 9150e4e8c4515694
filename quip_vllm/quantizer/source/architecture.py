# SPDX-License-Identifier: Apache-2.0
"""What a folder holds according to its config.json, and why it may be no model that can be quantized."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quip_vllm.checkpoint.hub import explained
from quip_vllm.nn.experts import Experts, unstack


def check_kind(folder: Path, config: Any) -> None:
    """Raises ValueError unless a transformers config is that of a causal LM that is not quantized."""
    path = folder / "config.json"
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is quantized already: give the original bf16, fp16 or fp32 model")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{path} describes an encoder-decoder ({config.model_type}): {_ONLY}")
    names = getattr(config, "architectures", None) or []
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # its own code calls it one, whatever its name
    if names and not any(kind in name for name in names for kind in ("CausalLM", "LMHead", "ConditionalGeneration")):
        raise ValueError(f"{path} describes {', '.join(names):.100}: {_ONLY}")


_ONLY = "only causal language models, which write text token by token, are quantized"


def empty_model(folder: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a config in eval mode, parameters on the meta device, its experts with linear layers of their own.

    Raises:
        ValueError: there is none.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    path = folder / "config.json"
    try:
        with init_empty_weights(include_buffers=False), explained(path):
            make = AutoModelForCausalLM.from_config
            model = make(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        inner = config.get_text_config().model_type
        around = "" if inner == config.model_type else f"; give its language model ({inner}) alone"
        raise ValueError(
            f"{path} has model_type {config.model_type}, which is no causal LM to transformers: {_ONLY}{around}"
        ) from None
    unstack(model)
    return model


def decoder_layers(folder: Path, model: Any) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers. Raises ValueError for experts that are stacked in an unknown way."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules())
    }
    lists = {name: module for name, module in lists.items() if not any(name.startswith(f"{one}.") for one in lists)}
    of_text = {name: module for name, module in lists.items() if any(module is one for one in decoder.modules())}
    if not lists:
        raise ValueError(
            f"{folder} has no list of decoder layers that hold nn.Linear: this architecture is not supported"
        )
    path, layers = max((of_text or lists).items(), key=lambda item: len(item[1]))
    ours = tuple(f"{name}." for name, module in layers.named_modules() if isinstance(module, Experts))
    matrices = [one for one in layers.named_parameters() if one[1].dim() > 1 and not one[0].startswith(ours)]
    for name, parameter in sorted(matrices, key=lambda one: one[1].dim() < 3):
        owner = layers.get_submodule(name.rpartition(".")[0])
        if "expert" not in name + type(owner).__name__.lower():
            continue  # a linear layer, or a convolution and the like, which stays
        if parameter.dim() > 2:
            raise ValueError(
                f"{path}.{name} is a stack of experts of {parameter.dim()} dimensions: only models whose decoder "
                "layers hold plain nn.Linear, and experts stacked as Qwen3-MoE stacks them, can be quantized"
            )
        if "shared" not in name:
            raise ValueError(
                f"{path}.{name} belongs to a mixture of experts, of which only those that transformers stacks as it "
                "does Qwen3-MoE's can be quantized: give another model"
            )
    return path, layers


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not allocate."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
