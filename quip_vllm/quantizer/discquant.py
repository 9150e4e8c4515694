# SPDX-License-Identifier: Apache-2.0
"""DiscQuant (arXiv 2501.06417): each weight goes to one of its two neighbouring levels, as the loss of the model says.

A rotated weight between the levels a and b = a + 1 is a + x, y at the start. Adam moves all x in [0, 1] together, along

    1 - 2 y + clip(f dKL/dx)

from a random start. The first term draws x to the level that is nearest to y; the other one, the gradient of the
divergence of the model's logits from the original's, holds against it. In the end each x is rounded. The paper's f is
so small here that it moves nothing: ours makes the root mean square of f dKL/dx PULL at the start.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quip_vllm.checkpoint.shards import read_shard, write_shard
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.curvature.inputs import fill_up
from quip_vllm.quantizer.layer import generator_of, in_units, input_signs, padded
from quip_vllm.quantizer.rounding.encoders import GridEncoder, make_encoder
from quip_vllm.quantizer.settings import Settings
from quip_vllm.quantizer.source.backward import Forward, Head
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer
from quip_vllm.quantizer.tuning.full import divergence
from quip_vllm.transforms.incoherence import rotate_weight, unrotate_weight

RATE = 0.1
"""Of Adam, after a warm-up of WARM of the steps; it falls to 0 as a cosine does."""
WARM = 1 / 8
PULL, CLIP = 1.0, 0.05
"""The latter is the paper's where weights are rotated: single batches decide too much beyond it."""
BYTES = 29
"""In memory, a weight: x, its gradient, two moments of Adam, 1 - 2 y, the level below, and twice the dense weight."""


class Levels:
    """The level of each weight of the decoder layers, in a folder; they are found where it does not exist.

    Args:
        folder: for a file per decoder layer. What is under work lies in another one beside it.
        source: the model.
        specs: full module name -> format, of its quantized layers, all of the grid.
        tokens: the text by batches, int64 [sequences, length].
        settings: seed, rotation and the number of steps.
    """

    def __init__(
        self,
        folder: Path,
        source: LayeredModel,
        specs: Mapping[str, LinearSpec],
        tokens: Sequence[Tensor],
        settings: Settings,
    ):
        self._folder, self._specs = folder, specs
        if folder.exists():
            return
        work = folder.with_suffix(".work")
        model = _Model(source, specs, tokens, settings, work / "inputs")
        model.train(settings)
        for index, linears in enumerate(model.linears):
            write_shard(self._file(work, index), {name: one.numbers() for name, one in linears.items()})
        work.rename(folder)

    def of(self, index: int) -> dict[str, Tensor]:
        """Of decoder layer `index`: full module name -> values, float32 [n, k], in units of the code."""
        found = read_shard(self._file(self._folder, index))
        return {name: _encoder(self._specs[name]).values(numbers) for name, numbers in found.items()}

    def _file(self, folder: Path, index: int) -> Path:
        return folder / f"layer-{index:05d}.safetensors"


def _encoder(spec: LinearSpec) -> GridEncoder:
    encoder = make_encoder(spec.code, spec.bits)
    assert isinstance(encoder, GridEncoder)
    return encoder


class _Linear:
    """One linear layer whose weights move between their neighbouring levels.

    Attributes:
        x: float32 [n, k], a leaf, 0 at the lower level and 1 at the upper one.
        slope: 1 - 2 y.
    """

    def __init__(self, name: str, weight: Tensor, su: Tensor, spec: LinearSpec, seed: int):
        self._encoder, self._spec = _encoder(spec), spec
        rows = in_units(name, weight.float(), su, spec, seed, self._encoder)
        self._su, self._sv = su, rows.sv
        at = (rows.units + self._encoder.last) / 2
        lower = at.floor().clamp_(0, self._encoder.last - 1)
        self._lower = lower.to(torch.uint8)
        self.slope = 1 - 2 * (at - lower).clamp_(0, 1)
        self.x = torch.rand(at.shape, generator=generator_of(seed, "x:" + name)).requires_grad_()

    def numbers(self) -> Tensor:
        """The numbers of the levels that are nearest to where the weights are now, uint8 [n, k]."""
        return self._lower + (self.x.detach() >= 0.5)

    def dense(self) -> Tensor:
        """The weight, float32 [n, k]."""
        values, spec = self._encoder.values(self._lower + self.x.detach()), self._spec
        whole = unrotate_weight(values, self._su, self._sv, spec.hadamard_block, chunks=spec.chunks)
        return whole[: spec.out_features]

    def see(self, gradient: Tensor | None) -> None:
        """Turns the gradient at the weight, None of an expert that no token reached, into that at x."""
        gradient = torch.zeros_like(self.x) if gradient is None else padded(gradient.cpu().float(), self._spec)
        block, chunks = self._spec.hadamard_block, self._spec.chunks
        self.x.grad = 2 * rotate_weight(gradient, self._su, self._sv, block, chunks=chunks)

    @property
    def gradient(self) -> Tensor:
        """The gradient at x."""
        assert self.x.grad is not None
        return self.x.grad


