# SPDX-License-Identifier: Apache-2.0
"""The tables of the pages, made from the CSV files of docs/benchmarks; figures.py writes them between markers."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarking import ROOT, read_rows
from profile_serving import SHARES

from quip_vllm.quantizer.settings import AMOUNTS, ROUNDINGS

FOLDER = ROOT / "docs" / "benchmarks"
Rows = list[dict[str, str]]

CPUS = {"": "AMD EPYC (Zen 4), AVX-512 VNNI", "_avx2": "AMD EPYC (Zen 3), AVX2", "_amx": "Intel Xeon, AMX"}
"""By the end of a CSV's name: the CPU that made it."""
EPYCS = ("", "_avx2")
"""Those on which serving and the searches were measured."""
BASELINES = {"bf16": "bf16", "float32": "bf16 model, computed in float32", "dense": "torch, bf16"}
BASELINES["gptq-int4"] = "GPTQ int4, vLLM's kernel"
LLAMA = "llama.cpp-"
"""Before the type in the name of a GGUF file's row."""
QUALITY = {"qs": "quip_sharp", "qt": "qtip 1mad", "qh": "qtip hyb", "qp": "qtip by plan", "qg": "quip"}
QUALITY["rtn"] = "nearest rounding"
"""By the beginning of a row's name in quality.csv."""


WIKITEXT = "wikitext2-test.txt"
TEXTS = {"WikiText": WIKITEXT, "prose": "policy.txt", "code": "numpy_ma_core.py"}
"""The texts of the tables of quality, by the column's name."""


def quality_rows(text: str = WIKITEXT, csv: str = "quality") -> dict[str, dict[str, str]]:
    """The rows of quality.csv, or of one like it, for one text, by name."""
    return {row["name"]: row for row in read_rows(FOLDER / f"{csv}.csv") if row["text"] == text}


def divergences(name: str) -> list[float]:
    """The KL divergence of a row of quality.csv on each of TEXTS."""
    return [float(quality_rows(text)[name]["kl_divergence"]) for text in TEXTS.values()]


def label(name: str) -> str:
    """quip_sharp-2 -> quip_sharp, 2 bits; names of baselines as in BASELINES."""
    if name in BASELINES:
        return BASELINES[name]
    if name.startswith(LLAMA):
        return name.replace("-", " ")
    words, _, bits = name.rpartition("-")
    return f"{words.replace('-', ' ')}, {bits} bits"


def bits_of(name: str) -> int:
    """The bits in a format's name; 16 for a baseline of 16 or 32 bits."""
    if name.startswith(LLAMA) or name == "gptq-int4":
        return int(re.sub(r"\D", "", name.removeprefix(LLAMA))[0])
    return int(name[-1]) if name[-2] == "-" else 16


def is_peer(name: str) -> bool:
    """Whether a row is another program's format, not ours."""
    return name in BASELINES or name.startswith(LLAMA)


def by_bits(names: Iterable[str]) -> list[str]:
    """Peers beside each other: more bits first, other programs' formats before ours."""
    return sorted(dict.fromkeys(names), key=lambda name: (-bits_of(name), not is_peer(name)))


def quality_label(name: str) -> str:
    """qs2 -> quip_sharp, 2 bits."""
    start = next(start for start in QUALITY if name.startswith(start))
    rest = _kind(name)
    bits = name.removeprefix(start).removesuffix(rest)
    ends = {"one": "one side", "g64": "groups of 64", "bundle": "bundle", "self": "self-written", "full": "tuned"}
    ends |= {"w0": "tokens equal", "x4": "256 sequences", "d20": "drift share 0.2"}
    ends |= {rounding: f"`{rounding}`" for rounding in ROUNDINGS}
    return ", ".join([f"{QUALITY[start]}, {bits} bits", *(words for end, words in ends.items() if end in rest)])


