# SPDX-License-Identifier: Apache-2.0
"""What the loss feels at the outputs of linear layers: token weights, and Hessians of the output side.

With y = W x and g = dloss/dy, an error E of W moves the loss by g^T E x per token. Its expected square is the
second-order loss. GuidedQuant (arXiv 2505.07004) keeps of g one number per token, the mean of g^2. YAQA (arXiv
2505.22988, Sketch A, half a round) keeps E[|x|^2 g g^T]. That takes tokens as independent. Its Sketch B does not, but
on SmolLM2-135M both have the same mean, and from 16,384 tokens B has 5 to 50 times the noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quip_vllm.quantizer.curvature.inputs import gram

LARGEST_WEIGHT = 100.0
"""Of a token, where all have 1 in the mean: some first tokens would count as much as a whole text."""


@dataclass
class Sensitivity:
    """How the loss depends on one linear layer.

    Attributes:
        weights: float32 [tokens], how much each token counts, 1 in the mean; empty where all of them count the same.
        energy: mean of |g|^2 |x|^2 per token, the trace of the loss's Hessian over the weight.
        outputs: float32 [n, n], E[|x|^2 g g^T] of mean diagonal 1, as `shrunk` makes it; None where it was not asked
            for, or where nothing sets it apart from the identity.
    """

    weights: Tensor
    energy: float
    outputs: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Sensitivity":
        """The one of the linear layer `name` among tensors that `tensors` made."""
        return cls(tensors[f"{name}.weights"], float(tensors[f"{name}.energy"]), tensors.get(f"{name}.outputs"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For a file."""
        energy = torch.tensor(self.energy, dtype=torch.float64)
        out = {} if self.outputs is None else {f"{name}.outputs": self.outputs}
        return {f"{name}.weights": self.weights, f"{name}.energy": energy, **out}


@dataclass
class _Sums:
    reader: str  # first linear layer that reads the same activation
    squares: list[Tensor] = field(default_factory=list)
    energy: float = 0.0
    sequences: int = 0
    halves: list[Tensor] = field(default_factory=list)  # sums of |x|^2 g g^T over every other sequence


class OutputCollector:
    """Hooks that see x and g of linear layers while a decoder layer runs forwards and backwards.

    Args:
        linears: full module name -> linear layer.
        two_sided: whether the Hessians of the outputs are wanted.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], two_sided: bool):
        self._two_sided = two_sided
        self._sums: dict[str, _Sums] = {}
        self._latest: dict[str, Tensor] = {}  # empty outside of a forward pass: its graph would hold the hooks, and us
        self._handles = [
            module.register_forward_hook(lambda _, args, out, name=name: self._see(name, args[0], out))
            for name, module in linears.items()
        ]

    def close(self) -> dict[str, Sensitivity]:
        """Removes the hooks; module name -> result. Readers of one activation get the mean of their weights.

        Raises:
            ValueError: an activation or a gradient was a NaN or an infinity.
        """
        for handle in self._handles:
            handle.remove()
        if not all(math.isfinite(sums.energy) for sums in self._sums.values()):
            raise ValueError(
                "the activations or their gradients hold a NaN or an infinity: check the model's weights and the "
                "calibration text, or give --no-two-sided and no --token-weights"
            )
        own = {name: token_weights(torch.cat(sums.squares).cpu()) for name, sums in self._sums.items()}
        results = {}
        for name, sums in self._sums.items():
            alike = [own[other] for other, one in self._sums.items() if one.reader == sums.reader]
            tokens = len(own[name])
            outputs = None
            if sums.sequences > 1 and self._two_sided:
                outputs = shrunk(sums.halves[0].cpu(), sums.halves[1].cpu(), sums.sequences)
            results[name] = Sensitivity(torch.stack(alike).mean(0), sums.energy / tokens, outputs)
        return results

    def _see(self, name: str, x: Tensor, out: Tensor) -> None:
        if not out.requires_grad:
            return  # of a layer that only chooses, as sparse attention's: the loss does not feel it
        if name not in self._sums:
            reader = next((other for other, latest in self._latest.items() if latest is x), name)
            self._sums[name] = _Sums(self._sums[reader].reader if reader in self._sums else name)
        self._latest[name] = x
        out.register_hook(lambda gradient: self._add(self._sums[name], x.detach(), gradient))

    def _add(self, sums: _Sums, x: Tensor, gradient: Tensor) -> None:
        self._latest.clear()
        if x.dim() == 2:  # sequences that a model has joined are one
            x, gradient = x[None], gradient[None]
        x, gradient = x.float(), gradient.float()
        squares = gradient.square().mean(-1)
        sums.squares.append(squares.flatten())
        sums.energy += float((squares * gradient.shape[-1] * x.square().sum(-1)).sum(dtype=torch.float64))
        if not self._two_sided:
            return
        felt = gradient * x.norm(dim=-1, keepdim=True)
        if not sums.halves:
            sums.halves = [felt.new_zeros(felt.shape[-1], felt.shape[-1]) for _ in range(2)]
        for half, total in enumerate(sums.halves):
            total += gram(felt[(half + sums.sequences) % 2 :: 2].reshape(-1, felt.shape[-1]))
        sums.sequences += len(felt)


def shrunk(even: Tensor, odd: Tensor, sequences: int) -> Tensor | None:
    """A second moment of few sequences, drawn so far towards the identity as its two halves disagree.

    With S of mean diagonal 1, (S + s I) / (1 + s) is nearest to the moment of all texts, in the mean, for s = noise /
    signal (Ledoit and Wolf, 2004): signal is what of |S|^2 both halves share beyond the identity, noise is the rest.

    Args:
        even: float32 [n, n], sum over sequences 0, 2, ....
        odd: the same over 1, 3, ....
        sequences: how many both have.

    Returns:
        float32 [n, n] of mean diagonal 1; None where the halves share nothing.
    """
    total = even + odd
    unit = total.diagonal().mean()
    if unit <= 0:
        return None
    total /= unit
    shares = sequences - sequences // 2, sequences // 2
    both = float((even * odd).sum(dtype=torch.float64) / unit.double() ** 2) * sequences**2 / (shares[0] * shares[1])
    signal, noise = both - len(total), float(total.square().sum(dtype=torch.float64)) - both
    if signal <= 0:
        return None
    share = max(noise, 0.0) / signal
    total.diagonal().add_(share)
    return total / (1 + share)


def token_weights(squares: Tensor) -> Tensor:
    """Weights of tokens with a mean of 1, proportional to `squares` [tokens] but for the largest."""
    mean = squares.mean()
    if mean <= 0:
        return torch.ones_like(squares)
    clipped = (squares / mean).clamp(max=LARGEST_WEIGHT)
    return clipped / clipped.mean()
