# SPDX-License-Identifier: Apache-2.0
"""The run: calibrate, then for each decoder layer collect Hessians, quantize, write its shard, pass its output on.

A killed run loses at most the layer under work. ``OUT/.quantize`` holds the settings, the calibration tokens and a
record a finished layer; config.json and the index are written last, so an unfinished folder is never served.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from quip_vllm import __version__
from quip_vllm.checkpoint.config import CheckpointConfig, Head, LayerFormat
from quip_vllm.checkpoint.store import (
    CheckpointReader,
    local_folder,
    read_json,
    read_shard,
    shard_name,
    write_index,
    write_json,
    write_shard,
)
from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.quantizer.calibration import calibration_tokens
from quip_vllm.quantizer.group import quantize_group
from quip_vllm.quantizer.head import check_head, do_head
from quip_vllm.quantizer.hessian import Group, HessianCollector
from quip_vllm.quantizer.model import LayeredModel, run_layer
from quip_vllm.quantizer.settings import Settings

RECORD = ".quantize"
REPORT = "quantization_report.json"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
BATCH_TOKENS = 2048  # small enough that the allocator reuses the layer's temporaries instead of mapping fresh pages


def quantize(settings: Settings, out: Path, resume: bool = False) -> dict[str, Any]:
    """Quantizes ``settings.model`` into the folder ``out`` and returns the report that it also writes there.

    Raises:
        ValueError: bad input; the message names the value, the rule and the remedy. Finished layers stay.
    """
    record = out / RECORD
    if resume and (out / "config.json").exists() and record.exists():  # killed while its record was being removed
        shutil.rmtree(record)
        return read_json(out / REPORT)
    folder = local_folder(settings.model)
    source = LayeredModel(folder)
    wanted = [_layer_bits(settings, source, index) for index in range(len(source.layers))]
    if not any(wanted) and settings.lm_head is None:
        raise ValueError(f"no linear layer of {settings.model} is left to quantize: give a narrower --ignore")
    check_head(settings, source)
    _open_record(settings, source, out, resume)
    _check_space(out, source)
    tokens = _tokens(settings, record, folder)
    hidden, kwargs = source.first_hidden_states(tokens, max(1, BATCH_TOKENS // tokens.shape[1]))
    # The same text in the original model, for the drift.
    originals = [x.clone() for x in hidden] if settings.drift_correction else []
    count = len(source.layers)
    dtype = next(iter(source.layer_tensors(0).values())).dtype
    entries: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc=f"quantize to {settings.bits} bits", unit="layer"):
        entries += _do_layer(settings, source, index, originals, hidden, kwargs[index], out)
    others, shards = source.other_names(), _shard_count(settings, source)
    if settings.lm_head is not None:
        entries.append(do_head(settings, source, tokens, hidden, out / shard_name(count, shards), record / "head.json"))
        others = [name for name in others if name not in source.head_weights]
    write_shard(out / shard_name(shards - 1, shards), source.reader.read(others))
    write_index(out, shards)
    report = {
        "quip_vllm": __version__,
        "settings": settings.to_dict(),
        "compute_dtype": str(source.compute_dtype),
        "calibration_tokens": tokens.numel(),
        "calibration_sha256": _digest(tokens),
        "layers": entries,
    }
    _finish(settings, source, folder, out, report, str(dtype).removeprefix("torch."))
    return report


def _open_record(settings: Settings, source: LayeredModel, out: Path, resume: bool) -> None:
    """Starts OUT/.quantize, or checks that what is there was made with the same settings."""
    state = out / RECORD / "settings.json"
    wanted = {**settings.to_dict(), "quip_vllm": __version__, "compute_dtype": str(source.compute_dtype)}
    wanted["tensors"] = _fingerprint(source.reader)
    if not resume:
        if any(file.is_file() and file != state for file in out.rglob("*")):
            raise ValueError(f"{out} is not empty: give a new folder, or --resume to go on with an unfinished run")
        (out / RECORD).mkdir(parents=True, exist_ok=True)
        write_json(state, wanted)
        return
    if (out / "config.json").exists():
        raise ValueError(f"{out} is finished: there is nothing to resume; give a new folder to quantize again")
    if not state.exists():
        raise ValueError(f"{out} holds no unfinished run: leave --resume away")
    found = read_json(state)
    wanted = json.loads(json.dumps(wanted))
    changed = [
        f"{key} was {found.get(key)!r} and is now {value!r}" for key, value in wanted.items() if found.get(key) != value
    ]
    if changed:
        raise ValueError(f"{out} was begun with other settings: {'; '.join(changed)}; give the same or a new folder")


def _fingerprint(reader: CheckpointReader) -> str:
    listing = json.dumps([(name, reader.shapes[name]) for name in sorted(reader.names())])
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _check_space(out: Path, source: LayeredModel) -> None:
    """The output is at most as large as the input, and usually a quarter of it."""
    wanted = sum(source.reader.bytes_of[name] for name in source.other_names())
    inside = sum(source.reader.bytes_of.values()) - wanted
    wanted += inside // 2
    free = shutil.disk_usage(out).free
    if free < wanted:
        raise ValueError(
            f"{out} has {free / 1e9:.1f} GB free: about {wanted / 1e9:.1f} GB are needed; make room, then --resume"
        )


def _tokens(settings: Settings, record: Path, folder: Path) -> Tensor:
    file = record / "calibration.safetensors"
    if not file.exists():
        write_shard(file, {"tokens": calibration_tokens(settings, str(folder))})
    return load_file(file)["tokens"]


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _spec(settings: Settings, weight_shape: tuple[int, ...], bits: int) -> LinearSpec:
    n, k = weight_shape
    return LinearSpec(settings.code, bits, k, (n,), settings.hadamard_block)


def _layer_bits(settings: Settings, source: LayeredModel, index: int) -> dict[str, int]:
    """Name inside the layer -> bits, for the linears to quantize. Raises ValueError for one that cannot be."""
    chosen: dict[str, int] = {}
    for name, module in _linears(source.layers[index]).items():
        full = f"{source.prefix}.{index}.{name}"
        bits = settings.bits_of(full)
        if bits is None:
            continue
        problem = CpuBackend().refusal(_spec(settings, tuple(module.weight.shape), bits))
        if problem is not None:
            raise ValueError(f"{full} cannot be quantized: {problem}")
        chosen[name] = bits
    return chosen


@torch.inference_mode()
def _do_layer(
    settings: Settings,
    source: LayeredModel,
    index: int,
    originals: list[Tensor],
    hidden: list[Tensor],
    kwargs: dict[str, Any],
    out: Path,
) -> list[dict[str, Any]]:
    """Quantizes layer ``index``, or reads it back where its shard is there.

    Replaces ``originals`` by the outputs of the original layer and ``hidden`` by those of the quantized one.
    """
    shard = out / shard_name(index, _shard_count(settings, source))
    entry_file = out / RECORD / f"layer-{index:05d}.json"
    prefix = f"{source.prefix}.{index}."
    bits = _layer_bits(settings, source, index)
    layer = source.fill(index)
    done = shard.exists() and entry_file.exists()
    collector = HessianCollector({name: module for name, module in _linears(layer).items() if name in bits})
    began = time.monotonic()
    for i, x in enumerate(tqdm(hidden, desc=f"layer {index}: Hessians", leave=False)):
        arguments = kwargs_for(kwargs, x)
        if originals and index == 0:  # both are the same yet
            originals[i] = run_layer(layer, x, arguments)
            continue
        if originals:
            with collector.original():
                originals[i] = run_layer(layer, originals[i], arguments)
        if not done:
            with collector.inputs():
                run_layer(layer, x, arguments)
    groups = collector.close()
    source.empty(index)  # a layer in the compute dtype and one in the checkpoint's are never there together
    if not done:
        missing = set(bits) - {name for group in groups for name in group.names}
        if missing:
            raise ValueError(f"{prefix}{sorted(missing)[0]} never ran on the calibration text: leave it out (--ignore)")
        tensors, linears = _encode_layer(settings, source, index, groups, bits)
        write_shard(shard, tensors)
        del tensors
        write_json(entry_file, {"seconds": round(time.monotonic() - began, 3), "linears": linears})
    if index + 1 == len(source.layers) and settings.lm_head is None:
        return read_json(entry_file)["linears"]  # nothing reads the layer's output
    rounded = {}
    for name, level in bits.items():
        own = read_shard(shard, prefix + name + ".")
        own.pop("bias", None)
        shape = source.reader.shapes[prefix + name + ".weight"]
        rounded[name + ".weight"] = dequantize(_spec(settings, shape, level), own).to(source.compute_dtype)
    layer = source.fill(index, rounded)
    for i, x in enumerate(tqdm(hidden, desc=f"layer {index}: outputs", leave=False)):
        hidden[i] = run_layer(layer, x, kwargs_for(kwargs, x))
    source.empty(index)
    return read_json(entry_file)["linears"]


def _encode_layer(
    settings: Settings, source: LayeredModel, index: int, groups: list[Group], bits: dict[str, int]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(the tensors of the layer's shard, an entry for the report a linear layer)."""
    prefix = f"{source.prefix}.{index}."
    tensors = {prefix + name: tensor for name, tensor in source.layer_tensors(index).items()}
    entries = []
    for group in tqdm(groups, desc=f"layer {index}: rounding", leave=False):
        weights = {prefix + name: tensors.pop(f"{prefix}{name}.weight") for name in group.names}
        start = time.monotonic()
        results = quantize_group(group, weights, {prefix + name: bits[name] for name in group.names}, settings)
        for name, result in results.items():
            tensors |= {f"{name}.{key}": value for key, value in result.tensors.items()}
            entries.append(result.entry(name, weights[name], start))
    return tensors, entries


