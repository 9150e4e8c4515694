# SPDX-License-Identifier: Apache-2.0
"""Adam over the vectors of one block or of all, and its whole state as tensors that a file can hold."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BEST, EPS, RATE, STEP = "best", "eps", "rate", "step"
WARM = 4
"""Steps in which the rate rises. The first ones follow the signs of a few gradients, and would go too far."""
SMALLEST = 0.01
"""An element counts as at least so large, in root mean squares of its vector: else a zero would stay."""


class Optimizer:
    """Adam whose learning rate rises in a line and then falls in a line to 0, with the vectors at their best.

    Args:
        vectors: float32 leaves; one that is given twice counts once.
        rate: see Attributes.
        steps: after which the rate is 0.
        rare: those of the vectors of which the text meets some elements hardly ever. There, an element whose gradient
            is below the root mean square of the vector's at the first step moves by so much less; else all move alike.

    Attributes:
        rate: the learning rate without rise and fall, in units of each element's own size at the start. Within one of
            Gemma's norms, sizes differ by a factor of some hundred.
    """

    def __init__(self, vectors: Iterable[Tensor], rate: float, steps: int, rare: Sequence[Tensor] = ()):
        self.vectors = list({id(vector): vector for vector in vectors}.values())
        self.rate, self._steps = rate, steps
        self._sizes = [_sizes(vector.detach()) for vector in self.vectors]
        self._adam = torch.optim.Adam([{"params": [v]} for v in self.vectors], betas=(0.9, 0.95), eps=1e-12)
        self._rare = [any(vector is one for one in rare) for vector in self.vectors]
        self._step = 0
        self.keep()

    def slope(self) -> float:
        """What a first step with a rate of 1 would take off the loss, were the loss linear: the sum of |g| size."""
        pairs = zip(self.vectors, self._sizes, strict=True)
        return sum(float((vector.grad.abs() * size).sum()) for vector, size in pairs if vector.grad is not None)

    def step(self) -> None:
        """One step along the vectors' gradients, which it removes; a vector without one stays."""
        now = self.rate * min((self._step + 1) / WARM, max(0.0, 1 - self._step / self._steps))
        before = [vector.detach().clone() for vector in self.vectors]
        for group, vector, rare in zip(self._adam.param_groups, self.vectors, self._rare, strict=True):
            group["lr"] = now
            if rare and not self._step and vector.grad is not None:
                group["eps"] = float(vector.grad.square().mean().sqrt()) or group["eps"]
            vector.data.zero_()  # Adam's step does not depend on where it starts
        self._adam.step()
        for vector, old, size in zip(self.vectors, before, self._sizes, strict=True):
            torch.addcmul(old, vector.detach(), size, out=vector.data)
        self._adam.zero_grad()
        self._step += 1

    def keep(self) -> None:
        """Calls the vectors of now the best."""
        self._best = [vector.detach().clone() for vector in self.vectors]

    def restore(self) -> None:
        """Makes the vectors the best again."""
        for vector, best in zip(self.vectors, self._best, strict=True):
            vector.data.copy_(best)

    def state(self) -> dict[str, Tensor]:
        """All that `load` needs to go on as if nothing had happened."""
        found = {STEP: torch.tensor(self._step), RATE: torch.tensor(self.rate, dtype=torch.float64)}
        found[EPS] = torch.tensor([group["eps"] for group in self._adam.param_groups], dtype=torch.float64)
        for i, (vector, best) in enumerate(zip(self.vectors, self._best, strict=True)):
            found |= {f"{i}.vector": vector.detach().cpu(), f"{i}.{BEST}": best.cpu()}
            found |= {f"{i}.adam.{key}": value.cpu() for key, value in self._adam.state[vector].items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up a `state`."""
        self._step, self.rate = int(state[STEP]), float(state[RATE])
        for group, eps in zip(self._adam.param_groups, state[EPS].tolist(), strict=True):
            group["eps"] = eps
        for i, vector in enumerate(self.vectors):
            vector.data.copy_(state[f"{i}.vector"])
            self._best[i].copy_(state[f"{i}.{BEST}"])
            begin = f"{i}.adam."
            own = {name.removeprefix(begin): value for name, value in state.items() if name.startswith(begin)}
            if own:  # the number of steps stays on the CPU
                self._adam.state[vector] = {
                    key: one.to(vector.device) if one.dim() else one for key, one in own.items()
                }


def _sizes(vector: Tensor) -> Tensor:
    """How large each element counts; those of a vector of zeros as SMALLEST."""
    mean = float(vector.square().mean().sqrt()) or 1.0
    return vector.abs().clamp_min(SMALLEST * mean)
