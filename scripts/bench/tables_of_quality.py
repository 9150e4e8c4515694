# SPDX-License-Identifier: Apache-2.0
"""The tables of quality, from quality.csv and the like."""

import itertools
import re
from collections.abc import Callable

from benchmarking import read_rows
from tables import FOLDER, fixed, table

from quip_vllm.quantizer.settings import AMOUNTS, ROUNDINGS

FORMATS = {"qs": "quip_sharp", "qt": "qtip 1mad", "qh": "qtip hyb", "qp": "qtip by plan", "qg": "quip"}
FORMATS["rtn"] = "nearest rounding"
"""By the beginning of a row's name in quality.csv."""
WIKITEXT = "wikitext2-test.txt"
TEXTS = {"WikiText": WIKITEXT, "prose": "policy.txt", "code": "numpy_ma_core.py"}
"""The texts of the tables of quality, by the column's name."""
TUNED = ("full", "fullx4e1", "fullx4", "refitx4")
"""Kinds of rows whose vectors are fitted to the codes, by a refit or by training on WikiText."""


def quality_rows(text: str = WIKITEXT, csv: str = "quality") -> dict[str, dict[str, str]]:
    """The rows of quality.csv, or of one like it, for one text, by name."""
    return {row["name"]: row for row in read_rows(FOLDER / f"{csv}.csv") if row["text"] == text}


def divergences(name: str, csv: str = "quality") -> list[float]:
    """The KL divergence of a row of quality.csv, or of one like it, on each of TEXTS."""
    return [float(quality_rows(text, csv)[name]["kl_divergence"]) for text in TEXTS.values()]


def quality_label(name: str) -> str:
    """qs2 -> quip_sharp, 2 bits."""
    start = next(start for start in FORMATS if name.startswith(start))
    rest = _kind(name)
    bits = name.removeprefix(start).removesuffix(rest)
    ends = {"one": "one side", "g64": "groups of 64", "bundle": "bundle", "self": "self-written", "full": "tuned"}
    ends |= {"refit": "`refit`"}
    ends |= {"w0": "tokens equal", "x4": "256 sequences", "d20": "drift share 0.2", "e1": "one epoch"}
    ends |= {rounding: f"`{rounding}`" for rounding in ROUNDINGS}
    return ", ".join([f"{FORMATS[start]}, {bits} bits", *(words for end, words in ends.items() if end in rest)])


def activations() -> str:
    """What rounding activations to int8 costs."""
    found = {(row["name"], row["activations"]): row for row in read_rows(FOLDER / "activations.csv")}
    weights = {name: row["kl_divergence"] for name, row in quality_rows().items()}
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        exact, rounded = found[name, "exact"], found[name, "int8"]
        cells = [fixed(exact["perplexity"], 3), fixed(rounded["perplexity"], 3), fixed(rounded["kl_divergence"], 4)]
        top = f"{100 * float(rounded['top1_agreement']):.1f} %"
        lines.append([quality_label(name), *cells, top, fixed(weights[f"{name}one"], 3)])
    header = ["checkpoint", "perplexity, exact", "perplexity, int8", "KL of int8 to exact, nats", "top-1"]
    return table([*header, "KL of the weights to bf16, nats"], lines)


def quality() -> str:
    """The best that was measured of every format, and nearest rounding, by bits."""
    rows = quality_rows()
    best = {}  # of each format, in the order of the kinds
    for kind in ("g64", "one", "", *TUNED):
        best |= {name.removesuffix(kind): name for name in rows if _kind(name) == kind}
    return _qualities(lambda name: name in best.values(), commit=False)


def formats() -> str:
    """Every format and nearest rounding, by bits, not tuned."""
    return _qualities(lambda name: _kind(name) in ("", "one", "g64"))


def default_calibration() -> str:
    """What the command line does where no calibration text is named, with and without tuning."""
    return _qualities(lambda name: _kind(name).startswith(tuple(AMOUNTS)))