def fixed(value: str | float, digits: int = 1) -> str:
    """A number with a fixed count of decimals, or with commas between thousands from 1000 on."""
    return f"{float(value):,.0f}" if float(value) >= 1000 else f"{float(value):.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def serving_speed(rows: Rows) -> dict[tuple[str, str, str], float]:
    """(name, phase, batch) -> tokens per second."""
    return {(row["name"], row["phase"], row["batch"]): float(row["tokens_per_s"]) for row in rows if row["phase"]}


def workloads(rows: Rows) -> dict[tuple[str, str], str]:
    """(phase, batch) -> what a table calls it."""
    works = dict.fromkeys((row["phase"], row["batch"]) for row in rows if row["phase"])
    return {work: "prefill of 400" if work[0] == "prefill" else f"batch {work[1]}" for work in works}


def serving_ratio(rows: Rows) -> dict[tuple[str, str, str], float]:
    """(name, phase, batch) -> how many times the faster of bf16 and float32 of the same workload."""
    speed = serving_speed(rows)
    best = {key[1:]: value for key, value in sorted(speed.items(), key=lambda x: x[1]) if key[0] in ("bf16", "float32")}
    return {key: value / best[key[1:]] for key, value in speed.items()}


def serving(end: str = "", names: Sequence[str] = ()) -> str:
    """Tokens per second of each checkpoint and workload, and the ratio to the faster dense model."""
    rows = [row for row in read_rows(FOLDER / f"cpu_serving{end}.csv") if row["phase"]]
    ratio, speed, works = serving_ratio(rows), serving_speed(rows), workloads(rows)
    megabytes = {row["name"]: int(row["weights_bytes"]) / 1e6 for row in rows}
    lines = []
    for name in names or by_bits(megabytes):
        cells = [f"{fixed(speed[key])} ({ratio[key]:.1f}x)" for key in ((name, *work) for work in works)]
        lines.append([label(name), *cells, f"{megabytes[name]:.0f}"])
    return table(["weights", *works.values(), "MB"], lines)


def serving_rates(end: str) -> str:
    """What the tokens per second are per weight: billions read per second, and billions multiplied."""
    rows = [row for row in read_rows(FOLDER / f"cpu_serving{end}.csv") if row["phase"]]
    weights = next(int(row["weights_bytes"]) for row in rows if row["name"] == "bf16") / 2
    speed, works = serving_speed(rows), workloads(rows)
    lines = [
        [label(name), *(fixed(speed[(name, *work)] * weights / 1e9) for work in works)]
        for name in by_bits(row["name"] for row in rows)
    ]
    units = ("Gweights/s" if work == ("decode", "1") else "GMAC/s" for work in works)
    return table(["weights", *(f"{title}: {unit}" for title, unit in zip(works.values(), units, strict=True))], lines)


def bind() -> str:
    """Tokens per second by how vLLM's threads are bound; the mean of several runs."""
    rows = read_rows(FOLDER / "cpu_bind_amx.csv")
    found: dict[tuple[str, tuple[str, str]], list[float]] = {}
    for row in rows:
        found.setdefault((row["threads"], (row["phase"], row["batch"])), []).append(float(row["tokens_per_s"]))
    speed, works = {key: fmean(values) for key, values in found.items()}, workloads(rows)
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    lines = []
    for own in threads:
        cells = [f"{fixed(speed[own, work])} ({speed[own, work] / speed[threads[0], work]:.2f}x)" for work in works]
        lines.append([label(rows[0]["name"]), own, *cells])
    return table(["weights", "`VLLM_CPU_OMP_THREADS_BIND`", *works.values()], lines)


