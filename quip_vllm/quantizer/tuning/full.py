# SPDX-License-Identifier: Apache-2.0
"""Training the vectors of all layers at once, so that the model's logits are those of the original.

One decoder layer is in memory at a time, with its gradients; the dense weights of the others lie on the disk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quip_vllm.checkpoint.shards import read_shard, tensor_sizes, write_shard
from quip_vllm.checkpoint.store import open_shard
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.quantizer.source.backward import Forward, Head, spans
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer
from quip_vllm.quantizer.tuning.block import Block, TokenRows, Vectors
from quip_vllm.quantizer.tuning.blocks import split
from quip_vllm.quantizer.tuning.optimizer import Optimizer
from quip_vllm.quantizer.tuning.refit import TINY

FIRST = 0.6
"""Of the loss, that the first step of a single epoch would take off, were the loss linear: what sets the learning rate.
Each of several epochs has so much less."""
PATIENCE = 1
"""How many epochs in turn may be no better than the best one before the training ends."""


class _OnDisk(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for: a file that is read whole is in memory twice meanwhile."""

    def __init__(self, file: Path):
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        with open_shard(self._file) as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(tensor_sizes(self._file))

    def __len__(self) -> int:
        return len(tensor_sizes(self._file))


class Model:
    """A quantized model whose vectors are trained, and the outputs of the original's last layer for a text.

    Args:
        source: the model, whose embedding and head are this one's from now on; those of its vectors that it reads
            behind its layers are trained as well.
        blocks: of every decoder layer, their weights where they take no memory.
        tokens: the text by batches, int64 [sequences, length].
        targets: outputs of the original's last layer for each batch, [sequences, length, hidden].
        folder: for what a step keeps on the disk.
        head: the output head; None where it keeps its weight.
        embedding: the input embedding, the head itself where they are tied; None where it keeps its weight.
    """

    def __init__(
        self,
        source: LayeredModel,
        blocks: Sequence[Block],
        tokens: Sequence[Tensor],
        targets: Sequence[Tensor],
        folder: Path,
        head: TokenRows | None = None,
        embedding: TokenRows | None = None,
    ):
        self._source, self._blocks, self._folder = source, blocks, folder
        self._head, self._embedding = head, embedding
        rows = [one for one in (head, embedding) if one is not None]
        self._parts: list[Vectors] = [*blocks, *dict.fromkeys(rows)]
        self._tokens, self._targets = tokens, targets
        source.read_others()
        self._outer = {name: parameter.requires_grad_() for name, parameter in source.outer_vectors().items()}
        self._originals = {name: parameter.detach().clone() for name, parameter in self._outer.items()}
        self.outer = {
            name: parameter.detach().float().clone().requires_grad_() for name, parameter in self._outer.items()
        }
        self._original_head = source.head.forward
        self._of_original = False
        if head is not None:
            source.head.forward = self._logits
        self.place()

    def vectors(self) -> list[Tensor]:
        """All that is trained."""
        return [*(vector for part in self._parts for vector in part.vectors.values()), *self.outer.values()]

    def scales(self) -> list[Tensor]:
        """Those of which each element is that of a token, which the text may not have."""
        return [part.scales for part in self._parts if isinstance(part, TokenRows)]

    def stored(self) -> dict[str, Tensor]:
        """All of it by name, as it is stored."""
        dtypes = self._source.reader.dtypes
        outer = {name: vector.detach().to(dtypes[name]).cpu() for name, vector in self.outer.items()}
        return outer | {name: vector for part in self._parts for name, vector in part.stored().items()}

    def place(self) -> None:
        """Puts the embedding and the vectors behind the layers in the place of the model's own."""
        self._put(self.outer)
        if self._embedding is not None:
            self._source.set_embedding(self._embedding.weight())

    def _put(self, vectors: Mapping[str, Tensor]) -> None:
        for name, vector in vectors.items():
            self._outer[name].data.copy_(vector)

    def _logits(self, x: Tensor) -> Tensor:
        """Of the quantized head, or of the original one."""
        if self._head is None or self._of_original:
            return self._original_head(x)
        return self._head.logits(x, self._source.head.bias)

    def _wanted(self, head: Head, index: int, span: slice) -> Tensor:
        """The original's logits, float32."""
        self._put(self._originals)
        self._of_original = True
        logits = head(self._targets[index][:, span]).float()
        self._of_original = False
        self._put(self.outer)
        return logits

    def step(self, index: int) -> float:
        """Adds up the vectors' gradients for a batch, and returns its loss, the mean divergence a token in nats."""
        total = 0.0
        tokens = self._tokens[index]

        def score(logits: Tensor, _: int, span: slice, head: Head) -> Tensor:
            nonlocal total
            loss, gradient = divergence(logits, self._wanted(head, index, span))
            total += loss / tokens.numel()
            return gradient / tokens.numel()

        forward = Forward(self._source, tokens, len(tokens), self._folder, self._layer)
        for _ in forward.backward(score):
            pass
        if self._embedding is not None:
            self._backward(self._embedding, tokens, forward.gradients[0])
        for name, parameter in self._outer.items():
            if parameter.grad is not None:
                self.outer[name].grad, parameter.grad = parameter.grad.float(), None
        return total

    def _backward(self, embedding: TokenRows, tokens: Tensor, gradient: Tensor) -> None:
        """Adds up the gradients of the embedding's vectors from the one before the first layer."""
        parameter = self._source.model.get_input_embeddings().weight.requires_grad_()
        with torch.enable_grad():
            hidden, _ = self._source.first_hidden_states(tokens, len(tokens))
            hidden[0].backward(gradient)
            embedding.weight().backward(parameter.grad)
        parameter.grad = None

    def loss(self, batches: Sequence[int]) -> float:
        """The mean divergence a token of some batches."""
        hidden, calls = self._source.first_hidden_states(
            torch.cat([self._tokens[i] for i in batches]), len(self._tokens[0])
        )
        for index in range(len(self._blocks)):
            with self._layer(index) as layer:
                hidden = [run_layer(layer, x, calls[index]) for x in hidden]
        total = 0.0
        with self._source.output_head() as head:
            for i, states in zip(batches, hidden, strict=True):
                for span in spans(self._source, states):
                    total += divergence(head(states[:, span]).float(), self._wanted(head, i, span))[0]
        return total / sum(self._tokens[i].numel() for i in batches)

    def _layer(self, index: int) -> AbstractContextManager[nn.Module]:
        return self._blocks[index].layer()


