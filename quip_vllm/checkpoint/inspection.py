# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint of ours: every quantized layer, and totals."""

from pathlib import Path
from typing import Any

from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.store import CheckpointReader, read_json

TENSORS = ("packed", "codes", "residual_codes", "su", "sv", "lut")


def inspect(folder: Path) -> dict[str, Any]:
    """Reads headers only.

    Returns:
        ``layers``: name, method, code, bits, shape [n, k], bytes, proxy_loss (null where the report is gone);
        ``totals``: layers, weights, bits_per_weight (all tensors of quantized layers but biases, over their weights),
        quantized_bytes, bytes (everything).

    Raises:
        ValueError: not a checkpoint of ours, or damaged.
    """
    raw = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / 'config.json'} has no quantization_config: this is not a quantized checkpoint")
    config = CheckpointConfig.from_dict(raw)
    reader = CheckpointReader(folder)
    report = folder / "quantization_report.json"
    losses = {e["name"]: e["proxy_loss"] for e in read_json(report)["layers"]} if report.exists() else {}
    layers: list[dict[str, Any]] = []
    for name in sorted({n.removesuffix(".su") for n in reader.names() if n.endswith(".su")}, key=_natural):
        shape = [reader.shapes[f"{name}.sv"][0], reader.shapes[f"{name}.su"][0]]
        size = sum(reader.bytes_of.get(f"{name}.{key}", 0) for key in TENSORS)
        layers.append(
            {
                "name": name,
                "method": config.method.value,
                "code": config.code.value if config.code else None,
                "bits": config.bits_of(name),
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
    return {"checkpoint": str(folder), "quantization_config": raw, "layers": layers, "totals": totals}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def format_inspection(found: dict[str, Any]) -> str:
    """A table for a person."""
    width = max((len(layer["name"]) for layer in found["layers"]), default=5)
    lines = [f"{'layer':{width}}  method      code   bits  {'shape':>14}  {'bytes':>12}  proxy loss"]
    for layer in found["layers"]:
        loss = "-" if layer["proxy_loss"] is None else f"{layer['proxy_loss']:.5f}"
        shape = "x".join(map(str, layer["shape"]))
        lines.append(
            f"{layer['name']:{width}}  {layer['method']:10}  {layer['code'] or '-':5}  {layer['bits']:>4}  "
            f"{shape:>14}  {layer['bytes']:>12,}  {loss:>10}"
        )
    totals = found["totals"]
    lines.append(
        f"{totals['layers']} layers, {totals['weights']:,} weights, {totals['bits_per_weight']:.3f} bits per weight; "
        f"{totals['quantized_bytes']:,} of {totals['bytes']:,} bytes"
    )
    return "\n".join(lines)
