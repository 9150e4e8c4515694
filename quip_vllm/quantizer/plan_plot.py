# SPDX-License-Identifier: Apache-2.0
"""A plan as a picture: the bits of every linear layer, and what every format of it would add to the KL divergence."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def require_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: install it with `pip install matplotlib`, or leave --plot away")


def draw(plan: Mapping[str, Any], file: Path) -> None:
    """Writes the picture of a plan, as `planning.make_plan_file` returns it, in the format of the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = {name: one for name, one in plan["layers"].items() if "losses" in one}
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 7), constrained_layout=True)
    for kind in kinds:
        own = [(i, one) for i, (name, one) in enumerate(layers.items()) if name.rpartition(".")[2] == kind]
        above.plot([i for i, _ in own], [one["bits"] or 16 for _, one in own], "o", markersize=4, label=kind)
        chosen = [(i, loss_of(one)) for i, one in own if one["bits"] is not None]
        below.plot([i for i, _ in chosen], [loss for _, loss in chosen], "o", markersize=4, label=kind)
    for i, one in enumerate(layers.values()):
        losses = [row["loss"] for row in one["losses"]]
        below.plot([i, i], [min(losses), max(losses)], color="lightgrey", linewidth=1, zorder=0)
    above.set(ylabel="bits", title=f"{plan['settings']['model']}: {plan['bits']:.3f} bits per weight")
    below.set(ylabel="KL divergence, nats per token", xlabel="layers in the order of the model", yscale="log")
    above.legend(ncols=4, fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def loss_of(one: Mapping[str, Any]) -> float:
    """The loss of a layer in the format that it has."""
    return next(float(row["loss"]) for row in one["losses"] if (row["code"], row["bits"]) == (one["code"], one["bits"]))