def _shard_count(settings: Settings, source: LayeredModel) -> int:
    """One a decoder layer, one for the quantized head, one for the rest."""
    return len(source.layers) + (settings.lm_head is not None) + 1


def kwargs_for(kwargs: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The recorded keyword arguments for a batch of x's size: batch-sized ones are cut or expanded from one row."""
    batch = x.shape[0]

    def fit(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] != batch:
            return value[:1].expand(batch, *value.shape[1:])
        return tuple(fit(v) for v in value) if isinstance(value, tuple) else value

    return {key: fit(value) for key, value in kwargs.items()}


def _finish(
    settings: Settings, source: LayeredModel, folder: Path, out: Path, report: dict[str, Any], dtype: str
) -> None:
    """Copies tokenizer and licence files, writes the report and config.json, and removes the record."""
    for pattern in COPIED:
        for file in folder.glob(pattern):
            ours = file.name in ("config.json", REPORT) or file.name.endswith(".index.json")
            if file.is_file() and not ours:
                shutil.copyfile(file, out / file.name)
    quantized = {entry["name"]: entry["bits"] for entry in report["layers"]}
    head = None
    if settings.lm_head is not None:
        head = Head(source.head_name, LayerFormat(settings.code, quantized.pop(source.head_name)), source.tied)
    skipped = [name for name in source.other_linears if head is None or name != head.module]
    for index, layer in enumerate(source.layers):
        names = (f"{source.prefix}.{index}.{name}" for name in _linears(layer))
        skipped += [name for name in names if name not in quantized]
    described = CheckpointConfig(
        LayerFormat(settings.code, settings.bits),
        settings.hadamard_block,
        tuple(skipped),
        {name: LayerFormat(settings.code, bits) for name, bits in quantized.items() if bits != settings.bits},
        head,
    )
    config = read_json(folder / "config.json")
    config["quantization_config"] = described.to_dict()
    config.setdefault("dtype", config.pop("torch_dtype", None) or dtype)
    write_json(out / REPORT, report)
    write_json(out / "config.json", config)
    shutil.rmtree(out / RECORD)


def default_code(method: str, bits: int) -> str:
    """The code of a method used where none is named (docs/benchmarks: quality.md, cpu.md).

    HYB up to 2 bits: on a CPU it is served 1.6 times as fast as 1MAD or more, for 1 % of perplexity. 1MAD above, where
    HYB's 1024 vectors lose more (a sixth of the proxy loss at 4 bits), and end at 4 bits.
    """
    if method == "quip_sharp":
        return "e8p"
    return "hyb" if bits <= 2 else "1mad"
