# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts of which each expert has linear layers of its own, as the files of the hub have them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LEAVES = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of an expert; the first two read one activation."""
SHORT_LEAVES = ("w1", "w3", "w2")
"""The same in Mixtral's files."""


class Experts(nn.ModuleList):
    """Computes what a module computes that has the weights of all experts of a decoder layer in two stacks.

    y_t = sum_e w_te down_e(act(gate_e(x_t), up_e(x_t))) over the experts e that are chosen for the token t. The names
    of its parameters are like ``3.gate_proj.weight``.

    Args:
        stacked: such a module (`is_stack`); its weights are not kept.
        leaves: names of the linear layers of an expert, in the order of LEAVES.

    Attributes:
        rows: int64, which rows of the hidden states the expert under work reads.
    """

    rows: Tensor

    def __init__(self, stacked: nn.Module, leaves: Sequence[str] = LEAVES) -> None:
        super().__init__()
        down = stacked.get_parameter("down_proj")
        count, hidden, inner = down.shape
        sizes = (hidden, inner), (hidden, inner), (inner, hidden)
        for _ in range(count):
            linears = (nn.Linear(*of, bias=False, device="meta", dtype=down.dtype) for of in sizes)
            self.append(nn.ModuleDict(dict(zip(leaves, linears, strict=True))))
        # Of gate and up beside each other; it reads none of the weights.
        self._activated: Callable[[Tensor], Tensor] = stacked._apply_gate  # type: ignore[assignment]

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the experts make of the tokens.

        Args:
            hidden: [tokens, hidden].
            chosen: int64 [tokens, experts of a token].
            weights: of the chosen experts, of the same shape.
        """
        out = torch.zeros_like(hidden)
        for index in chosen.unique().tolist():
            self.rows, place = torch.where(chosen == index)
            rows, x = self.rows, hidden[self.rows]
            gate, up, down = self[index].values()
            y = down(self._activated(torch.cat([gate(x), up(x)], dim=-1)))
            out.index_add_(0, rows, (y * weights[rows, place, None]).to(out.dtype))
        return out


def is_stack(module: nn.Module) -> bool:
    """Whether a module is one of transformers 5 that stacks gates above ups, and downs, without biases."""
    usual = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return own == {"gate_up_proj", "down_proj"} and all(getattr(module, key, None) is usual[key] for key in usual)


def unstack(model: nn.Module) -> None:
    """Puts Experts without values in the place of every stack of a model."""
    for path, module in list(model.named_modules()):
        if is_stack(module):
            model.set_submodule(path, Experts(module))
