# SPDX-License-Identifier: Apache-2.0
"""Several ranks, each a process of its own: what they generate is what the dequantized model does in transformers."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import exl3_files
import moe_files
import pytest
import torch
from ranks import PROMPTS

from quip_vllm.evaluation.loading import load_model
from quip_vllm.quantizer.run import quantize
from quip_vllm.vllm_plugin.ranks import verdict

ROOT = Path(__file__).resolve().parents[2]
RANKS = {"Llama hyb": [(2, 1), (1, 2)], "Llama EXL3": [(2, 1)], "Qwen3 quip_sharp": [(4, 1)], "Gemma 3 1mad": [(2, 1)]}
RANKS |= {"Qwen3-MoE": [(2, 1)]}
"""Model -> tensor-parallel ranks and pipeline stages on which it is served."""
HEADS = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention on a CPU has no smaller heads."""


def generated(file, jobs):
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "QUIP_VLLM_ACTIVATIONS": "exact"}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine is in the process that starts the ranks
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "tests/ranks.py", str(file), *map(str, itertools.chain.from_iterable(jobs))]
    environment = os.environ | own | {"PYTHONPATH": path}
    environment.pop("QUIP_VLLM_BACKEND", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(file.read_text())


@torch.inference_mode()
def greedy(folder, count):
    """What transformers generates with the dequantized weights, for each prompt."""
    model, found = load_model(str(folder)), []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


@pytest.fixture
def folders(make_settings, tiny_model, tmp_path):
    """Model -> its checkpoint."""
    exl3 = tiny_model("Llama", hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    exl3_files.write(exl3, tmp_path / "exl3", "mul1", head=False)  # of 272 tokens, no multiple of 128
    for name, model, settings in (
        ("hyb", tiny_model("Llama", hidden_size=128), {"code": "hyb", "hadamard_block": 32}),
        ("quip_sharp", tiny_model("Qwen3", **HEADS), {"split": 4}),  # two ranks hold the same keys and values
        # Tied, a tiny Gemma says the last token again and again: its embedding is scaled up.
        ("1mad", tiny_model("Gemma3Text", tie_word_embeddings=False, **HEADS), {"code": "1mad", "split": 2}),
    ):
        quantize(make_settings(model, lm_head=4, **settings), tmp_path / name)
    experts = {"num_key_value_heads": 2, "moe_intermediate_size": 64}
    moe_files.write(tmp_path / "experts", "Qwen3Moe", "1mad", 2, block=16, **experts)
    names = ("hyb", "exl3", "quip_sharp", "1mad", "experts")
    return dict(zip(RANKS, [tmp_path / name for name in names], strict=True))


@pytest.mark.long
@pytest.mark.exhaustive
def test_served_tokens_of_several_ranks_are_those_of_the_dequantized_model(folders, tmp_path):
    jobs = [(kind, *one) for kind, ranks in RANKS.items() for one in ranks]
    found = generated(tmp_path / "found.json", [(folders[kind], *one) for kind, *one in jobs])
    expected = {kind: greedy(folder, len(found[0][0])) for kind, folder in folders.items()}
    for (kind, ranks, stages), served in zip(jobs, found, strict=True):
        assert len({token for one in served for token in one}) > 2, kind  # not one token again and again
        assert served == expected[kind], (kind, ranks, stages)
        assert not verdict(folders[kind], ranks)["refused"]
