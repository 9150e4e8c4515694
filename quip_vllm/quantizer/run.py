# SPDX-License-Identifier: Apache-2.0
"""The run: calibrate; per decoder layer measure the curvature, quantize, keep the result, pass its output on; finish.

config.json is written last, so an unfinished folder is never served.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm import __version__
from quip_vllm.checkpoint import shards
from quip_vllm.checkpoint.store import local_folder, read_json, write_json
from quip_vllm.formats.tensors import tensor_specs
from quip_vllm.ops import dequantize
from quip_vllm.ops.extension import require_cpu_library
from quip_vllm.quantizer import record
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.layer import quantize_group
from quip_vllm.quantizer.plan import make_plan
from quip_vllm.quantizer.record import Record
from quip_vllm.quantizer.settings import Settings
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel, run_layer

REPORT = "quantization_report.json"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
BATCH_TOKENS = 2048
"""Per batch: few enough that the allocator reuses a layer's temporaries instead of mapping fresh pages."""
HEAD = "head"


@torch.no_grad()
def quantize(settings: Settings, out: Path, resume: bool = False) -> dict[str, Any]:
    """Quantizes ``settings.model`` into the folder ``out`` and returns the report that it also writes there.

    Raises:
        ValueError: bad input; the message names the value, the rule and the remedy. Finished layers stay.
    """
    if resume and (out / "config.json").exists() and (out / record.FOLDER).exists():  # killed while it was removed
        shutil.rmtree(out / record.FOLDER)
        return read_json(out / REPORT)
    run = Run(settings, out, resume)
    if not run.record.all_units_done:
        run.quantize_units()
    return run.finish()


