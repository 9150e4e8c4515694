# SPDX-License-Identifier: Apache-2.0
"""Bits for every layer under one budget: the exact answer of a knapsack in which every layer takes one format."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from quip_vllm.checkpoint.config import LayerFormat

STEPS = 100_000
"""Into how many a budget is cut at most: where the sizes have no divisor for that, they are rounded up to a step."""

Choice = LayerFormat | None
"""A layer's format; None keeps its weight."""
Losses = Mapping[str, Mapping[Choice, float]]
"""Layer -> choice -> what it adds to the KL divergence, in nats per token."""
Sizes = Mapping[str, Mapping[Choice, int]]
"""Layer -> choice -> its size, in any unit."""


def allocate(losses: Losses, sizes: Sizes, budget: int) -> dict[str, Choice]:
    """The formats of least total loss whose sizes add up to no more than `budget`, by dynamic programming.

    Of equal losses the smaller sum of sizes is taken, then the formats that are named first for the first layers; the
    answer depends on nothing but the arguments.

    Args:
        losses: one entry per layer, in the order of the model.
        sizes: of the same layers and formats.
        budget: in the unit of the sizes.

    Raises:
        ValueError: the smallest formats are larger than the budget.
    """
    least = {name: min(of.values()) for name, of in sizes.items()}
    room = budget - sum(least.values())
    if room < 0:
        raise ValueError(f"the smallest formats take {sum(least.values()):,} of the {budget:,} that are asked for")
    extras = [size - least[name] for name, of in sizes.items() for size in of.values()]
    step = max(math.gcd(*extras), -(-room // STEPS), 1)
    room = min(room // step, sum(-(-(max(of.values()) - least[name]) // step) for name, of in sizes.items()))
    best = np.zeros(room + 1)  # least loss of the layers from the last one on, by the room that they may take
    chosen: list[np.ndarray] = []
    options = {name: [*of] for name, of in losses.items()}
    for name, formats in reversed(options.items()):
        totals = np.full((len(formats), room + 1), np.inf)
        for i, stored in enumerate(formats):
            extra = -(-(sizes[name][stored] - least[name]) // step)
            if extra <= room:
                totals[i, extra:] = best[: room + 1 - extra] + losses[name][stored]
        chosen.append(totals.argmin(0).astype(np.uint8))
        best = totals.min(0)
    at = int(best.argmin())  # the first of equals
    found: dict[str, Choice] = {}
    for (name, formats), of_layer in zip(options.items(), reversed(chosen), strict=True):
        found[name] = formats[of_layer[at]]
        at -= -(-(sizes[name][found[name]] - least[name]) // step)
    return found


def evenly(sizes: Sizes, layers: Sequence[Sequence[str]], budget: int) -> dict[str, Choice]:
    """What a plan has to beat: every decoder layer alike, as far as the budget allows.

    All linear layers get the largest format that fits for all of them. As many decoder layers as then fit, at equal
    distances, get the next larger one.

    Args:
        sizes: as `allocate` takes them, the formats of all layers in the same ascending order.
        layers: names of the linear layers of each decoder layer.
        budget: in the unit of the sizes.
    """
    formats = {name: [*sizes[name]] for of_layer in layers for name in of_layer}

    def total(names: Iterable[str], rank: int) -> int:
        return sum(sizes[name][formats[name][rank]] for name in names)

    ranks = range(min(map(len, formats.values())))
    rank = max((one for one in ranks if total(formats, one) <= budget), default=0)
    raised: list[str] = []
    if rank + 1 in ranks:
        room = budget - total(formats, rank)
        for count in range(len(layers), 0, -1):
            chosen = [name for i in range(count) for name in layers[(2 * i + 1) * len(layers) // (2 * count)]]
            if total(chosen, rank + 1) - total(chosen, rank) <= room:
                raised = chosen
                break
    return {name: of[rank + (name in raised)] for name, of in formats.items()}
