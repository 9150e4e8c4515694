# SPDX-License-Identifier: Apache-2.0
"""A model card for a quantized checkpoint, in its README.md, and the way to the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quip_vllm import __version__
from quip_vllm.checkpoint.hub import check_link
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import read_json, write_atomically

MARK = "<!-- written by quip-vllm card -->"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TOLD = ("calibration", "sequences", "sequence_length", "rounding", "two_sided", "drift_correction", "tune", "seed")
"""What a card says of the settings of a run."""


def card(folder: Path, evaluations: Sequence[Path] = (), name: str | None = None) -> str:
    """The text of a model card.

    Args:
        folder: the checkpoint.
        evaluations: files of `quip-vllm evaluate --json`; their rows are the table of quality.
        name: on the hub, if it is known; else the folder's.

    Raises:
        ValueError: the folder is not a quantized checkpoint, or a file is not such a JSON.
    """
    described, name = inspect(folder), name or folder.resolve().name
    config, totals = described["quantization_config"], described["totals"]
    report = folder / "quantization_report.json"
    run: dict[str, Any] = read_json(report) if report.exists() else {}
    settings: dict[str, Any] = run.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{report} is damaged: delete it for a card without the settings")
    method, bits, base = config["quant_method"], f"{totals['bits_per_weight']:.2f}", str(settings.get("model", ""))
    front = ["library_name: vllm", "pipeline_tag: text-generation", f"tags: [quip_vllm, {method}]"]
    if HUB_NAME.fullmatch(base):
        front = [f"base_model: {base}", "base_model_relation: quantized", *front]
    told = "\n".join(f"| {key} | {_shown(settings[key])} |" for key in TOLD if settings.get(key) is not None)
    parts = [
        "\n".join(["---", *front, "---", MARK]),
        f"# {name}",
        f"{totals['layers']} layers of {_shown(base) or 'the model'} with {totals['weights']:,} weights, quantized to "
        f"{bits} bits per weight with the method `{method}` (code `{config['code']}`) of quip_vllm "
        f"{_shown(run.get('quip_vllm', __version__))}. All tensors take {totals['bytes'] / 1e6:,.1f} MB.",
        "## Quality",
        _quality(evaluations),
        "## Use",
        f"```\npip install quip-vllm[vllm]\nvllm serve {name}\n```",
        f"```python\nimport quip_vllm.hf_plugin\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n```',
    ]
    if told:
        parts += ["## How it was made", f"| setting | value |\n|---|---|\n{told}"]
    return "\n\n".join(parts) + "\n"


def _shown(value: object) -> str:
    """A setting on one line, without the folders of this machine, and nothing that Markdown reads."""
    names = re.sub(r"[^\w.,:/+ -]+", " ", str(value)[:200]).split(",")
    return ",".join(one if HUB_NAME.fullmatch(one) or one.startswith("hub:") else Path(one).name for one in names)


def _measured(row: object) -> bool:
    """Whether an object is a row of what `evaluate` writes, as far as the card shows it."""
    figures = ("reference_perplexity", "kl_divergence", "top1_agreement")
    return (
        isinstance(row, dict)
        and isinstance(row.get("text"), str)
        and all(type(row.get(key)) in (int, float) for key in ("windows", "perplexity"))
        and all(row.get(key) is None or type(row[key]) in (int, float) for key in figures)
    )


def write_card(folder: Path, text: str) -> Path:
    """Writes README.md. Raises ValueError where there is one that `card` has not made."""
    file = folder / "README.md"
    if file.is_symlink():
        raise ValueError(f"{file} is a link: remove it first")
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{file} was not written by quip-vllm card: move it away first")
    write_atomically(file, text)
    return file


def files_to_push(folder: Path) -> list[Path]:
    """All files of a checkpoint, without those of an unfinished run. Raises ValueError where the run is unfinished."""
    if (folder / ".quantize").exists():
        raise ValueError(f"{folder} is an unfinished run: give quip-vllm quantize --resume first")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts)
    for file in files:
        check_link(file, folder)
    return files


def push(folder: Path, repository: str) -> str:
    """Uploads a checkpoint to the hub with the user's token; returns the address.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    names = [str(file.relative_to(folder)) for file in files_to_push(folder)]
    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{repository} cannot be written ({said:.200}): check the name and your token") from None


def _quality(evaluations: Sequence[Path]) -> str:
    rows = []
    for file in evaluations:
        found = read_json(file)
        results = found.get("results") if isinstance(found, dict) else None
        if not isinstance(results, list) or not all(map(_measured, results)):
            raise ValueError(f"{file} is not what quip-vllm evaluate --json writes")
        for row in results:
            divergence, top = row.get("kl_divergence"), row.get("top1_agreement")
            cells = [_shown(row["text"]), row["windows"], found.get("sequence_length"), f"{row['perplexity']:.2f}"]
            cells.append("" if row.get("reference_perplexity") is None else f"{row['reference_perplexity']:.2f}")
            cells += ["" if divergence is None else f"{divergence:.4f}", "" if top is None else f"{100 * top:.1f} %"]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    if not rows:
        return "Not measured."
    header = ["text", "windows", "tokens in each", "perplexity", "of the original", "KL divergence, nats", "same top-1"]
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *rows])
