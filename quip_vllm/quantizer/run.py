# SPDX-License-Identifier: Apache-2.0
"""The run: calibrate; per decoder layer measure the curvature, quantize, keep the result, pass its output on; finish.

config.json is written last, so an unfinished folder is never served.
"""

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm import __version__
from quip_vllm.checkpoint import shards
from quip_vllm.checkpoint.hub import SIDE_FILES, check_token, copy_files, load_tokenizer, local_folder, travelling
from quip_vllm.checkpoint.store import digest, read_json, write_json
from quip_vllm.formats.tensors import SU, tensor_specs
from quip_vllm.ops import dequantize
from quip_vllm.quantizer import checks, record
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.curvature.inputs import Inputs, fill_up
from quip_vllm.quantizer.curvature.outputs import Sensitivity
from quip_vllm.quantizer.devices import on_devices, usable_devices
from quip_vllm.quantizer.discquant import Levels
from quip_vllm.quantizer.layer import Quantized, quantize_group
from quip_vllm.quantizer.plan import make_plan, with_split
from quip_vllm.quantizer.plan_file import read_plan
from quip_vllm.quantizer.planning import Target, make_plan_file
from quip_vllm.quantizer.record import Record
from quip_vllm.quantizer.rounding.searchers import Searchers
from quip_vllm.quantizer.sensitivities import Sensitivities, chosen, spread_weights
from quip_vllm.quantizer.settings import BLOCKS, DISCQUANT, FULL, SELF, Settings
from quip_vllm.quantizer.source.architecture import out_of_memory
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import Calls, run_layer
from quip_vllm.quantizer.source.replay_check import check_replay
from quip_vllm.quantizer.tuning.block import Block, TokenRows
from quip_vllm.quantizer.tuning.blocks import tune_block
from quip_vllm.quantizer.tuning.full import tune_together

REPORT, PLAN = "quantization_report.json", "quantization_plan.json"
EMBEDDING, HEAD, TUNED = "embedding", "head", "tuned"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def quantize(
    settings: Settings,
    out: Path,
    resume: bool = False,
    target: Target | None = None,
    searchers: Searchers | None = None,
) -> dict[str, Any]:
    """Quantizes ``settings.model`` into the folder ``out`` and returns the report that it also writes there.

    Args:
        settings: what to do.
        out: the folder.
        resume: go on with an unfinished run.
        target: what a plan is to reach that is made first, and written beside the checkpoint.
        searchers: who searches beside this process. The codes do not depend on it.

    Raises:
        ValueError: bad input; the message names the value, the rule and the remedy. Finished layers stay.
    """
    # A finished run was killed while it removed its record.
    finished = resume and (out / "config.json").exists() and (out / record.FOLDER).exists()
    try:
        if target is not None and not finished:
            settings = _planned(settings, out, resume, target)
        run = None if finished else Run(settings, out, searchers)
        with record.locked(out):
            if run is None:
                shutil.rmtree(out / record.FOLDER)
                return read_json(out / REPORT)
            run.open(resume)
            if not run.record.all_units_done:
                run.quantize_units()
            return run.finish()
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        again = "give --resume; what is finished stays" if (out / record.FOLDER).exists() else "try again"
        raise ValueError(f"{out} cannot be written ({error.strerror}): make room on the disk, then {again}") from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        size = f"on {settings.device}" if on_gpu else shards.amount(psutil.virtual_memory().total)
        raise ValueError(
            f"the memory is too small ({size}): give fewer --sequences, a smaller --sequence-length or a smaller "
            "model; what is finished stays for --resume"
        ) from None


def _planned(settings: Settings, out: Path, resume: bool, target: Target) -> Settings:
    """The settings with a plan that is made now, or that the unfinished run in `out` has made."""
    with record.locked(out):
        file = out / record.FOLDER / record.PLAN
        if not resume:
            record.check_empty(out, file)
        if not (resume and file.exists()):
            file.unlink(missing_ok=True)
            write_json(file, make_plan_file(settings, target, out / record.FOLDER / "planning"))
        made = read_json(file)
        if made.get("target") != target.to_dict():
            raise ValueError(f"{out} was begun with the target {made.get('target')}: give the same or a new folder")
        return settings.with_plan(read_plan(file))


