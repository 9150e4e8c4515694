# SPDX-License-Identifier: Apache-2.0
"""Any model as a float32 transformers model; a quantized checkpoint is dequantized while it loads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.hub import brief, check_depth, explained, load_config, local_folder
from quip_vllm.checkpoint.layers import DAMAGED, layer_specs, others_of, read_config, read_layer
from quip_vllm.checkpoint.published import HEAD
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.formats.spec import LinearSpec, methods
from quip_vllm.nn.experts import restack
from quip_vllm.ops import dequantize
from quip_vllm.ops.extension import usable_device


def is_quantized(folder: Path) -> bool:
    """Whether config.json names one of our methods. Raises ValueError if its quantization_config is ill-typed."""
    model = read_json(folder / "config.json")
    described = model.get("quantization_config") or {}
    method = described.get("quant_method", "") if isinstance(described, dict) else None
    if not isinstance(method, str):
        raise ValueError(
            f"{folder / 'config.json'} has quantization_config {described!r:.200}: it must name quant_method"
        )
    return method in methods() or method == exl3.METHOD or "quip_params" in model


def load_model(
    model: str, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A causal LM in eval mode, from a folder or a hub name; a quantized checkpoint of ours is dequantized.

    Args:
        model: folder or hub name.
        trust_remote_code: whether Python code among the model's files may run.
        dtype: of its weights and its arithmetic.
        device: torch's name of where it runs.

    Raises:
        ValueError: torch cannot use the device, or the folder holds no model, or not every weight of the one that its
            config.json describes.
    """
    there, folder = usable_device(device), local_folder(model, trust_remote_code)
    state = None
    if is_quantized(folder):
        check_complete(folder, trust_remote_code)  # by headers, before any weight is made
        state = dense_state(folder)
    return _loaded(folder, state, trust_remote_code, dtype=dtype).eval().to(there)


def check_complete(folder: Path, trust_remote_code: bool = False) -> None:
    """Raises ValueError unless a checkpoint of ours has every weight of its model; reads headers only."""
    reader = CheckpointReader(folder)
    reader.check_floats()
    config = read_config(folder)
    specs = layer_specs(reader, config)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    others = {name: empty(*reader.shapes[name]) for name in others_of(reader, config, specs)}
    state = _dense(config, specs, others, lambda _, spec: empty(spec.out_features, spec.in_features))
    _loaded(folder, state, trust_remote_code, device_map="meta")


def _loaded(folder: Path, state: dict[str, Tensor] | None, trust_remote_code: bool, **options: Any) -> Any:
    """The folder's model with the weights of `state`, or with its own; names are mapped as transformers does."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, **options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    config = load_config(folder, trust_remote_code)
    check_depth(config, CheckpointReader(folder).names())
    if not getattr(config, "quantization_config", None):
        config.__dict__.pop("quantization_config", None)  # an empty one, which transformers takes for a method
    if state is None:
        _check_readable(folder, config)
    with explained(folder / "config.json"):
        if state is None:
            options |= {"config": config, "use_safetensors": True, "trust_remote_code": trust_remote_code}
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)  # a pair, with output_loading_info
            model, info = loaded
        else:
            config.__dict__.pop("quantization_config", None)
            if f"{HEAD}.weight" in state:  # EXL3 has a quantized head beside the embedding that it is tied to
                config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            restack(empty, state)
            model, info = type(empty).from_pretrained(None, config=config, state_dict=state, **options)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{name} is {tuple(stored)}, of which config.json makes {tuple(wanted)}: {DAMAGED}")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{folder} has no weight {name}, which the model of its config.json needs: {DAMAGED}")
    if state is not None and info["unexpected_keys"]:
        described = read_config(folder)
        quantized = layer_specs(CheckpointReader(folder), described)
        served = {part for name in quantized for part, _ in described.parts_of(name) or [(name, 0)]}
        for name in sorted(set(info["unexpected_keys"]) & {f"{name}.weight" for name in served}):
            raise ValueError(f"{folder} holds {name}, which the model of its config.json has not: {DAMAGED}")
    return model


def _check_readable(folder: Path, config: Any) -> None:
    """Raises ValueError for a model that transformers would load without what its weights mean."""
    from transformers.quantizers.auto import AutoHfQuantizer

    described = getattr(config, "quantization_config", None)
    if described is None:
        CheckpointReader(folder).check_floats()
    elif not AutoHfQuantizer.supports_quant_method(described):
        method = described.get("quant_method") if isinstance(described, dict) else None
        raise ValueError(
            f"{folder} is quantized by the method {method!r}, which neither quip_vllm nor transformers reads: give "
            "the original model"
        )


def dense_state(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's state dict with every quantized layer as a dense float32 ``weight``."""
    reader, config = CheckpointReader(folder), read_config(folder)
    specs = layer_specs(reader, config)

    def weight(name: str, spec: LinearSpec) -> Tensor:
        try:
            return dequantize(spec, read_layer(reader, config, name, spec))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    return _dense(config, specs, reader.read(others_of(reader, config, specs)), weight)


def _dense(
    config: CheckpointConfig,
    specs: Mapping[str, LinearSpec],
    state: dict[str, Tensor],
    weight: Callable[[str, LinearSpec], Tensor],
) -> dict[str, Tensor]:
    """Adds the ``weight`` of every quantized layer to the state dict of all else.

    A layer of several parts is cut, and slices of a layer are joined.
    """
    for name, spec in specs.items():
        parts = config.parts_of(name) or [(name, spec.out_features)]
        pieces = weight(name, spec).split([rows for _, rows in parts])
        state |= {f"{part}.weight": piece for (part, _), piece in zip(parts, pieces, strict=True)}
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.bias"][: spec.out_features]  # EXL3's is padded
    for layer, names in exl3.slices(specs).items():
        joined = [state.pop(f"{name}.weight") for name in names]
        try:
            state[f"{layer}.weight"] = torch.cat(joined, dim=1 if exl3.cuts_inputs(layer) else 0)
        except RuntimeError as error:
            raise ValueError(f"{layer} is in slices that do not fit together ({brief(error)}): {DAMAGED}") from None
    return state
