# SPDX-License-Identifier: Apache-2.0
"""quip-vllm verify: the exit status and what is said. vLLM's side is that of tests/scripts/test_architectures.py."""

import importlib.util
import math
import shutil

import pytest
import torch

from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.cli import main
from quip_vllm.evaluation import verification
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.verification import differences, expected_log_probabilities, save_dense

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from quip_vllm.vllm_plugin import serving


def test_differences():
    expected = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    assert differences(expected, [{0: -1.0, 2: -3.25}, {1: -5.5}]).tolist() == [0, 0.25, 0.5]
    assert differences(expected, [{0: -1.0}, {1: math.nan}]).tolist() == [0, math.inf]
    assert differences([{0: -1.0, 1: -2.0}, {5: -3.0}], [{1: -2.5, 2: -9.0}, {5: -3.0}]).tolist() == [0.5, 0]


def test_the_dense_model_is_that_of_the_checkpoint(quantized, tmp_path):
    save_dense(quantized(), tmp_path / "dense")
    x = torch.arange(8)[None]
    with torch.inference_mode():
        one, other = (load_model(str(folder))(x).logits for folder in (quantized(), tmp_path / "dense"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("ends", [[], [257, *range(200)]])
def test_the_prompt_has_no_special_token(tiny_model, tmp_path, ends):
    """Llama 3 names several tokens that end a text."""
    shutil.copytree(tiny_model(), tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    write_json(tmp_path / "model" / "config.json", {**config, "eos_token_id": ends or 257})
    tokens, expected = expected_log_probabilities(tmp_path / "model")
    assert tokens and len(tokens) <= verification.PROMPT_TOKENS and not {256, 257, *ends} & set(tokens)
    assert ends or len(tokens) == verification.PROMPT_TOKENS
    assert torch.allclose(expected.exp().sum(-1), torch.ones(len(tokens)))


@pytest.mark.parametrize(("shift", "shift_of_dense", "status"), [(0.0, 0.0, 0), (2e-3, 0.0, 1), (2e-3, 2e-3, 0)])
def test_verify(tiny_model, tiny_text, tmp_path, monkeypatch, capsys, shift, shift_of_dense, status):
    """Shifts are what vLLM's log probabilities are off by; an architecture's own one is no fault."""
    out = tmp_path / "out"
    flags = ["--method", "quip_sharp", "--bits", "2", "--calibration", str(tiny_text)]
    flags += ["--sequences", "4", "--sequence-length", "32", "--tune", "none"]
    assert main(["quantize", str(tiny_model()), str(out), *flags]) == 0
    tokens, expected = expected_log_probabilities(out)

    def served(folder, prompt, memory, trust_remote_code, dtype, compiled):
        assert not trust_remote_code and prompt == tokens and memory == 0.5 and not compiled
        off = shift_of_dense if folder.name == "dense" else shift
        return [{3: float(row[3])} for row in expected[:-2]] + [{5: float(expected[-2, 5]) + off}]

    monkeypatch.setattr(serving, "prompt_log_probabilities", served)
    capsys.readouterr()
    assert main(["verify", str(out), "--memory", "0.5", "--json", str(tmp_path / "figures.json")]) == status
    said, figures = capsys.readouterr(), read_json(tmp_path / "figures.json")
    if status:
        assert f"quip-vllm verify: {out} is not served as it is stored: " in said.err and "0.002" in said.err
    else:
        assert said.out.startswith(f"{out} is served as it is stored: ")
    assert figures["max_difference"] == pytest.approx(shift, abs=1e-6) and figures["positions"] == len(tokens) - 1
    assert ("max_difference_in_vllm" in figures) == (shift > 0) and ("in vLLM alone" in said.out) == (
        shift_of_dense > 0
    )
    assert main(["verify", str(out), "--memory", "0.5", "--dtype", "bfloat16"]) == 0
    assert "only float32 tells rounding from a fault" in capsys.readouterr().out


def test_verify_refuses_other_models(tiny_model, capsys):
    assert main(["verify", str(tiny_model())]) == 2
    assert "has no quantization_config" in capsys.readouterr().err


@pytest.mark.parametrize("dies", ["LLM", "generate"])
def test_verify_when_vllm_fails(quantized, monkeypatch, capsys, dies):
    class Dead(Exception):
        """Not of the kinds that a command says in a sentence by itself."""

    class Engine:
        def __init__(self, *args, **kwargs):
            if dies == "LLM":
                raise Dead("EngineCore encountered\nan issue")

        def generate(self, *args, **kwargs):
            raise Dead("EngineCore encountered\nan issue")

    monkeypatch.setattr("vllm.LLM", Engine)
    assert main(["verify", str(quantized())]) == 2
    said = f"quip-vllm verify: vLLM cannot run {quantized()} (EngineCore encountered an issue): its lines above say why"
    assert said in capsys.readouterr().err