class Run:
    """One run, from a checked start to a finished checkpoint.

    Attributes:
        settings: what the user wants.
        source: the model.
        plan: what becomes of each linear layer.
        searchers: who searches beside this process.
        devices: where groups are rounded; the first runs the model.
        record: what is finished.
        amount: sequences of the calibration text, and tokens in each.
        hidden: hidden states of the calibration text before the layer under work, behind the quantized layers.
        originals: the same in the original model, for the drift and the training; empty where there is neither.

    Raises:
        ValueError: something cannot be quantized.
    """

    record: Record

    def __init__(self, settings: Settings, out: Path, searchers: Searchers | None = None):
        self.out, self.searchers = out, searchers
        trust = settings.trust_remote_code
        self.devices = usable_devices(settings.devices, searchers)
        self.source = LayeredModel(local_folder(settings.model, trust), trust, str(self.devices[0]))
        self.settings = with_split(settings, self.source)
        self.plan = make_plan(self.settings, self.source)
        if self.source.beyond:
            named = ", ".join(self.source.beyond[:4]) + (", ..." if len(self.source.beyond) > 4 else "")
            _LOG.warning("the model has no modules %s, which its files hold: they are copied as they are", named)
        checks.check_window(settings, self.source)
        load_tokenizer(self.source.folder, settings.trust_remote_code)
        travelling(self.source.folder, out, SIDE_FILES)
        self.layers = [f"layer-{index:05d}" for index in range(len(self.source.layers))]
        plan = self.plan
        outer = {EMBEDDING: plan.embedding is not None, HEAD: plan.head is not None, TUNED: settings.tune == FULL}
        embedding, head, tuned = ([unit] if wanted else [] for unit, wanted in outer.items())
        self.units = [*embedding, *self.layers, *head, *tuned]
        replaced = {f"{name}.weight" for name in self.plan.specs}
        if self.plan.head:
            replaced |= self.source.head_weights
        self.kept_bytes = {name: size for name, size in self.source.reader.bytes_of.items() if name not in replaced}
        self.amount: tuple[int, ...] = (0, 0)
        self.hidden: list[Tensor] = []
        self.originals: list[Tensor] = []
        self.sensitivities: Sensitivities | None = None
        self.levels: Levels | None = None

    def open(self, resume: bool) -> None:
        """Begins the record, or takes up the one that is there if all of it is of this model.

        Raises:
            ValueError: the disk is too small, a weight is not finite, or there is nothing that can be resumed.
        """
        reader = self.source.reader
        work = self.source.compute_dtype.itemsize * self.plan.weights() if self.settings.tune == FULL else 0
        checks.check_disk(self.out, sum(self.kept_bytes.values()), self.plan.stored_bytes(), work)
        config = (self.source.folder / "config.json").read_bytes()
        self._outside = digest(checks.checked(reader, sorted(self.source.outside), self.plan.specs))
        wanted = {
            **self.settings.to_dict(),
            "quip_vllm": __version__,
            "compute_dtype": str(self.source.compute_dtype),
            "config.json": hashlib.sha256(config).hexdigest()[:32],
            "tensors": hashlib.sha256(json.dumps(sorted(reader.shapes.items())).encode()).hexdigest()[:32],
            "weights outside the decoder layers": self._outside,
        }
        self.record = Record(self.out, wanted, resume)
        for index, unit in enumerate(tqdm(self.layers, desc="compare the finished layers", leave=False)):
            done = self.record.digest(unit)
            if done is not None and done != reader.digest(self.source.layer_names(index)):
                raise ValueError(
                    f"{self.out} was begun with other weights ({self.source.prefix}.{index} has changed): give the "
                    "model of then, or a new folder"
                )

    def quantize_units(self) -> None:
        """Quantizes every layer that the record does not have, in order, then the head."""
        check_replay(self.source, self._batches(self.settings.sequences))
        if SELF in self.settings.sources:  # else the text may have fewer
            checks.check_memory(self.settings, self.source, self.settings.sequences)
        else:  # reading it takes less time than reading all weights
            self.record.tokens(self._make_tokens)
        unfinished = [index for index, unit in enumerate(self.layers) if not self.record.has(unit)]
        backward = self.settings.backward and bool(unfinished)
        unread = range(len(self.layers)) if backward else unfinished
        names = [name for index in unread for name in self.source.layer_names(index)]
        weights = self._outside + digest(checks.checked(self.source.reader, names, self.plan.specs))
        tokens = self.record.tokens(self._make_tokens)
        for token in (int(tokens.min()), int(tokens.max())):  # a resumed run's are those of a file
            check_token(self.source.folder, token, self.source.vocabulary)
        checks.check_memory(self.settings, self.source, len(tokens))
        self.amount = tokens.shape
        if len(tokens) < self.settings.sequences:
            check_replay(self.source, self._batches(len(tokens)))
        batch, _ = self._batches(len(tokens))[0]
        if backward:
            folder = Path(self.settings.hessians or self.record.folder / "sensitivities")
            inside = set(self.plan.specs) - {self.plan.head, self.plan.embedding}
            two_sided, seed = self.settings.two_sided, self.settings.seed
            if self.settings.token_weights and any(self.source.mixtures(index) for index in range(len(self.layers))):
                _LOG.warning("the tokens of experts count the same: --token-weights holds for all other layers")
            heard = tokens[chosen(*self.amount)]
            self.sensitivities = Sensitivities(folder, self.source, weights, heard, batch, inside, two_sided, seed)
        if self.settings.rounding == DISCQUANT and unfinished:
            self.levels = Levels(
                self.record.folder / DISCQUANT, self.source, self.plan.specs, tokens.split(batch), self.settings
            )
        self.hidden, calls = self.source.first_hidden_states(tokens, batch)
        both = self.settings.drift_correction or self.settings.trains
        self.originals = [x.clone() for x in self.hidden] if both else []
        if self.plan.embedding:
            self._embedding(self.plan.embedding)
            self.hidden, _ = self.source.first_hidden_states(tokens, batch)
        if not self.record.has(TUNED):
            for index in tqdm(range(len(self.layers)), desc=self.settings.described, unit="layer"):
                self._layer(index, calls[index])
            if self.plan.head and not self.record.has(HEAD):
                self._head(self.plan.head, tokens)
            if self.settings.tune == FULL:
                self._tune(tokens.split(batch))

    def finish(self) -> dict[str, Any]:
        """Writes the checkpoint's shards, its other files and the report, and removes the record."""
        others = [name for name in self.source.outside if name in self.kept_bytes]
        self.record.merge(self.units, others, self.source.reader)
        tokens = self.record.tokens(self._make_tokens)
        report: dict[str, Any] = {
            "quip_vllm": __version__,
            "settings": self.settings.to_dict(),
            "compute_dtype": str(self.source.compute_dtype),
            "calibration_tokens": tokens.numel(),
            "calibration_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
            "layers": [entry for unit in self.units for entry in self.record.entries(unit)],
            "tuning": [told for unit in self.units for told in self.record.tuning(unit)],
            "searched": dict(self.searchers.done) if self.searchers else {},
        }
        self._tell_of_experts(report["layers"])
        folder = self.source.folder
        code = ["*.py"] if self.settings.trust_remote_code else []
        copy_files(folder, self.out, [*SIDE_FILES, *code], ("config.json", REPORT, PLAN))
        config = read_json(folder / "config.json")
        config["quantization_config"] = self.plan.config(self.settings, self.source.tied).to_dict()
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = self.source.stored_dtype()
        if (self.record.folder / record.PLAN).exists():
            shutil.copyfile(self.record.folder / record.PLAN, self.out / PLAN)
        write_json(self.out / REPORT, report)
        write_json(self.out / "config.json", config)
        self.record.remove()
        return report

    def _tell_of_experts(self, entries: list[dict[str, Any]]) -> None:
        """Warns once of all experts that saw too few tokens."""
        few = {entry["name"].rpartition(".")[0] for entry in entries if entry["borrowed_tokens"]}
        if few:
            mixtures = [one for index in range(len(self.layers)) for one in self.source.mixtures(index)]
            _LOG.warning(
                "%d of %d experts saw fewer tokens than they have inputs: the mean over the experts of a layer stands "
                "for the others (borrowed_tokens in %s); give more --sequences",
                len(few),
                sum(len(mixture.module) for mixture in mixtures),
                REPORT,
            )

    def _layer(self, index: int, calls: Calls) -> None:
        """Quantizes one decoder layer, or takes it from the record, and moves `hidden` and `originals` behind it."""
        unit, names = self.layers[index], [name for name in self.source.linears(index) if name in self.plan.specs]
        known = self.sensitivities.of(index, names) if self.sensitivities and not self.record.has(unit) else {}
        groups = self._curvature(index, names, calls, self.record.has(unit), known)
        if not self.record.has(unit):
            missing = set(names) - {name for group in groups for name in group.names}
            if missing:
                raise ValueError(f"{min(missing)} never ran on the calibration text: leave it out (--ignore)")
            self._finish_layer(index, groups, known, calls)
        if self._awaited(index, HEAD):
            self._outputs(index, calls)

    def _awaited(self, index: int, reader: str) -> bool:
        """Whether something is left to do that reads what is behind a layer: a later layer, or the unit `reader`."""
        behind = [unit for unit in self.units if unit == reader or unit in self.layers[index + 1 :]]
        return not all(map(self.record.has, behind))

    def _finish_layer(self, index: int, groups: list[Inputs], known: Mapping[str, Sensitivity], calls: Calls) -> None:
        """Rounds a decoder layer, trains it where that is wanted, and keeps it in the record."""
        unit, tuning = self.layers[index], []
        levels = self.levels.of(index) if self.levels else None
        tensors, entries, original = self._quantized(unit, self.source.layer_names(index), groups, known, levels)
        if self.settings.tune == BLOCKS and groups:
            block = Block(self.source, index, self.plan.specs, tensors)
            told = tune_block(block, self.hidden, self.originals, calls, self.settings.seed + index)
            tensors |= block.stored()
            tuning = [{"name": f"{self.source.prefix}.{index}", **told}]
        self.record.write(unit, tensors, entries, original, tuning)

    def _outputs(self, index: int, calls: Calls) -> None:
        """Moves `hidden` behind a layer as it is stored."""
        unit = self.layers[index]
        with self.source.layer(index, self._stored(unit)) as layer:
            for i, x in enumerate(tqdm(self.hidden, desc=f"{unit}: outputs", leave=False)):
                self.hidden[i] = run_layer(layer, x, calls)

    def _tune(self, batches: Sequence[Tensor]) -> None:
        """Trains all layers together, with head and embedding where they are quantized."""
        folder = self.record.folder / TUNED

        def read(index: int) -> dict[str, Tensor]:
            return shards.read_shard(self.record.shard(self.layers[index]))

        def rows(unit: str, name: str | None) -> TokenRows | None:
            if name is None:
                return None
            tensors = shards.read_shard(self.record.shard(unit))
            return TokenRows(name, self.plan.specs[name], tensors, self.source)

        head = rows(HEAD, self.plan.head)
        embedding = head if self.source.tied else rows(EMBEDDING, self.plan.embedding)
        seed, epochs = self.settings.seed, self.settings.epochs or 0
        tensors, told = tune_together(
            self.source, self.plan.specs, read, batches, self.originals, folder, seed, epochs, head, embedding
        )
        self.record.write(TUNED, tensors, [], "", [{"name": self.source.prefix, **told}])
        shutil.rmtree(folder)

    def _curvature(
        self, index: int, names: list[str], calls: Calls, done: bool, known: Mapping[str, Sensitivity]
    ) -> list[Inputs]:
        """Runs the original layer: what its linear layers read, unless it is done; and `originals` behind it."""
        if done and not (self.originals and self._awaited(index, TUNED)):
            return []
        linears = self.source.linears(index)
        with self.source.layer(index) as layer:
            share = self.settings.token_weights
            own = {name: one.weights for name, one in known.items() if share and len(one.weights)}
            weights = {name: spread_weights(one, share, *self.amount) for name, one in own.items()}
            mixtures = self.source.mixtures(index)
            experts = {name: mixture.module for mixture in mixtures for name in mixture.linears}
            collector = Collector({name: linears[name] for name in names}, weights, experts)
            for i, x in enumerate(tqdm(self.hidden, desc=f"{self.layers[index]}: Hessians", leave=False)):
                if self.originals and index == 0 and not self.plan.embedding:  # both are still the same
                    self.originals[i] = run_layer(layer, x, calls)
                    continue
                if self.originals:
                    with collector.original():
                        self.originals[i] = run_layer(layer, self.originals[i], calls)
                if not done:
                    with collector.inputs():
                        run_layer(layer, x, calls)
            return fill_up(collector.close(), mixtures)

    def _embedding(self, name: str) -> None:
        """Quantizes an embedding that is not tied to the head, unless it is done, and has the model look up its rows.

        An error in any of its columns costs the same as far as is known, so its Hessian is the identity. How often a
        token occurs does not matter: each row has its own scale, and is rounded as well as its bits allow.
        """
        if not self.record.has(EMBEDDING):
            columns = self.plan.specs[name].in_features
            identity = Inputs([name], torch.eye(columns, dtype=torch.float64, device=self.source.device))
            self.record.write(EMBEDDING, *self._quantized(EMBEDDING, [f"{name}.weight"], [identity], {}))
        self.source.set_embedding(self._stored(EMBEDDING)[f"{name}.weight"])

    def _head(self, name: str, tokens: Tensor) -> None:
        """Quantizes the output head behind the last layer's outputs."""
        group: Inputs | None = None
        batches = self.source.head_inputs(tokens, self.hidden)
        for x in tqdm(batches, total=len(self.hidden), desc="output head: Hessian", leave=False):
            group = group or Inputs.of(name, x.shape[-1], x.device)
            group.add(x)
        assert group is not None
        self.record.write(HEAD, *self._quantized(HEAD, [f"{name}.weight"], [group], {}))

    def _quantized(
        self,
        unit: str,
        names: list[str],
        groups: list[Inputs],
        known: Mapping[str, Sensitivity],
        levels: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]], str]:
        """A unit's tensors with weights replaced, its entries of the report, and the digest of its original."""
        tensors, entries = self.source.reader.read(names), []
        original = digest(sorted(tensors.items()))

        def rounded(group: Inputs) -> dict[str, Quantized]:
            weights = {name: tensors.pop(f"{name}.weight") for name in group.names}
            return quantize_group(group, weights, self.plan.specs, self.settings, known, levels, self.searchers)

        found = on_devices(self.devices, groups, rounded)
        for results in tqdm(found, desc=f"{unit}: rounding", total=len(groups), leave=False):
            for name, result in results.items():
                tensors |= {f"{name}.{key}": value for key, value in result.tensors.items()}
                entries.append(result.entry)
        return tensors, entries, original

    def _stored(self, unit: str) -> dict[str, Tensor]:
        """A layer's tensors as they are stored, the quantized weights dequantized."""
        tensors = shards.read_shard(self.record.shard(unit))
        for name in [name for name in self.plan.specs if f"{name}.{SU.name}" in tensors]:
            spec = self.plan.specs[name]
            own = {one.name: tensors.pop(f"{name}.{one.name}").to(self.source.device) for one in tensor_specs(spec)}
            tensors[f"{name}.weight"] = dequantize(spec, own).to(self.source.compute_dtype)
        return tensors

    def _make_tokens(self) -> Tensor:
        """The calibration tokens, read or written."""
        return calibration_tokens(self.settings, self.source.folder, self.source.vocabulary)

    def _batches(self, count: int) -> list[tuple[int, int]]:
        """(sequences, tokens in each) of the first and the last of the batches that `count` sequences make."""
        length = self.settings.sequence_length
        batch = min(count, self.settings.batch)
        return [(batch, length), (count % batch or batch, length)]
