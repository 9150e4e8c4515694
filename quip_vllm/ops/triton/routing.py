# SPDX-License-Identifier: Apache-2.0
"""Rows of experts in the order of the experts, without a word of the GPU's to the host: it can be captured."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which expert each result is of.

    Attributes:
        ids: int64 [m], numbers of experts; a negative one names none, and its result is in no block.
        experts: how many there are.
        results: of a row of x, in turn.
    """

    ids: Tensor
    experts: int
    results: int

    def blocks(self, rows: int) -> tuple[Tensor, Tensor]:
        """Blocks of at most so many rows, each of one expert.

        Returns:
            order: int64 [m], the results in the order of their experts.
            blocks: int32 [most that there can be, 3]: the expert, and the first place in `order` and the one behind
                the last; the expert is -1 in those that are left over.
        """
        m, device = len(self.ids), self.ids.device
        ids = torch.where(self.ids < 0, self.experts, self.ids.clamp(max=self.experts - 1))
        ids, order = ids.sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(self.experts + 1, device=device))
        count = (bounds.diff() + rows - 1) // rows
        behind = count.cumsum(0)
        most = (m + min(m, self.experts) * (rows - 1)) // rows
        number = torch.arange(most, device=device)
        expert = torch.searchsorted(behind, number, right=True)
        own = expert.clamp(max=self.experts - 1)
        first = bounds[own] + (number - (behind - count)[own]) * rows
        last = torch.minimum(first + rows, bounds[own + 1])
        return order, torch.stack([torch.where(expert == own, expert, -1), first, last], dim=1).int()
