# SPDX-License-Identifier: Apache-2.0
"""What is in a quantized checkpoint: every quantized layer, and totals."""

from pathlib import Path
from typing import Any

from quip_vllm.checkpoint.layers import layer_specs, read_config, stored_names
from quip_vllm.checkpoint.store import CheckpointReader, read_json


def inspect(folder: Path) -> dict[str, Any]:
    """Reads headers only.

    Returns:
        ``layers``: name, code, bits, shape [n, k], bytes, proxy_loss (null where the report is gone);
        ``totals``: layers, weights, bits_per_weight (all tensors of quantized layers but biases, over their weights),
        quantized_bytes, bytes (everything).

    Raises:
        ValueError: the folder is not a quantized checkpoint, or it is damaged.
    """
    config, reader = read_config(folder), CheckpointReader(folder)
    losses = _losses(folder / "quantization_report.json")
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "code": spec.code,
            "bits": spec.bits,
            "shape": [spec.out_features, spec.in_features],
            "bytes": sum(reader.bytes_of[full] for full in stored_names(reader, config, name, spec)),
            "proxy_loss": losses.get(name),
        }
        for name, spec in layer_specs(reader, config).items()
    ]
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


def _losses(report: Path) -> dict[str, float]:
    """Layer name -> proxy loss, empty where the report is gone."""
    if not report.exists():
        return {}
    try:
        return {str(entry["name"]): float(entry["proxy_loss"]) for entry in read_json(report)["layers"]}
    except (KeyError, TypeError):
        raise ValueError(f"{report} is damaged: delete it to see the checkpoint without its losses") from None


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