class Run:
    """One run, from a checked start to a finished checkpoint.

    Attributes:
        settings: what the user wants.
        source: the model.
        plan: what becomes of each linear layer.
        record: what is finished.
        hidden: hidden states of the calibration text before the layer under work, behind the quantized layers.
        originals: the same in the original model, for the drift; empty where drift is not corrected.

    Raises:
        ValueError: something cannot be quantized or resumed, or the disk is too small.
    """

    def __init__(self, settings: Settings, out: Path, resume: bool):
        require_cpu_library()
        self.settings, self.out = settings, out
        self.source = LayeredModel(local_folder(settings.model))
        self.plan = make_plan(settings, self.source)
        wanted = {**settings.to_dict(), "quip_vllm": __version__, "compute_dtype": str(self.source.compute_dtype)}
        self.record = Record(out, {**wanted, "tensors": self._fingerprint()}, resume)
        self.layers = [f"layer-{index:05d}" for index in range(len(self.source.layers))]
        self.units = [*self.layers, HEAD] if self.plan.head else self.layers
        replaced = {f"{name}.weight" for name in self.plan.specs}
        if self.plan.head:
            replaced |= self.source.head_weights
        self.kept_bytes = {name: size for name, size in self.source.reader.bytes_of.items() if name not in replaced}
        self.hidden: list[Tensor] = []
        self.originals: list[Tensor] = []

    def quantize_units(self) -> None:
        """Quantizes every layer that the record does not have, in order, then the head."""
        self._check_space()
        tokens = self._tokens()
        batch = max(1, BATCH_TOKENS // tokens.shape[1])
        self.hidden, kwargs = self.source.first_hidden_states(tokens, batch)
        self.originals = [x.clone() for x in self.hidden] if self.settings.drift_correction else []
        for index in tqdm(range(len(self.layers)), desc=f"quantize to {self.settings.bits} bits", unit="layer"):
            self._layer(index, kwargs[index])
        if self.plan.head and not self.record.has(HEAD):
            self._head(self.plan.head, tokens)

    def finish(self) -> dict[str, Any]:
        """Writes the checkpoint's shards, its other files and the report, and removes the record."""
        inside = self.source.prefix + "."
        others = [name for name in self.kept_bytes if not name.startswith(inside)]
        self.record.merge(self.units, others, self.source.reader)
        tokens = self._tokens()
        report = {
            "quip_vllm": __version__,
            "settings": self.settings.to_dict(),
            "compute_dtype": str(self.source.compute_dtype),
            "calibration_tokens": tokens.numel(),
            "calibration_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
            "layers": [entry for unit in self.units for entry in self.record.entries(unit)],
        }
        folder = self.source.folder
        for file in {file for pattern in COPIED for file in folder.glob(pattern)}:
            ours = file.name in ("config.json", REPORT) or file.name.endswith(".index.json")
            if file.is_file() and not ours:
                shutil.copyfile(file, self.out / file.name)
        config = read_json(folder / "config.json")
        config["quantization_config"] = self.plan.config(self.settings, self.source.tied).to_dict()
        config.setdefault("dtype", config.pop("torch_dtype", None) or self.source.stored_dtype())
        write_json(self.out / REPORT, report)
        write_json(self.out / "config.json", config)
        self.record.remove()
        return report

    def _layer(self, index: int, kwargs: dict[str, Any]) -> None:
        """Quantizes one decoder layer, or takes it from the record, and moves `hidden` and `originals` behind it."""
        unit, names = self.layers[index], [name for name in self.source.linears(index) if name in self.plan.specs]
        groups = self._curvature(index, names, kwargs, self.record.has(unit))
        if not self.record.has(unit):
            missing = set(names) - {name for group in groups for name in group.names}
            if missing:
                raise ValueError(f"{min(missing)} never ran on the calibration text: leave it out (--ignore)")
            self._quantize(unit, self.source.read_layer(index), groups)
        if index + 1 == len(self.layers) and not self.plan.head:
            return  # nothing reads the layer's output
        with self.source.layer(index, self._stored(unit, names)) as layer:
            for i, x in enumerate(tqdm(self.hidden, desc=f"{unit}: outputs", leave=False)):
                self.hidden[i] = run_layer(layer, x, kwargs)

    def _curvature(self, index: int, names: list[str], kwargs: dict[str, Any], done: bool) -> list[Inputs]:
        """Runs the original layer: what its linear layers read, unless it is done; and `originals` behind it."""
        if done and not self.originals:
            return []
        linears = self.source.linears(index)
        with self.source.layer(index) as layer:
            collector = Collector({name: linears[name] for name in names})
            for i, x in enumerate(tqdm(self.hidden, desc=f"{self.layers[index]}: Hessians", leave=False)):
                if self.originals and index == 0:  # both are still the same
                    self.originals[i] = run_layer(layer, x, kwargs)
                    continue
                if self.originals:
                    with collector.original():
                        self.originals[i] = run_layer(layer, self.originals[i], kwargs)
                if not done:
                    with collector.inputs():
                        run_layer(layer, x, kwargs)
            return collector.close()

    def _head(self, name: str, tokens: Tensor) -> None:
        """Quantizes the output head behind the last layer's outputs."""
        group: Inputs | None = None
        batches = self.source.head_inputs(tokens, self.hidden)
        for x in tqdm(batches, total=len(self.hidden), desc="output head: Hessian", leave=False):
            group = group or Inputs.of(name, x.shape[-1])
            group.add(x)
        assert group is not None
        self._quantize(HEAD, self.source.reader.read([f"{name}.weight"]), [group])

    def _quantize(self, unit: str, tensors: dict[str, Tensor], groups: list[Inputs]) -> None:
        """Replaces the weights among a unit's tensors, and keeps the unit in the record."""
        entries = []
        for group in tqdm(groups, desc=f"{unit}: rounding", leave=False):
            weights = {name: tensors.pop(f"{name}.weight") for name in group.names}
            for name, result in quantize_group(group, weights, self.plan.specs, self.settings).items():
                tensors |= {f"{name}.{key}": value for key, value in result.tensors.items()}
                entries.append(result.entry)
        self.record.write(unit, tensors, entries)

    def _stored(self, unit: str, names: list[str]) -> dict[str, Tensor]:
        """A unit's tensors as they are stored, the quantized weights dequantized."""
        tensors = shards.read_shard(self.record.shard(unit))
        for name in names:
            spec = self.plan.specs[name]
            own = {one.name: tensors.pop(f"{name}.{one.name}") for one in tensor_specs(spec)}
            tensors[f"{name}.weight"] = dequantize(spec, own).to(self.source.compute_dtype)
        return tensors

    def _tokens(self) -> Tensor:
        return self.record.tokens(lambda: calibration_tokens(self.settings, str(self.source.folder)))

    def _fingerprint(self) -> str:
        """Of the names and shapes of the model's tensors."""
        listing = json.dumps(sorted(self.source.reader.shapes.items()))
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    def _check_space(self) -> None:
        """Raises ValueError unless the disk takes the checkpoint and, while shards are merged, one of them twice."""
        quantized = self.plan.stored_bytes()
        wanted = sum(self.kept_bytes.values()) + quantized + min(quantized, shards.SHARD_BYTES)
        there = sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.out).free
        if free + there < wanted:
            raise ValueError(
                f"{self.out} has {free / 1e9:.1f} GB free: about {(wanted - there) / 1e9:.1f} GB are needed; make "
                "room, then --resume"
            )