def kernels(end: str = "") -> str:
    """One layer of 8192 x 2048: speed of one row and of many."""
    rows = [row for row in read_rows(FOLDER / f"cpu_kernels{end}.csv") if (row["n"], row["k"]) == ("8192", "2048")]
    found = {(row["format"], row["rows"]): row for row in rows}
    lines = []
    for name in by_bits(row["format"] for row in rows):
        one = found[name, "1"]
        macs = [f"{1000 * float(found[name, m]['tmac_per_s']):.0f}" for m in ("16", "400")]
        share = f"{100 * float(one['share_of_bound']):.0f} %" if one["share_of_bound"] else ""
        over = ", ".join(
            fixed(found[name, m]["over_dense"]) for m in ("1", "16", "400") if found[name, m]["over_dense"]
        )
        lines.append([label(name), fixed(one["gweights_per_s"]), share, *macs, over])
    header = ["format", "1 row: Gweights/s", "share of the bound", "16 rows: GMAC/s", "400 rows: GMAC/s"]
    return table([*header, "times torch's bf16 layer at 1, 16, 400 rows"], lines)


def encode() -> str:
    """The searches and whole quantizations."""
    columns = [
        {(row["what"], row["format"]): row for row in read_rows(FOLDER / f"cpu_encode{end}.csv")} for end in EPYCS
    ]
    lines = []
    for what, name in {**columns[0], **columns[1]}:
        found = [column.get((what, name)) for column in columns]
        if what == "quantize":
            cells = [f"{float(row['seconds']):.0f} s" if row else "" for row in found]
            lines.append([f"`quip-vllm quantize`, {label(name)}", *cells, ""])
        else:
            cells = [f"{fixed(row['mweights_per_s'], 2)} Mweights/s" if row else "" for row in found]
            most = max((row for row in found if row), key=lambda row: int(row["count"]))
            lines.append([f"search of {label(name)}", *cells, f"{float(most['distortion']):.4f}"])
    return table(["what", *(CPUS[end] for end in EPYCS), "distortion of a Gaussian"], lines)


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
    for kind in ("g64", "one", "", "full", "fullx4"):
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
    rows = quality_rows()
    return _qualities(lambda name: _kind(name) in ("", "full", "fullx4") and f"{name[:3]}full" in rows)


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
    return _qualities(lambda name: True, csv="quality_gemma", dense=536.2)


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


def sides() -> str:
    """Rounding on one side, on two, and there with a fifth of the token weights."""
    rows = quality_rows()
    lines = []
    for name in (name for name in rows if f"{name}one" in rows and f"{name}w0" in rows):
        cells = [_perplexity_and_kl(rows[n]) for n in (f"{name}one", f"{name}w0", name)]
        lines.append([quality_label(name), *cells])
    return table(["format", "one side: perplexity (KL)", "two sides", "and token weights, a fifth"], lines)


def _perplexity_and_kl(row: dict[str, str]) -> str:
    return f"{fixed(row['perplexity'], 2)} ({fixed(row['kl_divergence'], 3)})"


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
    """quip_sharp at 2 bits by the defaults of rounding, in whole rows and in chunks."""
    lines = []
    for name, words in {"qs2": "whole rows", "qs2split3": "`--split 3`"}.items():
        row, found = quality_rows()[name], [fixed(kl, 3) for kl in divergences(name)]
        lines.append([words, fixed(row["perplexity"], 2), *found, fixed(row["mean_proxy_loss"], 4)])
    return table(["rotation", "perplexity", *(f"KL, {name}" for name in TEXTS), "mean proxy loss"], lines)


def cuda(n: int, k: int) -> str:
    """Microseconds of one layer by rows, and how many times as fast as cuBLAS in fp16."""
    rows = [row for row in read_rows(FOLDER / "cuda_kernels.csv") if (int(row["n"]), int(row["k"])) == (n, k)]
    dense = ["cuBLAS, fp16"]
    dense += [fixed(row["cublas_fp16_microseconds"]) for row in rows if row["format"] == rows[0]["format"]]
    return _over_cublas(rows, lambda row: f"{row['rows']} row{'s' * (row['rows'] != '1')}", [dense])


