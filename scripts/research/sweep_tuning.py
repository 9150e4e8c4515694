# SPDX-License-Identifier: Apache-2.0
"""Divergence on held-out texts after training a finished checkpoint: how epochs and rates of quantizer/tuning were set.

Usage: python scripts/research/sweep_tuning.py MODEL CHECKPOINT TEXT [TEXT ...] [--first SHARE] [--epochs N]
           [--block-rate RATE --block-epochs N]

CHECKPOINT is a folder of `quip-vllm quantize MODEL CHECKPOINT --tune none` or `--tune refit`; its calibration text is
trained on. With --block-epochs each decoder layer is trained first, then all together. Two windows of 2048 tokens of
each text count.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quip_vllm.checkpoint.hub import load_tokenizer
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.evaluation.windows import windows_of
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.quantizer.plan import make_plan
from quip_vllm.quantizer.run import REPORT
from quip_vllm.quantizer.settings import EPOCHS, NONE, Settings
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer
from quip_vllm.quantizer.tuning import blocks, full
from quip_vllm.quantizer.tuning.block import Block

WINDOWS, LENGTH = 2, 2048


@torch.no_grad()
def main() -> int:
    """Trains, and prints the divergence before and after; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", nargs="+", help="files of kinds that no table reports on")
    parser.add_argument("--first", type=float, default=full.FIRST, help="share of the loss, of a single epoch")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--block-rate", type=float, default=blocks.RATE)
    parser.add_argument("--block-epochs", type=int, default=0)
    args = parser.parse_args()
    full.FIRST, blocks.RATE, blocks.EPOCHS = args.first, args.block_rate, args.block_epochs
    used = read_json(args.checkpoint / REPORT)["settings"]
    same = {key: used[key] for key in ("code", "bits", "calibration", "sequences", "sequence_length", "seed", "split")}
    settings = Settings(str(args.model), **same, tune=NONE)
    source, reader = LayeredModel(args.model), CheckpointReader(args.checkpoint)
    specs = make_plan(settings, source).specs
    begins = [f"{source.prefix}.{index}." for index in range(len(source.layers))]
    units = [reader.read([name for name in reader.names() if name.startswith(begin)]) for begin in begins]
    tokens = calibration_tokens(settings, args.model, source.vocabulary).split(settings.batch)
    tokenizer = load_tokenizer(args.model, False)
    windows = [windows_of(text, tokenizer, LENGTH, WINDOWS) for text in args.texts]
    originals = through(source, tokens)
    held_out = through(source, windows)

    source.read_others()
    plain = {name: parameter.detach().clone() for name, parameter in source.outer_vectors().items()}

    def tell(units: Sequence[Mapping[str, Tensor]], outer: Mapping[str, Tensor], what: str) -> None:
        for name, parameter in source.outer_vectors().items():  # training leaves its own
            parameter.data.copy_(plain[name])
        made = [Block(source, index, specs, unit) for index, unit in enumerate(units)]
        model = full.Model(source, made, windows, held_out, Path())
        for name, vector in outer.items():
            model.outer[name].data.copy_(vector)
        losses = [model.loss([i]) for i in range(len(windows))]
        print(
            what, *(f"{Path(text).name} {loss:.4f}" for text, loss in zip(args.texts, losses, strict=True)), flush=True
        )

    tell(units, plain, "before:")
    if args.block_epochs:
        train_layers(source, specs, units, tokens)
        tell(units, plain, "each layer trained:")
    with tempfile.TemporaryDirectory() as folder:
        trained, told = full.tune_together(
            source, specs, units.__getitem__, tokens, originals, Path(folder), settings.seed, args.epochs
        )
    print("on what was held out of the calibration:", told, flush=True)
    outer = {name: trained.pop(name) for name in source.outer_vectors()}
    tell([{name: trained.get(name, unit[name]) for name in unit} for unit in units], outer, "all trained:")
    return 0


def through(source: LayeredModel, batches: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the original's last layer for batches of tokens."""
    found = []
    for tokens in batches:
        (hidden,), calls = source.first_hidden_states(tokens, len(tokens))
        for index in range(len(source.layers)):
            with source.layer(index) as layer:
                hidden = run_layer(layer, hidden, calls[index])
        found.append(hidden)
    return found


def train_layers(
    source: LayeredModel, specs: Mapping[str, LinearSpec], units: list[dict[str, Tensor]], batches: Sequence[Tensor]
) -> None:
    """Trains each layer behind those before it, as a run does, and puts the result into `units`."""
    hidden, calls = source.first_hidden_states(torch.cat(list(batches)), len(batches[0]))
    targets = [x.clone() for x in hidden]
    for index, unit in enumerate(units):
        with source.layer(index) as layer:
            targets = [run_layer(layer, x, calls[index]) for x in targets]
        block = Block(source, index, specs, unit)
        blocks.tune_block(block, hidden, targets, calls[index], index)
        unit |= block.stored()
        with Block(source, index, specs, unit).layer() as layer:
            hidden = [run_layer(layer, x, calls[index]) for x in hidden]


if __name__ == "__main__":
    sys.exit(main())
