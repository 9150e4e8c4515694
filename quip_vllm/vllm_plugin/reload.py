# SPDX-License-Identifier: Apache-2.0
"""Weights are reloaded whole, as they were loaded, or the reload is refused and the engine goes on with those it has.

When vLLM asks a model to load again, it has taken the tensors that run aside and has not changed them. So everything
that is to come is read and compared with what was loaded first, and only then do the layers get any of it.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.layers import tensor_names
from quip_vllm.checkpoint.store import Header

SOURCE = ("model", "model_weights", "revision")
"""What vLLM overwrites in its model's config before it reloads from elsewhere."""


@dataclass(frozen=True)
class Loaded:
    """What a model was loaded from: the attributes `SOURCE`, and the header of every tensor by its name on disk."""

    source: Mapping[str, Any]
    headers: Mapping[str, Header]


def source_now() -> dict[str, Any]:
    """Where vLLM takes weights from now; empty outside of an engine."""
    config = get_current_vllm_config_or_none()
    return {} if config is None else {name: getattr(config.model_config, name, None) for name in SOURCE}


def noted(weights: Iterable[tuple[str, Tensor]], headers: dict[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """The same weights; their headers are added to ``headers``."""
    for name, tensor in weights:
        headers[name] = Header(tuple(tensor.shape), tensor.dtype)
        yield name, tensor


def checked(
    model: Module, weights: Iterable[tuple[str, Tensor]], before: Loaded | None, copied: bool
) -> list[tuple[str, Tensor]]:
    """All weights of a reload.

    Args:
        model: it has been prepared for reloading.
        weights: name on disk and tensor.
        before: what the model was loaded from; None if it was started without weights, which leaves nothing to compare.
        copied: whether a tensor is valid only until the next one is read.

    Raises:
        ValueError: they cannot be read, or are not a whole checkpoint of the same layers in the same formats. The model
            is as it was before the reload.
    """
    headers: dict[str, Header] = {}
    try:
        problem = None if before is None else _other_quantization(before)
        read = [] if problem else [(name, one.clone() if copied else one) for name, one in noted(weights, headers)]
    except Exception as error:  # whatever vLLM and the libraries below it raise for files that are not there or damaged
        problem, read = " ".join(f"they cannot be read ({error})".split())[:400], []
    if problem is None and before is not None:
        problem = _difference(before.headers, headers)
    if problem is None:
        return read
    name = source_now().get("model", "the weights")
    _restore(model, before)
    raise ValueError(
        f"reload of {name} is refused, the engine goes on with the weights that it has: {problem}; "
        "reload a whole checkpoint of the same model that was quantized with the same settings"
    )


def _other_quantization(before: Loaded) -> str | None:
    """How config.json, if weights come from a folder or the hub, describes other formats than those that are served."""
    config, now = get_current_vllm_config_or_none(), source_now()
    if config is None or config.quant_config is None:
        return None
    model = get_hf_file_to_dict("config.json", now["model"], now["revision"] or "main")
    if model is None:
        return None if now == before.source else "it has no config.json"
    if "quantization_config" not in model:
        return "its config.json has no quantization_config"
    quant: Any = config.quant_config
    served = quant.described()
    try:
        found = quant.from_config(model["quantization_config"]).described()
    except ValueError as error:
        return f"in its config.json, {error}"
    keys = [key for key in {**served, **found} if served.get(key) != found.get(key)]
    return f"its quantization_config has another {', '.join(keys)}" if keys else None


def _difference(before: Mapping[str, Header], now: Mapping[str, Header]) -> str | None:
    """The first tensor that is missing, unknown or another than it was. A dense tensor may be in another float type."""
    for name in before.keys() - now.keys():
        return f"{name} is missing"
    quantized = {*tensor_names(), *exl3.LEAVES}
    for name, one in now.items():
        was = before.get(name)
        if was is None:
            return f"{name} was not in the checkpoint that is served"
        ours = name.rpartition(".")[2] in quantized
        cast = not ours and one.dtype.is_floating_point and was.dtype.is_floating_point
        if one.shape != was.shape or (one.dtype != was.dtype and not cast):
            return f"{name} is {one.dtype} {list(one.shape)} in place of {was.dtype} {list(was.shape)}"
    return None


def _restore(model: Module, before: Loaded | None) -> None:
    """Puts back the tensors that run, and where vLLM takes weights from."""
    config = get_current_vllm_config_or_none()
    if config is not None and before is not None:
        for name, value in before.source.items():
            setattr(config.model_config, name, value)
    log = logging.getLogger(finalize_layerwise_reload.__module__)
    log.disabled, was = True, log.disabled  # it would warn of every layer that it has no new weights
    try:
        finalize_layerwise_reload(model, None if config is None else config.model_config)
    finally:
        log.disabled = was
