# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts of which each expert has linear layers of its own, as the files of the hub have them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
SCALED = "Llama4TextExperts"
"""The class of transformers that says nothing of its layout."""


class Layout(NamedTuple):
    """How a module of transformers stacks the weights of its experts.

    Attributes:
        gate: whether there are gates beside the ups.
        bias: whether there are biases.
        transposed: whether the stacks hold the transposed weights.
        concatenated: whether ups are behind gates; else their outputs take turns.
        scaled: whether the router's weights reach the inputs, see `ExpertsOfScaled`.
    """

    gate: bool
    bias: bool
    transposed: bool
    concatenated: bool
    scaled: bool = False

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the stacks."""
        return STACKS if self.gate else UNGATED

    @property
    def leaves(self) -> tuple[str, ...]:
        """The linear layers of an expert."""
        if not self.gate:
            return UNGATED
        return LEAVES if self.concatenated else INTERLEAVED_LEAVES


class Experts(nn.ModuleList):
    """Computes what a module computes that has the weights of all experts of a decoder layer in two stacks.

    y_t = sum_e w_te down_e(act(gate_e(x_t), up_e(x_t))) over the experts e that are chosen for the token t, or
    down_e(act(up_e(x_t))) where these have no gate. The names of its parameters are like ``3.gate_proj.weight``.

    Args:
        stacked: such a module; its weights are not kept.
        layout: its layout (`layout_of`).
        leaves: names of the linear layers of an expert, in the order of LEAVES; None for those of the layout.

    Attributes:
        leaves: the same.
        stacks: names of the stacks.
        transposed: whether the stacks hold the transposed weights.
        rows: int64, which rows of the hidden states the expert under work reads.
    """

    rows: Tensor

    def __init__(self, stacked: nn.Module, layout: Layout, leaves: Sequence[str] | None = None) -> None:
        super().__init__()
        self.leaves, self.stacks, self.transposed = tuple(leaves or layout.leaves), layout.stacks, layout.transposed
        first, down = (stacked.get_parameter(name) for name in self.stacks)
        shapes = [one.shape[:0:-1] if self.transposed else one.shape[1:] for one in (first, down)]
        (outer, hidden), (_, inner) = shapes
        readers = len(self.leaves) - 1
        sizes = *[(hidden, outer // readers)] * readers, (inner, hidden)
        for _ in range(len(down)):
            linears = (nn.Linear(*of, bias=layout.bias, device="meta", dtype=down.dtype) for of in sizes)
            self.append(nn.ModuleDict(dict(zip(self.leaves, linears, strict=True))))
        # Of what the first linear layers give, beside each other; it reads none of the weights.
        own: Any = stacked
        self._activated: Callable[[Tensor], Tensor]
        if not layout.gate:
            self._activated = own.act_fn.forward
        else:
            self._activated = getattr(own, "_apply_gate", None) or partial(_gated, own.act_fn.forward)

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
            y = self._expert(index, hidden[rows := self.rows])
            out.index_add_(0, rows, (y * weights[rows, place, None]).to(out.dtype))
        return out

    def _expert(self, index: int, x: Tensor) -> Tensor:
        expert: Any = self[index]
        *first, down = expert.values()
        y: Tensor = down(self._activated(torch.cat([one(x) for one in first], dim=-1)))
        return y


class ExpertsOfScaled(Experts):
    """The same where the weights are on the inputs, as in Llama 4: y_t = sum_e down_e(act(gate_e(w_te x_t), ...))."""

    def forward(self, scaled: Tensor) -> Tensor:  # type: ignore[override]
        """Outputs [experts * tokens, hidden] of inputs w_te x_t of this shape, which are 0 for experts not chosen."""
        x = scaled.view(len(self), -1, scaled.shape[-1])
        out = torch.zeros_like(x)
        for index, own in enumerate(x):
            (self.rows,) = torch.where(own.any(-1))
            if len(rows := self.rows):
                out[index].index_add_(0, rows, self._expert(index, own[rows]))
        return out.view(scaled.shape)


def layout_of(module: nn.Module) -> Layout | None:
    """How a module stacks ups, with gates or without, and downs; None if it does nothing of the kind."""
    if type(module).__name__ == SCALED:
        return Layout(gate=True, bias=False, transposed=True, concatenated=True, scaled=True)
    if not hasattr(module, "has_gate"):  # which all others of transformers 5 have
        return None
    own: Any = module
    found = Layout(*map(bool, (own.has_gate, own.has_bias, own.is_transposed, own.is_concatenated)))
    wanted = {*found.stacks, *(f"{name}_bias" for name in found.stacks if found.bias)}
    return found if {name for name, _ in module.named_parameters(recurse=False)} == wanted else None


def experts_of(stacked: nn.Module, layout: Layout, leaves: Sequence[str] | None = None) -> Experts:
    """Experts without values in the place of a module; see `Experts`."""
    return (ExpertsOfScaled if layout.scaled else Experts)(stacked, layout, leaves)


def _gated(act: Callable[[Tensor], Tensor], outer: Tensor) -> Tensor:
    gate, up = outer.chunk(2, dim=-1)
    return act(gate) * up


def unstack(model: nn.Module) -> None:
    """Puts Experts without values in the place of every stack of a model."""
    for path, module in list(model.named_modules()):
        if layout := layout_of(module):
            model.set_submodule(path, experts_of(module, layout))


def restack(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts the stacks of a model in the place of its experts' weights in a state dict, where it has these."""
    for path, module in model.named_modules():
        layout = layout_of(module)
        if layout and f"{path}.0.{layout.leaves[-1]}.weight" in state:
            for stack, _ in module.named_parameters(recurse=False):
                leaves, kind = made_of(stack, layout.leaves)
                own = [
                    torch.cat([state.pop(f"{path}.{expert}.{leaf}.{kind}") for leaf in leaves])
                    for expert in range(len(module.get_parameter(stack)))
                ]
                turned = layout.transposed and kind == "weight"
                state[f"{path}.{stack}"] = torch.stack([one.T if turned else one for one in own])


def made_of(stack: str, leaves: Sequence[str]) -> tuple[Sequence[str], str]:
    """The linear layers of an expert that have their weights, or biases, in a stack; and which of the two."""
    kind = "bias" if stack.endswith("_bias") else "weight"
    return (leaves[-1:] if stack.startswith(leaves[-1]) else leaves[:-1]), kind
