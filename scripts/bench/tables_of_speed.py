# SPDX-License-Identifier: Apache-2.0
"""The tables of speed, memory and time, from the other CSV files."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarking import read_rows
from profile_serving import SHARES
from tables import CPUS, FOLDER, Rows, bits_of, by_bits, fixed, label, table

EPYCS = ("", "_avx2")
"""Ends of the CSV files of those CPUs on which serving and the searches were measured."""


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


def codes(*files: str) -> str:
    """Billions of weights per second by code and bits, for each number of rows of the files' one layer."""
    rows = [row for file in files for row in read_rows(FOLDER / f"{file}.csv") if row["format"] != "dense"]
    found = {((row["tier"], code_of(row)), bits_of(row["format"]), row["rows"]): row["gweights_per_s"] for row in rows}
    lines, bits, counts = (list(dict.fromkeys(key)) for key in zip(*found, strict=True))
    bits.sort(key=int)
    cells = [
        [" / ".join(fixed(found[one, b, m]) for m in counts if (one, b, m) in found) for b in bits] for one in lines
    ]
    named = [[f"`{code}`", tier, *of] for (tier, code), of in zip(lines, cells, strict=True)]
    return table(["code", "tier", *(f"{b} bits" for b in bits)], named)


def code_of(row: Mapping[str, str]) -> str:
    """The code of a benchmark's row, or the method that has only one."""
    return row["format"].rpartition("-")[0].removeprefix("qtip-")


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


def step(file: str) -> str:
    """Tokens per second of each kind of step, the ratio to bf16, and where the time goes, in shares."""
    rows, lines = read_rows(FOLDER / f"{file}.csv"), []
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


SHORT = ["bf16", "gptq-int4", "llama.cpp-Q4_0", "quip_sharp-4", "qtip-hyb-4", "llama.cpp-Q2_K", "llama.cpp-IQ2_XS"]
SHORT += ["quip_sharp-2", "qtip-hyb-2", "qtip-1mad-2"]

TABLES: dict[str, Callable[[], str]] = {
    "serving": serving,
    "serving_short": lambda: serving("", SHORT),
    "serving_rates": lambda: serving_rates(""),
    "serving_avx2": lambda: serving("_avx2"),
    "serving_avx2_short": lambda: serving("_avx2", ["bf16", "float32", "quip_sharp-4", "quip_sharp-2", "qtip-hyb-2"]),
    "serving_amx": lambda: serving("_amx"),
    "serving_amx_short": lambda: serving("_amx", SHORT),
    "serving_rates_amx": lambda: serving_rates("_amx"),
    "serving_experts": lambda: serving("_experts_amx"),
    "bind": bind,
    "kernels": kernels,
    "kernels_avx2": lambda: kernels("_avx2"),
    "kernels_amx": lambda: kernels("_amx"),
    "step": lambda: step("cpu_step_amx"),
    "step_experts": lambda: step("cpu_step_experts"),
    "codes_exl3": lambda: codes("cpu_exl3", "cpu_exl3_avx2"),
    "codes_grid": lambda: codes("cpu_grid", "cpu_grid_avx2"),
    "encode": encode,
    "quantization": quantization,
    "measured_layers": measured_layers,
    "cuda": lambda: cuda(14336, 4096),
    "cuda_sizes": cuda_sizes,
    "runs_cpu": lambda: runs(
        *(f"cpu_{what}{end}" for what in ("serving", "encode") for end in EPYCS),
        *(f"cpu_kernels{end}" for end in CPUS),
        "cpu_exl3_avx2",
        "cpu_grid",
        "cpu_grid_avx2",
        "cpu_step_amx",
        "cpu_step_experts",
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