def cuda_sizes() -> str:
    """Microseconds of one row for every size, and how many times as fast as cuBLAS in fp16."""
    rows = [row for row in read_rows(FOLDER / "cuda_kernels.csv") if row["rows"] == "1"]
    return _over_cublas(rows, lambda row: f"{row['n']} x {row['k']}", [])


def _over_cublas(rows: Rows, title: Callable[[dict[str, str]], str], lines: list[list[str]]) -> str:
    columns = list(dict.fromkeys(map(title, rows)))
    found = {(row["format"], title(row)): row for row in rows}
    for name in by_bits(row["format"] for row in rows):
        here = [found[name, column] for column in columns]
        lines.append([label(name), *(f"{fixed(r['microseconds'])} ({float(r['over_cublas']):.2f}x)" for r in here)])
    return table(["format", *columns], lines)


def quantization() -> str:
    """Core hours, memory and disk of 7B and 70B, computed from one layer."""
    rows = [row for row in read_rows(FOLDER / "quantization.csv") if row["kind"] == "computed"]
    tokens = sorted({int(row["tokens"]) for row in rows})
    found = {(row["model"], row["format"], int(row["tokens"])): row for row in rows}
    lines = []
    for model, name in dict.fromkeys((row["model"], row["format"]) for row in rows):
        here = [found[model, name, count] for count in tokens]
        memory = f"{float(here[0]['memory_gb']):.0f} to {float(here[-1]['memory_gb']):.0f} GB"
        hours = [f"{float(row['core_hours']):,.0f}" for row in here]
        disk = [f"{float(here[0][column]):.0f} GB" for column in ("source_gb", "output_gb")]
        lines.append([model, label(name), *hours, memory, *disk])
    header = ["model", "format", *(f"core hours, {count:,} tokens" for count in tokens)]
    return table([*header, "memory", "disk: bf16 source", "disk: result"], lines)


def measured_layers() -> str:
    """The measured layers from which ``quantization`` is computed."""
    rows = [row for row in read_rows(FOLDER / "quantization.csv") if row["kind"] == "measured"]
    lines = [
        [
            row["model"],
            fixed(row["layer_mweights"]),
            row["tokens"],
            fixed(row["seconds_per_layer"]),
            fixed(row["memory_gb"]),
        ]
        for row in rows
    ]
    return table(["width", "Mweights", "calibration tokens", "CPU seconds per layer", "GB of the process"], lines)


def experts() -> str:
    """A layer of experts: time of a call and how many times the speed of vLLM's bf16 kernel, by rows."""
    rows = {(row["format"], row["rows"]): row for row in read_rows(FOLDER / "experts.csv")}
    counts = list(dict.fromkeys(m for _, m in rows))
    lines = []
    for name in by_bits(name for name, _ in rows):
        found = [rows[name, m] for m in counts]
        lines.append(
            [
                label(name),
                *(f"{fixed(float(row['microseconds']) / 1000, 2)} ({fixed(row['over_bf16'])}x)" for row in found),
            ]
        )
    return table(["weights", *(f"{m} row{'s' if m != '1' else ''}: ms" for m in counts)], lines)


def step() -> str:
    """Tokens per second of each kind of step, the ratio to bf16, and where the time goes, in shares."""
    rows, lines = read_rows(FOLDER / "cpu_step_amx.csv"), []
    time = {(row["name"], row["workload"]): float(row["milliseconds"]) for row in rows}
    for (name, work), row in zip(time, rows, strict=True):
        spent = time[name, work]
        speed = f"{fixed(1000 * int(work.split()[1]) / spent)} ({time['bf16', work] / spent:.1f}x)"
        shares = [f"{float(row[part]):.0%}" for part in SHARES]
        lines.append([label(name), work, speed, fixed(spent), *shares])
    return table(["weights", "step", "tokens per second", "ms", *SHARES], lines)