def tune_together(
    source: LayeredModel,
    specs: Mapping[str, LinearSpec],
    read: Callable[[int], Mapping[str, Tensor]],
    tokens: Sequence[Tensor],
    targets: Sequence[Tensor],
    folder: Path,
    seed: int,
    epochs: int,
    head: TokenRows | None = None,
    embedding: TokenRows | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains the vectors of all layers.

    Args:
        source: the model.
        specs: full module name -> format, of its quantized layers.
        read: index of a decoder layer -> its tensors as they are stored.
        tokens: see Model.
        targets: see Model.
        folder: for the dense weights of the layers and the state of the training; a killed run finds both there.
        seed: of the order of the batches.
        epochs: the most there are.
        head: see Model.
        embedding: see Model.

    Returns:
        (the trained tensors by name, as they are to be stored; for the report, what `tune_model` tells).
    """
    blocks = []
    for index in tqdm(range(len(source.layers)), desc="dense weights", unit="layer", leave=False):
        block, file = Block(source, index, specs, read(index)), folder / f"weights-{index:05d}.safetensors"
        folder.mkdir(exist_ok=True)
        write_shard(file, block.weights())
        block.weights = partial(_OnDisk, file)
        blocks.append(block)
    model = Model(source, blocks, tokens, targets, folder / "inputs", head, embedding)
    told = tune_model(model, len(tokens), seed, epochs, folder / "state.safetensors")
    return model.stored(), told


def divergence(logits: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """KL(softmax(wanted) || softmax(logits)), summed over all but the last dimension, and its gradient at `logits`."""
    log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    # A sum of all of them in float64 would take as long as the rest.
    total = log_p.sub_(log_q).mul_(p).sum(-1).sum(dtype=torch.float64)
    return float(total), log_q.exp_().sub_(p)


def tune_model(model: Model, batches: int, seed: int, epochs: int, state: Path) -> dict[str, Any]:
    """Trains a model; its vectors end as the best that the validation loss has met, or as they were.

    Args:
        model: changed.
        batches: of its text.
        seed: of their order.
        epochs: the most there are.
        state: a file that holds the state after each epoch, from which a killed run goes on.

    Returns:
        For the report: validation loss before and after, in nats per token, and how many epochs were trained.
    """
    train, validation = split(batches)
    found = read_shard(state) if state.exists() else {}
    losses = found.pop("losses").tolist() if found else [model.loss(validation)]
    optimizer = Optimizer(model.vectors(), 0.0, epochs * len(train), model.scales())
    if found:
        optimizer.load(found)
        model.place()
    while len(losses) <= epochs and len(losses) - losses.index(min(losses)) <= PATIENCE:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + len(losses)))
        with tqdm(order.tolist(), desc=f"tuning, epoch {len(losses)} of {epochs}") as progress:
            for i in progress:
                loss = model.step(train[i])
                if not optimizer.rate:
                    optimizer.rate = FIRST / epochs * loss / max(optimizer.slope(), TINY)
                optimizer.step()
                model.place()
                progress.set_postfix_str(f"loss {loss:.4f}, validation {losses[0]:.4f} -> {losses[-1]:.4f}")
        losses.append(model.loss(validation))
        if losses[-1] == min(losses):
            optimizer.keep()
        write_shard(state, {**optimizer.state(), "losses": torch.tensor(losses, dtype=torch.float64)})
    optimizer.restore()
    model.place()
    return {"before": losses[0], "after": min(losses), "epochs": len(losses) - 1}
