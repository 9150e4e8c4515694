# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/benchmarks, drawn from its CSV files by figures.py."""

from collections.abc import Callable
from typing import Any

import matplotlib
from benchmarking import read_rows
from tables import CPUS, FOLDER, LLAMA, bits_of, by_bits, is_peer, label
from tables_of_quality import quality_rows
from tables_of_speed import serving_ratio

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  # after the choice of the backend
from matplotlib.ticker import LogLocator  # noqa: E402

COLOURS = {"quip_sharp": "#0072B2", "1mad": "#D55E00", "3inst": "#E69F00", "hyb": "#009E73", "lut": "#CC79A7"}
COLOURS |= {"quip": "#56B4E9", "plan": "black"}
GREY = "#8C8C8C"
"""Okabe and Ito's palette: told apart by colour-blind readers too. Grey is what others' formats have."""
MARKERS = {2: "o", 3: "^", 4: "s"}
SHAPE = (8192, 2048)
CUDA_SHAPE = (14336, 4096)
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})


def colour(name: str) -> str:
    """By the code in a format's or a checkpoint's name."""
    return next((value for key, value in COLOURS.items() if key in name), GREY)


def serving(end: str = "") -> Any:
    """A panel per workload and a bar per checkpoint, peers of equal bits together; ratios to the faster dense model."""
    rows = [row for row in read_rows(FOLDER / f"cpu_serving{end}.csv") if row["phase"]]
    ratio, names = serving_ratio(rows), by_bits(row["name"] for row in rows)
    workloads = list(dict.fromkeys((row["phase"], row["batch"]) for row in rows))
    places, place = {}, 0.0
    for before, name in zip([names[0], *names], names, strict=False):
        place += 1 if bits_of(before) == bits_of(name) else 1.6
        places[name] = place
    size = (2.5 * len(workloads) + 1.4, 0.3 * place + 1.6)
    figure, panels = plt.subplots(1, len(workloads), figsize=size, sharey=True, layout="constrained")
    for panel, (phase, batch) in zip(panels, workloads, strict=True):
        for row in rows:
            if (row["phase"], row["batch"]) == (phase, batch):
                speed, where = float(row["tokens_per_s"]), places[row["name"]]
                panel.barh(where, speed, color=colour(row["name"]), height=0.75)
                words = f"{speed:.{1 if speed < 100 else 0}f} ({ratio[row['name'], phase, batch]:.1f}x)"
                panel.annotate(words, (speed, where), (3, 0), textcoords="offset points", va="center")
        panel.set_title("prefill, 400 tokens" if phase == "prefill" else f"decode, batch {batch}")
        panel.set_xlabel("tokens per second")
        panel.margins(x=0.6)
        panel.set_xlim(left=0)
        panel.set_yticks(list(places.values()), [label(name).replace(", ", ",\n", is_peer(name)) for name in places])
    panels[0].invert_yaxis()
    dense = "the faster of bf16 and float32" if any(row["name"] == "float32" for row in rows) else "bf16"
    peer = " and llama.cpp" if any(name.startswith(LLAMA) for name in names) else ""
    figure.suptitle(
        f"vLLM {rows[0]['vllm'].partition('+')[0]}{peer}, one core of an {CPUS[end]}\n"
        f"Llama shape of 1.07e9 random weights, our formats with a 4-bit output head; in brackets: times {dense}"
    )
    return figure


def kernels(end: str = "") -> Any:
    """Left: one row against its bound. Right: multiplications per second by rows, beside torch's bf16 layer."""
    rows = read_rows(FOLDER / f"cpu_kernels{end}.csv")
    rows = [row for row in rows if (int(row["n"]), int(row["k"])) == SHAPE]
    names = by_bits(row["format"] for row in rows)
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for place, name in enumerate(names):
        one = next(row for row in rows if (row["format"], row["rows"]) == (name, "1"))
        bars.barh(place, float(one["gweights_per_s"]), color=colour(name), height=0.7)
        if one["bound_gweights_per_s"]:
            bound, words = (
                float(one["bound_gweights_per_s"]),
                "bound: memory or decoding" if name == names[-1] else None,
            )
            bars.plot([bound] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.5, label=words)
        points = sorted((int(row["rows"]), 1000 * float(row["tmac_per_s"])) for row in rows if row["format"] == name)
        lines.plot(
            *zip(*points, strict=True),
            color=colour(name),
            marker=MARKERS.get(bits_of(name), ""),
            linestyle="--" if name == "dense" else "-",
            markersize=4,
            label=label(name),
        )
    bars.set_yticks(range(len(names)), [label(name) for name in names])
    bars.invert_yaxis()
    bars.set_xlabel("weights per second, in 1e9")
    bars.set_title("one row")
    bars.legend(loc="lower right", frameon=False)
    _by_rows(lines, "multiplications per second, in 1e9", sorted({int(row["rows"]) for row in rows}))
    threads = rows[0]["threads"] + (" thread" if rows[0]["threads"] == "1" else " threads")
    shape = f"{SHAPE[0]} x {SHAPE[1]}"
    figure.suptitle(f"One linear layer of {shape}, bf16 activations, {threads} of an {CPUS[end]}")
    return figure


