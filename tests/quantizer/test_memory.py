# SPDX-License-Identifier: Apache-2.0
"""Quantizing holds one decoder layer: a model of eight, of which the process may use half."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from quip_vllm.checkpoint.shards import shard_name, write_index

HIDDEN, MLP, LAYERS = 1024, 11264, 8
PROGRAM = """
import sys
from pathlib import Path
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from quip_vllm import cli

def status(key):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(key))

tiny, large, folder, *flags = sys.argv[1:]
assert cli.main(["quantize", tiny, folder + "/tiny", *flags]) == 0  # imports and maps all that any run needs
before = status("VmRSS")
code = cli.main(["quantize", large, folder + "/large", *flags, "--ignore", r"layers\\.[1-7]\\.", "mlp"])
print("used", status("VmHWM") - before)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """(folder, bytes of its weights): written a shard at a time; the layers are equal, each in a file of its own."""
    import transformers

    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        **{
            **tiny_models.COMMON,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "architectures": ["LlamaForCausalLM"],
            "dtype": "bfloat16",
        }
    )
    config.save_pretrained(folder)
    tiny_models.save_tokenizer(folder)
    torch.manual_seed(0)

    def matrix(n, k):
        return torch.empty(n, k, dtype=torch.bfloat16).normal_(0, k**-0.5)

    attention = {f"self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
    mlp = {f"mlp.{name}_proj.weight": matrix(MLP, HIDDEN) for name in ("gate", "up")}
    norms = {f"{name}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for name in ("input", "post_attention")}
    layer = {**attention, **mlp, **norms, "mlp.down_proj.weight": matrix(HIDDEN, MLP)}
    for i in range(LAYERS):
        tensors = {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        save_file(tensors, folder / shard_name(i, LAYERS + 1), metadata={"format": "pt"})
    embedding = matrix(tiny_models.VOCABULARY, HIDDEN)
    rest = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    save_file(rest, folder / shard_name(LAYERS, LAYERS + 1), metadata={"format": "pt"})
    write_index(folder, LAYERS + 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder, index["metadata"]["total_size"]


@pytest.mark.parametrize(
    "more",
    [
        ["--no-two-sided", "--tune", "none"],
        ["--token-weights", "1", "--tune", "none"],
        ["--no-two-sided", "--tune", "blocks"],
        ["--token-weights", "1"],
    ],
    ids=["forwards", "backwards", "trained each", "trained together"],
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_half_of_the_weights_is_room_enough(large_model, tiny_model, tiny_text, tmp_path, more):
    """All layers are read and run; the attention of one is encoded, which keeps the test short."""
    folder, size = large_model
    assert size > 600e6
    flags = ["--method", "quip_sharp", "--bits", "2", "--calibration", str(tiny_text)]
    flags += ["--sequences", "2", "--sequence-length", "32", *more]
    command = [sys.executable, "-c", PROGRAM, str(tiny_model()), str(folder), str(tmp_path), *flags]
    # A fixed threshold: glibc's own grows, and 40 to 70 MB of freed tensors then stay.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.split("used ")[1])
    assert used < size / 2, f"{used / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
