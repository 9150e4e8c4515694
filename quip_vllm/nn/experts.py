# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts of which each expert has linear layers of its own, as the files of the hub have them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LEAVES = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of an expert; the first two read one activation."""
SHORT_LEAVES = ("w1", "w3", "w2")
"""The same in Mixtral's files."""
INTERLEAVED_LEAVES = ("gate_up_proj", "down_proj")
"""The same where the outputs of gate and up take turns: the two are one linear layer. As in GPT-OSS."""
STACKS = ("gate_up_proj", "down_proj")
"""The parameters of transformers' stacks; those of biases have _bias behind."""
UNGATED = ("up_proj", "down_proj")
"""The same of experts without a gate, and the linear layers of such an expert. As in Nemotron-H."""


class Experts(nn.ModuleList):
    """Computes what a module computes that has the weights of all experts of a decoder layer in two stacks.

    y_t = sum_e w_te down_e(act(gate_e(x_t), up_e(x_t))) over the experts e that are chosen for the token t, or
    down_e(act(up_e(x_t))) where these have no gate. The names of its parameters are like ``3.gate_proj.weight``.

    Args:
        stacked: such a module (`is_stack`); its weights are not kept.
        leaves: names of the linear layers of an expert, in the order of LEAVES; None for those of `leaves_of`.

    Attributes:
        leaves: the same.
        stacks: names of the stacks.
        transposed: whether the stacks hold the transposed weights.
        rows: int64, which rows of the hidden states the expert under work reads.
    """

    rows: Tensor

    def __init__(self, stacked: nn.Module, leaves: Sequence[str] | None = None) -> None:
        super().__init__()
        self.leaves, self.stacks = tuple(leaves or leaves_of(stacked)), stacks_of(stacked)
        self.transposed, bias = bool(stacked.is_transposed), bool(stacked.has_bias)
        first, down = (stacked.get_parameter(name) for name in self.stacks)
        shapes = [one.shape[:0:-1] if self.transposed else one.shape[1:] for one in (first, down)]
        (outer, hidden), (_, inner) = shapes
        readers = len(self.leaves) - 1
        sizes = *[(hidden, outer // readers)] * readers, (inner, hidden)
        for _ in range(len(down)):
            linears = (nn.Linear(*of, bias=bias, device="meta", dtype=down.dtype) for of in sizes)
            self.append(nn.ModuleDict(dict(zip(self.leaves, linears, strict=True))))
        # Of what the first linear layers give, beside each other; it reads none of the weights.
        own: Any = stacked
        self._activated: Callable[[Tensor], Tensor] = own._apply_gate if own.has_gate else own.act_fn.forward

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
            *first, down = self[index].values()
            y = down(self._activated(torch.cat([one(x) for one in first], dim=-1)))
            out.index_add_(0, rows, (y * weights[rows, place, None]).to(out.dtype))
        return out


def is_stack(module: nn.Module) -> bool:
    """Whether a module is one of transformers 5 that stacks ups, with gates or without, and downs; biases, too."""
    if not hasattr(module, "has_gate"):
        return False
    stacks = stacks_of(module)
    wanted = {*stacks, *(f"{name}_bias" for name in stacks if module.has_bias)}
    return {name for name, _ in module.named_parameters(recurse=False)} == wanted


def stacks_of(stacked: nn.Module) -> tuple[str, ...]:
    """The names of the stacks of a module."""
    return STACKS if stacked.has_gate else UNGATED


def leaves_of(stacked: nn.Module) -> tuple[str, ...]:
    """The linear layers of an expert of a module with stacks."""
    if not stacked.has_gate:
        return UNGATED
    return LEAVES if stacked.is_concatenated else INTERLEAVED_LEAVES


def unstack(model: nn.Module) -> None:
    """Puts Experts without values in the place of every stack of a model."""
    for path, module in list(model.named_modules()):
        if is_stack(module):
            model.set_submodule(path, Experts(module))


def restack(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts the stacks of a model in the place of its experts' weights in a state dict, where it has these."""
    for path, module in model.named_modules():
        if is_stack(module) and f"{path}.0.{leaves_of(module)[-1]}.weight" in state:
            for stack, _ in module.named_parameters(recurse=False):
                leaves, kind = made_of(stack, leaves_of(module))
                own = [
                    torch.cat([state.pop(f"{path}.{expert}.{leaf}.{kind}") for leaf in leaves])
                    for expert in range(len(module.get_parameter(stack)))
                ]
                turned = bool(module.is_transposed) and kind == "weight"
                state[f"{path}.{stack}"] = torch.stack([one.T if turned else one for one in own])


def made_of(stack: str, leaves: Sequence[str]) -> tuple[Sequence[str], str]:
    """The linear layers of an expert that have their weights, or biases, in a stack; and which of the two."""
    kind = "bias" if stack.endswith("_bias") else "weight"
    return (leaves[-1:] if stack.startswith(leaves[-1]) else leaves[:-1]), kind
