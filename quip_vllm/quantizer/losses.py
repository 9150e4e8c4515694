# SPDX-License-Identifier: Apache-2.0
"""What each layer adds to the KL divergence in each format: one pass backwards, and a sample of its rows rounded.

The second-order model of the KL divergence, in nats per token: for errors E of a layer's weight, x_t its input and g_t
the gradient, at its output, of the cross entropy of labels drawn from the model itself,

    KL = 1/2T sum_s (sum_t g_t . E x_t)^2  ~  c/2T sum_t mean_j(g_tj^2) |E x_t|^2  =  c/2 tr(E H E^T)

over sequences s and their tokens t, with H the Hessian of the inputs weighted by the mean squares of the gradients
(GuidedQuant, arXiv 2505.07004), not normalised: so the losses of all layers have one unit and add up. The factor c
says how much the tokens of a sequence act together; it is exact for white E, sum_s |sum_t g_t x_t^T|^2 over
sum_t |g_t|^2 |x_t|^2. Rows of a rotated weight are alike, so a few of them tell how large E will be, and those are
rounded as the run will round them all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.quantizer.curvature import Curvature
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.layer import in_units, signs
from quip_vllm.quantizer.rounding.encoders import Encoder, make_encoder
from quip_vllm.quantizer.rounding.ldlq import Ldlq
from quip_vllm.quantizer.settings import Settings
from quip_vllm.quantizer.source.backward import Forward, Head, Score, sampled_score
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.transforms.incoherence import rotate_hessian

ROWS = 64
"""Rows of a linear layer that are rounded in each format."""
TOKEN_ROWS = 256
"""The same of a head or an embedding, whose rows differ."""

Formats = Mapping[str, Sequence[LayerFormat]]
"""Layer -> the formats between which a plan chooses."""


def measure(
    source: LayeredModel, formats: Formats, tokens: Tensor, batch: int, settings: Settings, folder: Path
) -> tuple[dict[str, dict[LayerFormat, float]], dict[str, float]]:
    """The losses of the linear layers, of the head and the embedding that `formats` names.

    Args:
        source: the model.
        formats: of each layer.
        tokens: int64 [count, length].
        batch: sequences at a time.
        settings: seed, rotation, rounding and damping.
        folder: for the hidden states of all layers, which are removed.

    Returns:
        (layer -> format -> nats per token; linear layer -> what noise of variance 1 in every weight would add).

    Raises:
        ValueError: a layer never ran on the tokens.
    """
    losses: dict[str, dict[LayerFormat, float]] = {}
    of_noise: dict[str, float] = {}
    rows = _TokenRows(source, tokens.split(batch))
    forward = Forward(source, tokens, batch, folder)
    with rows.watching():
        passes = forward.backward(rows.score(settings.seed))
        bar = tqdm(passes, total=len(source.layers), desc="measure", unit="layer")
        for index, layer, steps in bar:
            linears = {name: module for name, module in source.linears(index).items() if name in formats}
            sums = _Sums(linears)
            watch = layer.register_forward_pre_hook(rows.see_embedded, with_kwargs=True) if index == 0 else None
            for _ in tqdm(steps, total=len(rows.batches), leave=False, unit="batch"):
                pass
            if watch is not None:
                watch.remove()
            for name, (inputs, together) in sums.close().items():
                weight, share = linears[name].weight, together / tokens.numel()
                alone = _linear_losses(name, weight, inputs, formats[name], settings)
                losses[name] = {stored: share * loss for stored, loss in alone.items()}
                of_noise[name] = share * 0.5 * len(weight) * float(inputs.hessian.trace())
            for name in (name for mixture in source.mixtures(index) for name in mixture.linears):
                if name in formats:  # no token reached the expert
                    losses.setdefault(name, dict.fromkeys(formats[name], 0.0))
    missing = {name for name in formats if name not in losses and name not in rows.names}
    if missing:
        raise ValueError(f"{min(missing)} never ran on the calibration text: leave it out (--ignore)")
    for name in formats:
        if name in rows.names:
            losses[name] = rows.losses(name, formats[name], settings)
    return {name: losses[name] for name in formats}, of_noise


class _Sums:
    """Hooks on linear layers that sum x x^T, weighted by the mean square of the gradient at the token's outputs.

    And squares of the weight's gradient, of whole sequences.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]):
        self._squares = dict.fromkeys(linears, 0.0)
        self._inputs = {
            name: Inputs.of(name, module.in_features, module.weight.device) for name, module in linears.items()
        }
        self._outputs = {name: module.out_features for name, module in linears.items()}
        self._handles = [
            module.register_forward_hook(lambda _, args, out, name=name: self._see(name, args[0], out))
            for name, module in linears.items()
        ]

    def _see(self, name: str, x: Tensor, out: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            g, rows = gradient.float(), x.detach().float()
            self._inputs[name].add(rows, g.square().mean(-1).flatten())
            for of_sequence, its in zip(g.view(-1, *g.shape[-2:]), rows.view(-1, *rows.shape[-2:]), strict=True):
                self._squares[name] += float((of_sequence.T @ its).square().sum())

        if out.requires_grad:  # not of a layer that only chooses, as sparse attention's
            out.register_hook(add)

    def close(self) -> dict[str, tuple[Inputs, float]]:
        """Removes the hooks; of the layers that ran, the sums and how much the tokens of a sequence act together."""
        for handle in self._handles:
            handle.remove()
        found = {}
        for name, inputs in self._inputs.items():
            alone = self._outputs[name] * float(inputs.hessian.trace())
            if inputs.tokens:
                found[name] = inputs, self._squares[name] / alone if alone > 0 else 1.0
        return found


def _linear_losses(
    name: str, weight: Tensor, inputs: Inputs, formats: Sequence[LayerFormat], settings: Settings
) -> dict[LayerFormat, float]:
    """What a linear layer adds in each format, summed over all tokens."""
    hessian, dead = inputs.regularised(settings.damping)
    su = signs(len(hessian), settings.seed, "su:" + name).to(hessian.device)
    n, k = weight.shape
    specs = {stored: settings.spec(name, stored, n, k) for stored in formats}
    turned = rotate_hessian(hessian, su, settings.hadamard_block, next(iter(specs.values())).input_chunks)
    rounding, cost = Ldlq(turned, settings.rounding), Curvature(turned)
    found = {}
    for stored, spec in specs.items():
        encoder = make_encoder(stored.code, stored.bits)
        rows = in_units(name, weight.float().masked_fill(dead, 0.0), su, spec, settings.seed, encoder)
        lost = _lost(rows.units[:ROWS], encoder, rounding, cost, settings.damping)
        mean = float(lost.mean() * rows.scale.double().square())
        found[stored] = 0.5 * len(weight) * mean * float(inputs.unit())
    return found


def _lost(units: Tensor, encoder: Encoder, rounding: Ldlq, cost: Curvature, damping: float) -> Tensor:
    """What rounding costs each of some rows in units of the code, float64 [rows], without the damping's part of it."""
    rounded = rounding.round(pad(units, (0, 0, 0, -len(units) % encoder.rows)), encoder).values
    error = units - rounded[: len(units)]
    return cost.energies(error) - damping * error.double().square().sum(1)


class _TokenRows:
    """What is known of the head and the embedding: how much each row counts, and the Hessian of the head's inputs.

    An error e of a head's row j changes a logit by e . x_t, which the KL divergence weighs with p_tj (1 - p_tj). One of
    an embedding's row changes the hidden states of all of its tokens, where it is weighed with the square of the sum of
    their gradients.

    Attributes:
        batches: the tokens.
        names: of the two, one name where they are tied.
    """

    def __init__(self, source: LayeredModel, batches: Sequence[Tensor]):
        self.source, self.batches = source, batches
        self.names = {source.embedding_name, source.head_name}
        self._head = torch.zeros(source.vocabulary, dtype=torch.float64)
        self._embedding = torch.zeros(source.vocabulary, dtype=torch.float64)
        self._inputs: Inputs | None = None
        self._tokens = sum(one.numel() for one in batches)
        self._at = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what the head reads is summed."""
        handle = self.source.head.register_forward_pre_hook(self._see_head_input)
        try:
            yield
        finally:
            handle.remove()

    def _see_head_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs = self._inputs or Inputs.of(str(self.source.head_name), args[0].shape[-1], args[0].device)
        self._inputs.add(args[0].detach())

    def score(self, seed: int) -> Score:
        """The score of sampled labels, which also sums how much the rows of the head count."""
        sampled = sampled_score(seed)

        def score(logits: Tensor, index: int, span: slice, head: Head) -> Tensor:
            p = logits.softmax(-1).flatten(0, -2)
            self._head += (p * (1 - p)).sum(0, dtype=torch.float64).cpu()
            return sampled(logits, index, span, head)

        return score

    def see_embedded(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the first decoder layer, batch by batch."""
        batch = self.batches[self._at]
        self._at += 1

        def add(gradient: Tensor) -> None:
            for ids, of_sequence in zip(batch, gradient.float().cpu(), strict=True):  # equal tokens act together
                tokens, which = ids.unique(return_inverse=True)
                sums = torch.zeros(len(tokens), of_sequence.shape[-1]).index_add_(0, which, of_sequence)
                self._embedding.index_add_(0, tokens, sums.double().square().sum(-1))

        (args[0] if args else kwargs["hidden_states"]).register_hook(add)

    def losses(self, name: str, formats: Sequence[LayerFormat], settings: Settings) -> dict[LayerFormat, float]:
        """Those of the embedding, of the head, or of both in one, which is rounded under the head's Hessian."""
        weight = self.source.reader.read([f"{name}.weight"])[f"{name}.weight"]
        n, k = weight.shape
        device = self.source.device
        identity = Inputs([name], torch.eye(k, dtype=torch.float64, device=device), 1)
        inputs = self._inputs if name == self.source.head_name and self._inputs is not None else identity
        hessian, dead = inputs.regularised(settings.damping)
        su = signs(k, settings.seed, "su:" + name).to(device)
        turned = rotate_hessian(hessian, su, settings.hadamard_block)
        rounding = Ldlq(turned, settings.rounding)
        generator = torch.Generator().manual_seed(settings.seed)
        uses = []
        if name == self.source.head_name:
            uses.append((self._head, turned, settings.damping, float(inputs.unit()) / inputs.tokens))
        if name == self.source.embedding_name:
            uses.append((self._embedding, torch.eye(k, device=device), 0.0, 1 / k))
        found = dict.fromkeys(formats, 0.0)
        for counts, cost, damping, unit in uses:
            drawn = torch.multinomial(counts, TOKEN_ROWS, replacement=True, generator=generator)
            part = weight[drawn].to(device).float().masked_fill(dead, 0.0)
            for stored in formats:
                spec = settings.spec(name, stored, n, k, rotate_output=False)
                encoder = make_encoder(stored.code, stored.bits)
                rows = in_units(name, part, su, spec, settings.seed, encoder)
                lost = _lost(rows.units, encoder, rounding, Curvature(cost), damping)
                mean = float((lost * rows.scale.double().square()).mean())
                found[stored] += 0.5 * float(counts.sum()) / self._tokens * mean * unit
        return found