def _by_rows(panel: Any, what: str, ticks: list[int]) -> None:
    panel.set_xscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_xlabel("rows")
    panel.set_ylabel(what)
    panel.set_title("by rows")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def cuda() -> Any:
    """Microseconds of one layer by rows, beside cuBLAS in fp16."""
    rows = read_rows(FOLDER / "cuda_kernels.csv")
    rows = [row for row in rows if (int(row["n"]), int(row["k"])) == CUDA_SHAPE]
    figure, panel = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    for name in by_bits(row["format"] for row in rows):
        points = sorted((int(row["rows"]), float(row["microseconds"])) for row in rows if row["format"] == name)
        style = {"color": colour(name), "marker": MARKERS[bits_of(name)], "markersize": 4, "label": label(name)}
        panel.plot(*zip(*points, strict=True), **style)
    first = [row for row in rows if row["format"] == rows[0]["format"]]
    points = sorted((int(row["rows"]), float(row["cublas_fp16_microseconds"])) for row in first)
    panel.plot(*zip(*points, strict=True), color=GREY, linestyle="--", label="cuBLAS, fp16 weights")
    _by_rows(panel, "microseconds per layer (less is better)", sorted({int(row["rows"]) for row in rows}))
    panel.set_title(f"{rows[0]['gpu']}: one linear layer of {CUDA_SHAPE[0]} x {CUDA_SHAPE[1]}")
    return figure


def quality(x: str = "bits_per_weight", y: str = "perplexity") -> Any:
    """One figure by another: our formats, as rounded and as tuned, and nearest rounding."""
    rows = quality_rows()
    figure, panel = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    lines = {"qs": ("quip_sharp", "o-"), "qt": ("1mad", "o-"), "qh": ("hyb", "D"), "qg": ("quip", "s-")}
    lines |= {"qp": ("bits by plan", "P")}
    lines["rtn"] = ("nearest rounding, groups of 64\n(2 bits: far above, not shown)", "^:")
    scale = 1e-6 if x == "bytes" else 1

    def point(*names: str) -> list[float]:
        """Where the last of the rows that was measured lies; nowhere if none was."""
        row = next((rows[name] for name in reversed(names) if name in rows), None)
        return [float(row[x]) * scale, float(row[y])] if row else []

    for start, (name, style) in lines.items():
        names = [f"{start}{bits}{'g64' * (start == 'rtn')}" for bits in (2, 2.5, 3, 4)]
        text = f"qtip {name}" if name in ("1mad", "hyb") else name
        if rounded := [*filter(None, (point(f"{own}one", own) for own in names))]:
            panel.plot(*zip(*rounded, strict=True), style, color=colour(name), label=text, markersize=5)
        for star in filter(None, (point(f"{own}full", f"{own}fullx4e1", f"{own}fullx4") for own in names)):
            panel.plot(*star, "*", color=colour(name), markersize=9, zorder=3)
    panel.plot([], [], "*", color=GREY, markersize=9, label="tuned")
    panel.set_yscale("log")
    if y == "perplexity":
        reference = float(next(iter(rows.values()))["reference_perplexity"])
        panel.axhline(reference, color="black", linestyle="--", linewidth=1, label="bf16")
    low, high, ticks = YTICKS[y]
    panel.set_ylim(low, high)
    panel.set_yticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel(AXES[x])
    panel.set_ylabel(f"{AXES[y]} (less is better)")
    panel.legend(frameon=False, fontsize=8)
    panel.set_title("SmolLM2-135M-Instruct, WikiText-2 test, calibrated on WikiText-2")
    return figure


AXES = {"bits_per_weight": "stored bits per weight of the linear layers", "bytes": "all tensors of the checkpoint, MB"}
AXES |= {"perplexity": "perplexity", "kl_divergence": "KL divergence from bf16, nats"}
YTICKS = {"perplexity": (16, 120, [16, 18, 20, 25, 30, 40, 60, 100])}
YTICKS["kl_divergence"] = (0.01, 2, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])


PLOTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "cpu_serving": ("cpu_serving", serving),
    "cpu_serving_avx2": ("cpu_serving_avx2", lambda: serving("_avx2")),
    "cpu_serving_amx": ("cpu_serving_amx", lambda: serving("_amx")),
    "cpu_kernels": ("cpu_kernels", kernels),
    "cpu_kernels_avx2": ("cpu_kernels_avx2", lambda: kernels("_avx2")),
    "cuda_kernels": ("cuda_kernels", cuda),
    "quality": ("quality", quality),
    "quality_size": ("quality", lambda: quality("bytes", "kl_divergence")),
}
"""Name of the PNG -> name of the CSV it shows, and what draws it."""