def tuned() -> str:
    """What tuning gives on the calibration text's own kind, where both were measured."""
    whole = {name[:3] for name in quality_rows() if _kind(name) in TUNED}
    return _qualities(lambda name: _kind(name) in ("", *TUNED) and name[:3] in whole)


def planned() -> str:
    """Bits by plan against the straight line, by bytes of the whole checkpoint, between whole bits of the method."""
    names, lines = ["qt3", "qp2.5", "qh2"], []
    size = {name: int(quality_rows()[name]["bytes"]) for name in names}
    loss = {name: divergences(name) for name in names}
    share = (size["qp2.5"] - size["qh2"]) / (size["qt3"] - size["qh2"])
    line = [share * more + (1 - share) * less for more, less in zip(loss["qt3"], loss["qh2"], strict=True)]
    for name in names:
        lines.append([quality_label(name), f"{size[name] / 1e6:.1f}", *(fixed(kl, 3) for kl in loss[name])])
    gains = (1 - found / wanted for found, wanted in zip(loss["qp2.5"], line, strict=True))
    cells = [f"{fixed(kl, 3)} (plan: {gain:.0%} less)" for kl, gain in zip(line, gains, strict=True)]
    lines.insert(2, ["the line between 2 and 3 bits", f"{size['qp2.5'] / 1e6:.1f}", *cells])
    return table(["format", "MB in all", *(f"KL, {name}" for name in TEXTS)], lines)


def _kind(name: str) -> str:
    """qs2full -> full, what a row's name says beyond format and bits."""
    return re.sub(r"^[a-z]+[0-9.]+", "", name)


def gemma() -> str:
    """Gemma 3 270M by the command line's default calibration."""
    return _qualities(lambda name: _kind(name).startswith(tuple(AMOUNTS)), csv="quality_gemma", dense=536.2)


def gemma_formats() -> str:
    """The same by WikiText; those of quip_sharp there are of fewer tokens."""
    chosen = ("qh2", "qh2full", "qt3", "qt4")
    return _qualities(lambda name: name in chosen, csv="quality_gemma", dense=536.2)


def _qualities(chosen: Callable[[str], bool], commit: bool = True, csv: str = "quality", dense: float = 269.1) -> str:
    """The chosen rows, more bits first, with the KL divergence on every text.

    Args:
        chosen: whether a row of this name is wanted.
        commit: whether minutes, memory and commit are columns.
        csv: the file.
        dense: megabytes of the model in bf16.
    """
    by_text = {name: quality_rows(text, csv) for name, text in TEXTS.items()}
    rows = [row for name, row in by_text["WikiText"].items() if chosen(name)]
    plain = fixed(rows[0]["reference_perplexity"], 2) if rows else ""
    lines = [["bf16", "16", plain, *["0"] * len(TEXTS), "100 %", f"{dense}", *([""] * 3 if commit else [])]]
    for row in sorted(rows, key=lambda row: (-int(float(row["bits_per_weight"])), float(row["perplexity"]))):
        name = row["name"]
        found = [fixed(rows[name]["kl_divergence"], 3) if name in rows else "" for rows in by_text.values()]
        cells = [fixed(row["bits_per_weight"], 2), fixed(row["perplexity"], 2), *found]
        top = f"{100 * float(row['top1_agreement']):.1f} %"
        origin = [row["minutes"], row["peak_gb"], row["commit"]] if commit else []
        lines.append([quality_label(name), *cells, top, f"{int(row['bytes']) / 1e6:.1f}", *origin])
    header = ["format", "bits per weight", "perplexity", *(f"KL, {name}" for name in TEXTS), "top-1", "MB in all"]
    return table([*header, *(["minutes", "GB", "commit"] if commit else [])], lines)


