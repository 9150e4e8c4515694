# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of docs/benchmarks from its CSV files.

Usage: python scripts/bench/plot_results.py [--folder docs/benchmarks]

cpu_serving*.csv -> cpu_serving*.png: tokens a second of each checkpoint, a panel a workload, ratios to bf16 at bars.
cpu_kernels*.csv -> cpu_kernels*.png: weights a second of one row against the bound, and over rows against dense bf16.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from benchmarking import FORMATS, read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  # after the choice of the backend

COLOURS = {"quip_sharp": "#0072B2", "1mad": "#D55E00", "3inst": "#E69F00", "hyb": "#009E73", "lut": "#CC79A7"}
GREY = "#8C8C8C"
"""Okabe and Ito's palette: told apart by colour-blind readers too. Grey is what others' formats have."""
Rows = list[dict[str, str]]


def main() -> int:
    """Draws what there is a CSV for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/benchmarks"))
    folder = parser.parse_args().folder
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    scripts = {serving: "bench_serving", kernels: "bench_kernels"}
    drawings = {f"cpu_{what.__name__}{tier}": what for what in (serving, kernels) for tier in ("", "_avx2")}
    for name, draw in drawings.items():
        source, target = folder / f"{name}.csv", folder / f"{name}.png"
        if source.exists():
            figure = draw(read_rows(source))
            figure.savefig(target)
            plt.close(figure)
            print(f"wrote {target}")
        else:
            print(f"{source} is not there: run scripts/bench/{scripts[draw]}.py first", file=sys.stderr)
    return 0


def colour(name: str) -> str:
    """By the code in a format's or a checkpoint's name."""
    return next((value for key, value in COLOURS.items() if key in name), GREY)


def serving(rows: Rows) -> Any:
    """A panel a workload, a bar a checkpoint, its figure and its ratio to bf16 at the end."""
    rows = [row for row in rows if row["tokens_per_s"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    workloads = list(dict.fromkeys((row["phase"], row["batch"]) for row in rows))
    figure, panels = plt.subplots(
        1,
        len(workloads),
        figsize=(2.4 * len(workloads) + 1, 0.32 * len(names) + 1.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (phase, batch) in zip(panels[0], workloads, strict=True):
        for row in rows:
            if (row["phase"], row["batch"]) == (phase, batch):
                speed, place = float(row["tokens_per_s"]), names.index(row["name"])
                panel.barh(place, speed, color=colour(row["name"]), height=0.7)
                ratio = f"  {float(row['over_bf16']):.1f}x" if row["over_bf16"] else ""
                figures = f"{speed:.{1 if speed < 100 else 0}f}{ratio}"
                panel.annotate(figures, (speed, place), (3, 0), textcoords="offset points", va="center")
        panel.set_title("prefill" if phase == "prefill" else f"decode, batch {batch}")
        panel.set_xlabel("tokens/s")
        panel.margins(x=0.6)
        panel.set_xlim(left=0)
        panel.set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.suptitle("vLLM, CPU: tokens a second (ratio to bf16)")
    return figure


def kernels(rows: Rows) -> Any:
    """Above: one row, by shape, with the bound. Below: speed over rows, relative to torch's dense bf16 layer."""
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    names = [name for name in FORMATS if any(row["format"] == name for row in rows)]
    figure, panels = plt.subplots(
        2,
        len(shapes),
        figsize=(2.7 * len(shapes) + 1, 0.24 * len(names) + 4.4),
        squeeze=False,
        layout="constrained",
        sharey="row",
        height_ratios=(0.24 * len(names) + 1, 2.6),
    )
    for (n, k), bars, lines in zip(shapes, *panels, strict=True):
        here = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        _bars(bars, names, [row for row in here if row["rows"] == "1"])
        _lines(lines, names, here)
        bars.set_title(f"{n} x {k}")
    panels[0][0].invert_yaxis()
    panels[1][0].set_ylabel("times torch's bf16 layer")
    panels[1][-1].legend(loc="best", frameon=False, fontsize=7)
    threads = rows[0]["threads"]
    figure.suptitle(f"One linear layer, {threads} thread{'s' * (threads != '1')}: bars one row, ticks its bound")
    return figure


def _bars(panel: Any, names: list[str], rows: Rows) -> None:
    for row in rows:
        speed = float(row["gweights_per_s"])
        if row["format"] == "dense":
            panel.axvline(speed, color=GREY, linestyle="--", linewidth=1)
            continue
        place = names.index(row["format"])
        panel.barh(place, speed, color=colour(row["format"]), height=0.7)
        panel.plot([float(row["bound_gweights_per_s"])] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.5)
    panel.set_xlabel("Gweights/s (dashed: dense bf16)")
    panel.set_xlim(left=0)
    panel.set_yticks(range(len(names)), names)


def _lines(panel: Any, names: list[str], rows: Rows) -> None:
    """The formats at their lowest common rate only: more lines would hide each other."""
    lowest = min(FORMATS[name].bits for name in names)
    for name in (name for name in names if FORMATS[name].bits == lowest):
        points = sorted((int(row["rows"]), float(row["over_dense"])) for row in rows if row["format"] == name)
        panel.plot(*zip(*points, strict=True), color=colour(name), marker="o", markersize=3, label=name)
    panel.axhline(1, color=GREY, linestyle="--", linewidth=1)
    ticks = sorted({int(row["rows"]) for row in rows})
    panel.set_xscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("rows")


if __name__ == "__main__":
    sys.exit(main())
