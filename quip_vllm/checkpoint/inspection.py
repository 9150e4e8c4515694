# SPDX-License-Identifier: Apache-2.0
"""What is in a quantized checkpoint: every quantized layer, every ordinary weight matrix, and totals."""

import re
from pathlib import Path
from typing import Any

from quip_vllm.checkpoint.layers import layer_specs, others_of, read_config, stored_names
from quip_vllm.checkpoint.published import natural
from quip_vllm.checkpoint.store import CheckpointReader, read_json


def inspect(folder: Path) -> dict[str, Any]:
    """Reads headers only.

    Returns:
        ``layers``: name, code, bits, shape [n, k], bytes, proxy_loss (null where the report is gone);
        ``ordinary``: name, dtype, bits, shape, bytes of the weight matrices that are not quantized;
        ``totals``: layers, weights, bits_per_weight (all tensors of quantized layers but biases, over their weights),
        quantized_bytes, bytes (everything).

    Raises:
        ValueError: the folder is not a quantized checkpoint, or it is damaged.
    """
    config, reader = read_config(folder), CheckpointReader(folder)
    specs = layer_specs(reader, config)
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
        for name, spec in specs.items()
    ]
    ordinary = [
        {
            "name": full.removesuffix(".weight"),
            "dtype": str(reader.dtypes[full]).removeprefix("torch."),
            "bits": 8 * reader.dtypes[full].itemsize,
            "shape": list(reader.shapes[full]),
            "bytes": reader.bytes_of[full],
        }
        for full in sorted(others_of(reader, config, specs), key=natural)
        if full.endswith(".weight") and len(reader.shapes[full]) == 2
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
    described = {"checkpoint": str(folder), "quantization_config": config.to_dict()}
    return {**described, "layers": layers, "ordinary": ordinary, "totals": totals}


def _losses(report: Path) -> dict[str, float]:
    """Layer name -> proxy loss, empty where the report is gone."""
    if not report.exists():
        return {}
    try:
        return {str(entry["name"]): float(entry["proxy_loss"]) for entry in read_json(report)["layers"]}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{report} is damaged: delete it to see the checkpoint without its losses") from None


def _kind(row: dict[str, Any]) -> str:
    return str(row.get("code") or row["dtype"])


def _folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for what the experts of a decoder layer have in common, with the bytes of all and the mean loss."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", row["name"])
        alike.setdefault((name, _kind(row), row["bits"], *row["shape"]), []).append(row)
    folded = []
    for (name, *_), of in alike.items():
        losses = [row["proxy_loss"] for row in of if row.get("proxy_loss") is not None]
        loss = sum(losses) / len(of) if len(losses) == len(of) else None
        folded.append({**of[0], "name": name, "bytes": sum(row["bytes"] for row in of), "proxy_loss": loss})
    return folded


def format_inspection(found: dict[str, Any]) -> str:
    """A table for a person."""
    rows = _folded([*found["layers"], *found["ordinary"]])
    width, kinds = (max(map(len, of), default=5) for of in ([row["name"] for row in rows], map(_kind, rows)))
    lines = [f"{'layer':{width}}  {'code':{kinds}}  bits  {'shape':>14}  {'bytes':>12}  proxy loss"]
    for row in rows:
        loss = "-" if row.get("proxy_loss") is None else f"{row['proxy_loss']:.5f}"
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"{row['name']:{width}}  {_kind(row):{kinds}}  {row['bits']:>4}  {shape:>14}  {row['bytes']:>12,}  "
            f"{loss:>10}"
        )
    totals = found["totals"]
    lines.append(
        f"{totals['layers']} layers, {totals['weights']:,} weights, {totals['bits_per_weight']:.3f} bits per weight; "
        f"{totals['quantized_bytes']:,} of {totals['bytes']:,} bytes"
    )
    return "\n".join(lines)
