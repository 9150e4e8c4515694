# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint of ours: every quantized layer, and totals."""

from pathlib import Path
from typing import Any

from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.formats.spec import FORMATS
from quip_vllm.formats.tensors import SU, SV


def inspect(folder: Path) -> dict[str, Any]:
    """Reads headers only.

    Returns:
        ``layers``: name, code, bits, shape [n, k], bytes, proxy_loss (null where the report is gone);
        ``totals``: layers, weights, bits_per_weight (all tensors of quantized layers but biases, over their weights),
        quantized_bytes, bytes (everything).

    Raises:
        ValueError: not a checkpoint of ours, or damaged.
    """
    config = read_config(folder)
    reader = CheckpointReader(folder)
    losses = _losses(folder / "quantization_report.json")
    layers: list[dict[str, Any]] = []
    for name in quantized_layers(reader, config):
        shape = [reader.shapes[f"{name}.{vector.name}"][0] for vector in (SV, SU)]
        size = sum(reader.bytes_of.get(f"{name}.{key}", 0) for key in _tensor_names())
        stored = config.layer_format(name)
        assert stored is not None  # quantized_layers
        layers.append(
            {
                "name": name,
                "code": stored.code,
                "bits": stored.bits,
                "shape": shape,
                "bytes": size,
                "proxy_loss": losses.get(name),
            }
        )
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    quantized = sum(layer["bytes"] for layer in layers)
    totals = {
        "layers": len(layers),
        "weights": weights,
        "bits_per_weight": round(8 * quantized / weights, 4) if weights else 0.0,
        "quantized_bytes": quantized,
        "bytes": sum(reader.bytes_of.values()),
    }
    return {"checkpoint": str(folder), "quantization_config": config.to_dict(), "layers": layers, "totals": totals}


def read_config(folder: Path) -> CheckpointConfig:
    """What config.json says of a checkpoint of ours. Raises ValueError for anything else."""
    raw = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / 'config.json'} has no quantization_config: this is not a quantized checkpoint")
    return CheckpointConfig.from_dict(raw)


def quantized_layers(reader: CheckpointReader, config: CheckpointConfig) -> list[str]:
    """Names of the quantized layers in order.

    Raises:
        ValueError: one of them lacks a vector ``su`` or ``sv``, or ``config`` says that it is not quantized.
    """
    names = {owner for owner, _, leaf in (name.rpartition(".") for name in reader.names()) if leaf in _tensor_names()}
    for name in names:
        for vector in (SU.name, SV.name):
            if len(reader.shapes.get(f"{name}.{vector}", ())) != 1:
                raise ValueError(
                    f"{name} has no vector {vector}: the checkpoint is damaged; fetch or quantize it again"
                )
        if config.layer_format(name) is None:
            raise ValueError(f"{name} holds quantized tensors: config.json says that it has none; quantize again")
    return sorted(names, key=_natural)


def _tensor_names() -> set[str]:
    """Names of all tensors that some format has."""
    specs = (one for format in FORMATS.values() for bits in format.bits for one in format.tensors(bits))
    return {SU.name, SV.name, *(one.name for one in specs)}


def _losses(report: Path) -> dict[str, float]:
    """Layer name -> proxy loss, empty where the report is gone."""
    if not report.exists():
        return {}
    try:
        return {str(entry["name"]): float(entry["proxy_loss"]) for entry in read_json(report)["layers"]}
    except (KeyError, TypeError):
        raise ValueError(f"{report} is damaged: delete it to see the checkpoint without its losses") from None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def format_inspection(found: dict[str, Any]) -> str:
    """A table for a person."""
    width = max((len(layer["name"]) for layer in found["layers"]), default=5)
    lines = [f"{'layer':{width}}  code   bits  {'shape':>14}  {'bytes':>12}  proxy loss"]
    for layer in found["layers"]:
        loss = "-" if layer["proxy_loss"] is None else f"{layer['proxy_loss']:.5f}"
        shape = "x".join(map(str, layer["shape"]))
        lines.append(
            f"{layer['name']:{width}}  {layer['code']:5}  {layer['bits']:>4}  "
            f"{shape:>14}  {layer['bytes']:>12,}  {loss:>10}"
        )
    totals = found["totals"]
    lines.append(
        f"{totals['layers']} layers, {totals['weights']:,} weights, {totals['bits_per_weight']:.3f} bits per weight; "
        f"{totals['quantized_bytes']:,} of {totals['bytes']:,} bytes"
    )
    return "\n".join(lines)