def steps() -> str:
    """What each step of the quantizer gives behind those before it, by format."""
    rows, names = quality_rows(), ("qs2", "qh2", "qt3", "qt4")
    kinds = {"rounding on one side": "d0", "drift correction": "one", "rounding on two sides": "w0"}
    kinds |= {"a fifth of the token weights": "", "training": "full", "256 sequences": "fullx4"}
    lines = []
    for words, kind in kinds.items():
        found = (rows.get(name + kind) for name in names)
        lines.append([words, *(_perplexity_and_kl(row) if row else "" for row in found)])
    return table(["step", *map(quality_label, names)], lines)


def _perplexity_and_kl(row: dict[str, str]) -> str:
    return f"{fixed(row['perplexity'], 2)} ({fixed(row['kl_divergence'], 3)})"


def roundings() -> str:
    """The four roundings of the scalar grid, and LDLQ on one side."""
    return _qualities(lambda name: name.startswith("qg"))


def drift() -> str:
    """Drift correction against none, rounded on one side."""
    rows = quality_rows()
    lines = []
    for name in (name for name in rows if name.endswith("d0") and name.replace("d0", "one") in rows):
        one = rows[name.replace("d0", "one")]
        cells = [_perplexity_and_kl(row) for row in (rows[name], one)]
        lines.append([quality_label(name), *cells, fixed(one["mean_proxy_loss"], 4)])
    return table(["format", "none: perplexity (KL)", "0.35", "mean proxy loss at 0.35"], lines)


def shares() -> str:
    """The default share of drift correction beside the one before it, rounded on two sides."""
    lines = []
    for name in (name.removesuffix("d20") for name in quality_rows() if name.endswith("d20")):
        for end, share in {"d20": "0.2", "": "0.35"}.items():
            lines.append([quality_label(name), share, *(fixed(kl, 3) for kl in divergences(name + end))])
    return table(["format", "share", *(f"KL, {name}" for name in TEXTS)], lines)


def rotations() -> str:
    """quip_sharp at 2 bits without drift correction, by rotation."""
    names = {"qs2d0": "full width", "qs2b64d0": "blocks of 64", "qs2b128d0": "blocks of at most 128"}
    names |= {"qs2bmaxd0": "largest power of two"}
    rows = quality_rows()
    lines = []
    for name, words in names.items():
        row = rows[name]
        top, loss = f"{100 * float(row['top1_agreement']):.1f} %", fixed(row["mean_proxy_loss"], 4)
        lines.append([words, fixed(row["perplexity"], 2), fixed(row["kl_divergence"], 3), top, loss])
    return table(["rotation", "perplexity", "KL, nats", "top-1", "mean proxy loss"], lines)


def chunks() -> str:
    """quip_sharp at 2 bits by the defaults of rounding, in whole rows, in chunks and in blocks, by model and seed."""
    rotations = {"": "whole rows", "split2": "`--split 2`", "split3": "`--split 3`", "b128": "blocks of at most 128"}
    models = {"SmolLM2 135M": "quality", "Gemma 3 270M": "quality_gemma"}
    lines = []
    for (model, csv), seed, (short, words) in itertools.product(models.items(), (0, 1), rotations.items()):
        name, rows = f"qs2{short}{'s1' if seed else ''}", quality_rows(csv=csv)
        if name in rows:
            found = [fixed(kl, 3) for kl in divergences(name, csv)]
            loss = fixed(rows[name]["mean_proxy_loss"], 4)
            lines.append([model, str(seed), words, fixed(rows[name]["perplexity"], 2), *found, loss])
    texts = (f"KL, {name}" for name in TEXTS)
    return table(["model", "seed", "rotation", "perplexity", *texts, "mean proxy loss"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "formats": formats,
    "default_calibration": default_calibration,
    "tuned": tuned,
    "gemma": gemma,
    "gemma_formats": gemma_formats,
    "steps": steps,
    "roundings": roundings,
    "drift": drift,
    "shares": shares,
    "rotations": rotations,
    "chunks": chunks,
    "planned": planned,
    "activations": activations,
}
