# SPDX-License-Identifier: Apache-2.0
"""The mixtures of experts of a decoder layer, and what chooses among their experts."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from quip_vllm.nn.experts import Experts


@dataclass(frozen=True)
class Mixture:
    """The experts among which a router chooses, with the names of the model's files.

    Attributes:
        name: what the names of all of their linear layers begin with.
        module: what runs them.
        readers: for each expert the linear layers that read one activation: first of all gates and ups, then of downs.
    """

    name: str
    module: Experts
    readers: tuple[list[list[str]], list[list[str]]]

    @property
    def alike(self) -> list[list[str]]:
        """The gates of all experts, the ups, and the downs; or gates with ups, and the downs."""
        return [list(names) for readers in self.readers for names in zip(*readers, strict=True)]

    @property
    def linears(self) -> list[str]:
        """All linear layers, expert by expert."""
        return [name for one, other in zip(*self.readers, strict=True) for name in (*one, *other)]


def mixtures(layer: nn.Module, named: Callable[[str], str]) -> list[Mixture]:
    """The mixtures in a decoder layer.

    Args:
        layer: the decoder layer.
        named: path in it -> name of the linear layer in the files.
    """
    found = []
    for path, module in layer.named_modules():
        if isinstance(module, Experts):
            names = [[named(f"{path}.{i}.{leaf}") for leaf in module.leaves] for i in range(len(module))]
            readers = [first for *first, _ in names], [[down] for *_, down in names]
            found.append(Mixture(names[0][0].rsplit(".", 2)[0], module, readers))
    return found


def routers(layer: nn.Module) -> list[str]:
    """Paths, in a decoder layer, of the matrices that choose experts or weigh them: these keep their weights."""
    found = []
    for path, experts in layer.named_modules():
        if not isinstance(experts, Experts):
            continue
        around = path.rpartition(".")[0]
        for name, module in layer.get_submodule(around).named_modules():
            gate = "." not in name and getattr(module, "out_features", 0) in (1, len(experts))
            weight = getattr(module, "weight", None)
            if (gate or name.split(".")[0] in ("gate", "router")) and weight is not None and weight.dim() == 2:
                found.append(f"{around}.{name}".lstrip("."))
    return found
