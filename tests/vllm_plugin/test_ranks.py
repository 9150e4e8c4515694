# SPDX-License-Identifier: Apache-2.0
"""Several ranks, each a process of its own: what they generate is what one generates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import exl3_files
import moe_files
import pytest

from quip_vllm.quantizer.run import quantize

ROOT = Path(__file__).resolve().parents[2]


def generated(folder, ranks, file):
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "QUIP_VLLM_ACTIVATIONS": "exact"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "tests/ranks.py", str(folder), str(ranks), str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | own | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(file.read_text())


@pytest.fixture
def checkpoint(make_settings, tiny_model, tmp_path):
    """checkpoint(kind): a folder of each kind."""

    def checkpoint(kind):
        if kind == "experts":
            sizes = {"num_key_value_heads": 2, "moe_intermediate_size": 64}
            return moe_files.write(tmp_path / "experts", "Qwen3Moe", "1mad", 2, block=16, **sizes)
        if kind == "exl3":
            source = tiny_model("Llama", hidden_size=256, intermediate_size=512, num_key_value_heads=4)
            exl3_files.write(source, tmp_path / "exl3", "mul1", head=False)  # of 272 tokens, no multiple of 128
            return tmp_path / "exl3"
        model = tiny_model("Llama", hidden_size=128)
        quantize(make_settings(model, code="hyb", hadamard_block=32, lm_head=4), tmp_path / "hyb")
        return tmp_path / "hyb"

    return checkpoint


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["hyb", "exl3", "experts"])
def test_served_tokens_of_two_ranks_are_those_of_one(checkpoint, tmp_path, kind):
    folder = checkpoint(kind)
    expected = generated(folder, 1, tmp_path / "one.json")
    assert len(set(expected[0])) > 3  # not one token again and again
    assert generated(folder, 2, tmp_path / "two.json") == expected