class _Model:
    """All decoder layers between their levels, in memory, and the outputs of the original's last layer.

    Attributes:
        linears: of each decoder layer, name -> its linear layer.
    """

    def __init__(
        self,
        source: LayeredModel,
        specs: Mapping[str, LinearSpec],
        tokens: Sequence[Tensor],
        settings: Settings,
        folder: Path,
    ):
        self._source, self._tokens, self._folder = source, tokens, folder
        self.linears: list[dict[str, _Linear]] = []
        self._weights: list[dict[str, Tensor]] = []
        hidden, calls = source.first_hidden_states(torch.cat(list(tokens)), len(tokens[0]))
        for index in tqdm(range(len(source.layers)), desc="levels", unit="layer", leave=False):
            weights = source.reader.read(source.layer_names(index))
            with source.layer(index, weights) as layer:
                modules = {name: one for name, one in source.linears(index).items() if name in specs}
                collector = Collector(modules)
                hidden[:1] = [run_layer(layer, hidden[0], calls[index])]
                groups = [group.names for group in fill_up(collector.close(), source.mixtures(index))]
                hidden[1:] = [run_layer(layer, x, calls[index]) for x in hidden[1:]]
            su = {
                name: input_signs(group, specs[name].in_features, settings.seed) for group in groups for name in group
            }
            self.linears.append(
                {name: _Linear(name, weights[f"{name}.weight"], su[name], specs[name], settings.seed) for name in su}
            )
            self._weights.append(weights)
        self._targets = hidden

    def train(self, settings: Settings) -> None:
        """Moves the weights."""
        steps = settings.rounding_steps or 0
        every = [one for linears in self.linears for one in linears.values()]
        adam = torch.optim.Adam([one.x for one in every], RATE, fused=True)
        warm = math.ceil(WARM * steps)
        rates = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        factor = 0.0
        order: list[int] = []
        with tqdm(range(steps), desc="discquant", unit="step") as bar:
            for step in bar:
                generator = torch.Generator().manual_seed(settings.seed + step)
                order = order or torch.randperm(len(self._tokens), generator=generator).tolist()
                bar.set_postfix_str(f"divergence {self._gradients(order.pop()):.4f}")
                if not step:
                    squares = math.fsum(float(one.gradient.square().sum(dtype=torch.float64)) for one in every)
                    factor = PULL / max(math.sqrt(squares / sum(one.x.numel() for one in every)), 1e-30)
                for one in every:
                    one.gradient.mul_(factor).clamp_(-CLIP, CLIP).add_(one.slope)
                adam.step()
                rates.step()
                for one in every:
                    one.x.data.clamp_(0, 1)

    def _gradients(self, index: int) -> float:
        """Leaves the gradients of a batch's divergence at every x; returns it, in nats per token."""
        total, tokens = 0.0, self._tokens[index]
        for weights, linears in zip(self._weights, self.linears, strict=True):
            for name, one in linears.items():
                weights[f"{name}.weight"] = one.dense().to(self._source.compute_dtype)

        def score(logits: Tensor, _: int, span: slice, head: Head) -> Tensor:
            nonlocal total
            loss, gradient = divergence(logits, head(self._targets[index][:, span]).float())
            total += loss / tokens.numel()
            return gradient / tokens.numel()

        def layer(at: int) -> AbstractContextManager[nn.Module]:
            return self._source.layer(at, self._weights[at])

        forward = Forward(self._source, tokens, len(tokens), self._folder, layer)
        for at, _, steps in forward.backward(score):
            modules = self._source.linears(at)
            for name in self.linears[at]:
                modules[name].weight.requires_grad_()
            for _ in steps:
                pass
            for name, one in self.linears[at].items():
                one.see(modules[name].weight.grad)
        return total