def workers() -> str:
    """Seconds of one matrix, by who searches."""
    rows = [row for row in read_rows(FOLDER / "workers.csv") if row["kind"] == "measured"]
    first = float(rows[0]["seconds"])
    lines = []
    for row in rows:
        seconds = float(row["seconds"])
        lines.append([row["what"], row["machines"], fixed(seconds), f"{first / seconds:.2f}x"])
    return table(["who searches", "how many", "seconds", "speed"], lines)


def machines() -> str:
    """Hours of large models, computed."""
    rows = [row for row in read_rows(FOLDER / "workers.csv") if row["kind"] == "computed"]
    columns = ("search_hours", "rest_hours", "hours")
    lines = [[row["what"], row["machines"], *(fixed(row[column]) for column in columns)] for row in rows]
    return table(["model", "machines of 64 cores", "search: hours", "the rest: hours", "in all"], lines)


def runs(*files: str) -> str:
    """Where the figures of some CSV files come from: one row per machine and commit."""
    lines = []
    for file in files:
        seen: dict[tuple[str, ...], None] = {}
        for row in read_rows(FOLDER / f"{file}.csv"):
            cpu = next((CPUS[end] for end in reversed(CPUS) if file.startswith("cpu_") and file.endswith(end)), "")
            machine = row.get("gpu") or cpu or row["machine"]
            version = f"vLLM {row['vllm']}" if row.get("vllm") else f"torch {row['torch']}" if row.get("torch") else ""
            command = f"`{row['command']}`" if row.get("command") else ""
            seen[machine, row.get("threads", ""), version, row["commit"], command] = None
        lines += [[f"[{file}.csv]({file}.csv)", *key] for key in seen]
    return table(["figures", "machine", "threads", "version", "commit", "command"], lines)


AMX_SHORT = ["bf16", "gptq-int4", "llama.cpp-Q4_0", "quip_sharp-4", "qtip-hyb-4", "llama.cpp-Q2_K", "llama.cpp-IQ2_XS"]
AMX_SHORT += ["quip_sharp-2", "qtip-hyb-2", "qtip-1mad-2"]


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "formats": formats,
    "default_calibration": default_calibration,
    "tuned": tuned,
    "gemma": gemma,
    "sides": sides,
    "drift": drift,
    "shares": shares,
    "rotations": rotations,
    "chunks": chunks,
    "planned": planned,
    "serving": serving,
    "serving_avx2": lambda: serving("_avx2"),
    "serving_avx2_short": lambda: serving("_avx2", ["bf16", "float32", "quip_sharp-4", "quip_sharp-2", "qtip-hyb-2"]),
    "serving_amx": lambda: serving("_amx"),
    "serving_amx_short": lambda: serving("_amx", AMX_SHORT),
    "serving_rates_amx": lambda: serving_rates("_amx"),
    "serving_experts": lambda: serving("_experts_amx"),
    "bind": bind,
    "kernels": kernels,
    "kernels_avx2": lambda: kernels("_avx2"),
    "kernels_amx": lambda: kernels("_amx"),
    "step": step,
    "encode": encode,
    "activations": activations,
    "quantization": quantization,
    "measured_layers": measured_layers,
    "cuda": lambda: cuda(14336, 4096),
    "cuda_sizes": cuda_sizes,
    "runs_cpu": lambda: runs(
        *(f"cpu_{what}{end}" for what in ("serving", "encode") for end in EPYCS),
        *(f"cpu_kernels{end}" for end in CPUS),
        "cpu_step_amx",
        "cpu_serving_amx",
        "cpu_serving_experts_amx",
        "cpu_bind_amx",
    ),
    "experts": experts,
    "runs_other": lambda: runs("activations", "quantization", "experts"),
    "runs_cuda": lambda: runs("cuda_kernels"),
    "workers": workers,
    "machines": machines,
    "runs_workers": lambda: runs("workers"),
}
PAGES: list[Path] = [ROOT / "README.md", *(FOLDER / f"{page}.md" for page in ("cpu", "quality", "cuda", "encode"))]
