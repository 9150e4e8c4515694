# SPDX-License-Identifier: Apache-2.0
"""What vLLM serves is what the checkpoint holds, for a tiny model of an architecture; and the record of many."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from release import architectures

SCRIPT = Path(architectures.__file__)
MORE = ["falcon", "opt", "glm4"]
"""Whose layers are others than those of tests/vllm_plugin: q, k and v in one; no gate; gate and up in one."""


@pytest.mark.parametrize("kind", ["bloom", *(pytest.param(one, marks=pytest.mark.exhaustive) for one in MORE)])
def test_the_served_model_is_the_checkpoint(tmp_path, kind):
    record = tmp_path / "record.jsonl"
    subprocess.run([sys.executable, str(SCRIPT), str(record), "--only", kind], check=True, capture_output=True)
    (found,) = architectures.read(record)
    assert found["status"] == "same" and found["difference"] <= 1e-3, found


def test_the_table(tmp_path):
    record, table = tmp_path / "record.jsonl", tmp_path / "table.md"
    lines = [
        {
            "model_type": "llama",
            "architecture": "LlamaForCausalLM",
            "status": "same",
            "difference": 2.6e-6,
            "processor": "P",
        },
        {"model_type": "opt", "architecture": "OPTForCausalLM", "status": "refused", "why": "a <b> | c"},
    ]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    architectures.write_table(record, table)
    text = table.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| OPTForCausalLM | `opt` | refused: a &lt;b> \\| c |" in rows
    assert "| LlamaForCausalLM | `llama` | same to 3e-06 |" in rows
    assert len(rows) == 1 + len(architectures.model_types()), "every architecture has a row"
    assert " 2 were run. Results: " in text and " 1 refused, 1 same." in text and "Machine: P, vLLM" in text


def test_an_unknown_architecture_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "record.jsonl"), "--only", "nonesuch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "nonesuch: transformers knows no such causal architecture" in done.stderr
