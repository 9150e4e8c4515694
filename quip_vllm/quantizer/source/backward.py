# SPDX-License-Identifier: Apache-2.0
"""A model run backwards over a text with one decoder layer in memory, as check-pointed training does.

First every layer runs once, and its inputs go to the disk. Then, from the output head to the first layer, each runs
again with autograd, on the gradient that the layer behind it left. Hooks of the caller see what they want meanwhile.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quip_vllm.checkpoint.shards import read_shard, write_shard
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import Calls, run_layer

LOGITS = 1 << 22
"""Logits that are in memory at a time: 16 MiB in float32, of which a handful of copies is alive. With more of them a
CPU's cache is too small, and with 32 MiB every tensor is memory that the kernel has to clear."""
ROWS = 64
"""Positions that share a reading of the head's weight in any case. With a vocabulary of 262,144 and 16 of them, the
reading takes a third of the time."""

Layers = Callable[[int], AbstractContextManager[nn.Module]]
"""Index -> the layer, in memory inside the block, as `LayeredModel.layer` gives it."""
Head = Callable[[Tensor], Tensor]
"""Outputs of the last layer, [sequences, positions, hidden] -> logits, as `LayeredModel.output_head` gives it."""
Score = Callable[[Tensor, int, slice, Head], Tensor]
"""(float32 logits [sequences, positions, vocabulary], index of the batch, positions, the head that gave them) -> the
loss's gradient there."""


class Forward:
    """A text's hidden states before every layer, in the files of a folder, and the calls of each layer.

    Args:
        source: the model.
        tokens: int64 [count, length].
        batch: sequences at a time.
        folder: for the files, which `backward` removes.
        layers: what runs in place of the source's own layers.

    Attributes:
        gradients: by batch, before the layer that `backward` has come to.
    """

    gradients: list[Tensor]

    def __init__(
        self, source: LayeredModel, tokens: Tensor, batch: int, folder: Path, layers: Layers | None = None
    ) -> None:
        self.source, self.folder = source, folder
        self.layers = layers or source.layer
        hidden, self.calls = source.first_hidden_states(tokens, batch)
        folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(len(source.layers)), desc="forward", unit="layer", leave=False):
            write_shard(self._file(index), {f"{i:06d}": x.cpu() for i, x in enumerate(hidden)}, lasting=False)
            with self.layers(index) as layer:
                hidden = [run_layer(layer, x, self.calls[index]) for x in hidden]
        self.outputs = hidden

    def backward(self, score: Score) -> Iterator[tuple[int, nn.Module, Iterator[None]]]:
        """Runs backwards; yields (index, layer, one step per batch) from the last layer to the first.

        The caller registers its hooks on the layer, goes through the steps, and removes the hooks. Parameters that want
        gradients add them up in their ``grad``, those of what the model does behind its layers, too.

        Args:
            score: the loss's gradient at the logits.
        """
        self.gradients = gradients = list(self._at_outputs(score))
        self.outputs = []
        for index in reversed(range(len(self.source.layers))):
            inputs = read_shard(self._file(index))
            with self.layers(index) as layer:
                read = [inputs[name].to(self.source.device) for name in sorted(inputs)]
                steps = self._steps(layer, read, gradients, self.calls[index])
                yield index, layer, steps
                for _ in steps:  # what the caller left
                    pass
            self._file(index).unlink()

    def _at_outputs(self, score: Score) -> Iterator[Tensor]:
        """The gradients at the outputs of the last layer, batch by batch."""
        with self.source.output_head() as head:
            for index, states in enumerate(tqdm(self.outputs, desc="output head", unit="batch", leave=False)):
                gradient = torch.empty_like(states)
                for span in spans(self.source, states):
                    with torch.enable_grad():
                        piece = states[:, span].detach().requires_grad_()
                        logits = head(piece)
                    logits.backward(score(logits.detach().float(), index, span, head).to(logits.dtype))
                    assert piece.grad is not None
                    gradient[:, span] = piece.grad
                yield gradient

    def _steps(self, layer: nn.Module, inputs: list[Tensor], gradients: list[Tensor], calls: Calls) -> Iterator[None]:
        """Runs a layer forwards and backwards for each batch; moves `gradients` before it."""
        for i, x in enumerate(inputs):
            with torch.enable_grad():
                x = x.requires_grad_()
                out = run_layer(layer, x, calls)
            out.backward(gradients[i])
            assert x.grad is not None
            gradients[i] = x.grad
            yield

    def _file(self, index: int) -> Path:
        return self.folder / f"inputs-{index:05d}.safetensors"


def spans(source: LayeredModel, states: Tensor) -> Iterator[slice]:
    """The positions of outputs of the last layer, [sequences, positions, hidden], some at a time: see LOGITS, ROWS."""
    width = max(ROWS, LOGITS // source.vocabulary) // len(states) or 1
    for begin in range(0, states.shape[1], width):
        yield slice(begin, min(begin + width, states.shape[1]))


def sampled_score(seed: int) -> Score:
    """The score of the cross entropy at labels drawn from the model's own probabilities: softmax minus one-hot.

    The expectation of the square of its gradients is the Fisher information, which is the Hessian of the KL divergence
    (YAQA, arXiv 2505.22988, section 3.1).
    """
    generator = torch.Generator().manual_seed(seed)

    def score(logits: Tensor, _: int, __: slice, ___: Head) -> Tensor:
        probabilities = logits.softmax(-1)
        sums = probabilities.cumsum(-1)
        drawn = torch.rand(*logits.shape[:-1], 1, generator=generator).to(sums.device) * sums[..., -1:]
        labels = torch.searchsorted(sums, drawn, right=True).clamp_(max=logits.shape[-1] - 1)
        return probabilities.scatter_add_(-1, labels, sums.new_full(labels.shape, -1.0))

    return score
