# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and bad input: exit code 2, one sentence on stderr, finished layers left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from quip_vllm import __version__
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.cli import main
from quip_vllm.quantizer import run


@pytest.fixture
def quantize(tiny_model, tiny_text, tmp_path):
    """quantize(flags...): runs it on the tiny Llama with usable flags, where ``flags`` give none of their own."""

    def quantize(*flags, model=None, method="quip_sharp", calibration=None):
        usual = ["--method", method, "--bits", "2", "--sequences", "4", "--sequence-length", "32"]
        usual += ["--calibration", str(calibration or tiny_text), "--tune", "none"]
        return main(["quantize", str(model or tiny_model()), str(tmp_path / "out"), *usual, *flags])

    return quantize


@pytest.fixture
def refusal(capsys):
    """refusal(code): checks that a command ended with exit code 2 and one sentence, and returns that sentence."""

    def refusal(code):
        assert code == 2
        lines = re.split(r"[\r\n]", capsys.readouterr().err)
        progress = re.compile(r"\d+%\|")
        spoken = [line for line in lines if line.replace("\x1b[A", "").strip() and not progress.search(line)]
        assert len(spoken) == 1, spoken
        assert re.match(r"quip-vllm (quantize|evaluate|inspect|verify): .", spoken[0])
        return spoken[0].partition(": ")[2]

    return refusal


@pytest.mark.parametrize("split", [[], ["--split", "2"]])
def test_who_can_serve_on_several_ranks_is_said(quantize, tmp_path, capsys, split):
    assert quantize(*split) == 0
    said = capsys.readouterr().out.splitlines()
    assert ("on 2 tensor-parallel ranks or a divisor of it" if split else "--split R makes a model for R") in said[3]
    assert main(["inspect", str(tmp_path / "out"), "--tensor-parallel", "2"]) == (0 if split else 1)


def test_quantize_inspect_evaluate(quantize, tiny_model, tiny_text, tmp_path, capsys):
    out = tmp_path / "out"
    choices = ["--override", "down_proj=4", "--ignore", "o_proj", "--lm-head", "4", "--embedding", "4"]
    assert quantize(*choices, "--hadamard-block", "32", "--seed", "3") == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"wrote {out}: 13 layers, mean proxy loss 0\.0\d+", said[0])
    assert said[1] == f"serve it with: vllm serve {out} --gpu-memory-utilization 0.5" and len(said) == 3
    settings = read_json(out / "quantization_report.json")["settings"]
    assert settings["overrides"] == [["down_proj", 4]] and settings["ignore"] == ["o_proj"]
    assert (settings["hadamard_block"], settings["seed"], settings["sequences"], settings["lm_head"]) == (32, 3, 4, 4)

    assert main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("13 layers, ")
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {layer["bits"] for layer in found["layers"]} == {2, 4}

    flags = ["--text", str(tiny_text), "--sequence-length", "50", "--windows", "2", "--json", str(tmp_path / "e.json")]
    assert main(["evaluate", str(out), *flags, "--reference", str(tiny_model())]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["model", "text", "perplexity"] and len(table) == 2
    (figures,) = read_json(tmp_path / "e.json")["results"]
    assert figures["windows"] == 2 and figures["bytes"] == found["totals"]["bytes"]


def test_every_default_of_the_grid(tiny_model, tiny_text, tmp_path):
    """Two sides, drift correction, tuning and a head, as a user gets them who says a method and bits."""
    flags = ["--calibration", str(tiny_text), "--sequences", "8", "--sequence-length", "48", "--lm-head", "6"]
    assert main(["quantize", str(tiny_model()), str(tmp_path / "o"), "--method", "quip", "--bits", "3", *flags]) == 0
    report = read_json(tmp_path / "o" / "quantization_report.json")
    assert report["settings"]["two_sided"] and report["tuning"] and report["settings"]["rounding"] == "ldlq"
    assert {layer["bits"] for layer in report["layers"]} == {3, 6}
    assert all(0 < layer["proxy_loss"] < 0.05 for layer in report["layers"])


def test_defaults(tiny_model, tmp_path, monkeypatch):
    seen = []

    def recording(settings, out, resume, target, searchers):
        assert target is None and searchers is None
        seen.append(settings)
        return {"layers": [{"proxy_loss": 0.1}], "settings": {"split": 1}}

    monkeypatch.setattr(run, "quantize", recording)
    qtip = ["--method", "qtip", "--bits"]
    disc = ["--method", "quip", "--bits", "3", "--rounding", "discquant", "--rounding-steps", "5"]
    for flags in ([*qtip, "2"], ["--method", "quip_sharp", "--bits", "2", "--calibration", "x"], [*qtip, "3"], disc):
        assert main(["quantize", "m", str(tmp_path / "o"), *flags]) == 0
    own, other, three, levels = seen
    assert (levels.code, levels.two_sided, levels.drift_correction, levels.rounding_steps) == ("grid", False, 0.0, 5)
    assert (own.token_weights, levels.token_weights) == (0.2, 0.0)
    assert own.two_sided and (own.rounding, own.drift_correction, own.rounding_steps) == ("ldlq", 0.2, None)
    assert (own.code, own.calibration, own.sequences, own.sequence_length) == ("hyb", "bundle", 64, 1024)
    assert three.code == "1mad"
    assert own.lm_head is None and own.epochs == 1
    assert (other.code, other.sequences, other.sequence_length, other.hadamard_block) == ("e8p", 256, 2048, None)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--bits", "two"], "--bits is two: give a number, as 2 or 2.5"),
        (["--bits", "5"], "bits is 5: quip_sharp with code e8p has 2, 3, 4; choose one of them"),
        (["--method", "qtip", "--code", "hyb", "--bits", "5"], "bits is 5: qtip with code hyb has 1, 2, 3, 4; "),
        (["--code", "1mad"], "--code is 1mad, which belongs to qtip: give --method qtip, or leave --code away"),
        (["--override", "down_proj"], "--override is down_proj: give REGEX=BITS, for example 'down_proj=4'"),
        (["--override", "=4"], "--override is =4: give REGEX=BITS"),
        (["--override", "a=b"], "--override is a=b: give REGEX=BITS"),
        (["--override", "a=7"], "bits is 7: quip_sharp with code e8p has 2, 3, 4"),
        (["--override", "(=4"], "'(' is not a regular expression"),
        (["--ignore", "*"], "'*' is not a regular expression"),
        (["--lm-head", "5"], "bits is 5: quip_sharp with code e8p has 2, 3, 4"),
        (["--hadamard-block", "48"], "--hadamard-block is 48: give a power of two of at least 2, or full"),
        (["--hadamard-block", "x"], "--hadamard-block is x: give a power of two"),
        (["--hadamard-block", "²"], "--hadamard-block is ²: give a power of two"),
        (["--hadamard-block", "1"], "--hadamard-block is 1: give a power of two"),
        (["--sequences", "0"], "sequences is 0: it must be at least 1"),
        (["--sequence-length", "0"], "sequence_length is 0: it must be at least 1"),
        (["--seed", "-1"], "seed is -1: give a number from 0 to"),
        (["--sequence-length", "300"], "sequence_length is 300, but "),
        (["--calibration", "gone.txt"], "calibration file gone.txt cannot be read"),
        (["--ignore", "."], "is left to quantize: give a narrower --ignore"),
        (["--rounding", "greedy"], "rounding is greedy, which moves single weights, and a weight of code e8p"),
        (["--rounding", "nearest", "--two-sided"], "rounding is nearest, which feeds nothing back along outputs"),
        (["--rounding-steps", "9"], "rounding_steps is 9 with rounding ldlq: give at least 1, with discquant"),
        (["--tune", "full", "--epochs", "0"], "epochs is 0 with tune full: give at least 1, with full"),
        (["--tune", "blocks", "--epochs", "2"], "epochs is 2 with tune blocks: give at least 1, with full"),
        (["--resume"], "holds no unfinished run: leave --resume away"),
        (["--device", "abacus"], "--device is abacus, which torch cannot use here"),
    ],
)
def test_refused_flags(quantize, refusal, flags, sentence):
    assert sentence in refusal(quantize(*flags))


@pytest.mark.parametrize("flags", [["--method", "gptq"], ["--code", "5mad"], ["--machine", "cpu"]])
def test_flags_that_argparse_refuses(quantize, flags):
    with pytest.raises(SystemExit) as caught:
        quantize(*flags)
    assert caught.value.code == 2


def test_no_such_model(quantize, refusal, tmp_path, tiny_text):
    assert "is not a folder: give a folder with" in refusal(quantize(model=tmp_path / "gone"))
    assert "is not a folder: " in refusal(main(["evaluate", str(tmp_path / "gone"), "--text", str(tiny_text)]))
    assert "config.json cannot be read" in refusal(main(["inspect", str(tmp_path / "gone")]))


def test_json_in_no_folder(refusal, tmp_path):
    flags = ["--text", "unread", "--json", str(tmp_path / "gone" / "figures.json")]
    assert "give a file in a folder that exists" in refusal(main(["evaluate", "unread", *flags]))


def test_json_where_nothing_can_be_written(refusal, tmp_path, monkeypatch):
    def read_only(dir):
        assert dir == tmp_path
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    file = tmp_path / "figures.json"
    said = refusal(main(["evaluate", "unread", "--text", "unread", "--json", str(file)]))
    assert said == f"--json is {file}: nothing can be written there (Read-only file system); give another file"


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OurConfig(LlamaConfig):
    model_type = "our"
class OurForCausalLM(LlamaForCausalLM):
    config_class = OurConfig
"""


def test_code_among_the_files_runs_only_with_the_option(quantized, refusal, tiny_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trusted = tmp_path / "copy", []
    shutil.copytree(quantized(), folder)
    names = {"AutoConfig": "our.OurConfig", "AutoModelForCausalLM": "our.OurForCausalLM"}
    config = read_json(folder / "config.json") | {"model_type": "our", "auto_map": names}
    write_json(folder / "config.json", config)
    (folder / "our.py").write_text(CODE)

    def served(folder, tokens, memory, trust_remote_code, dtype, compiled):
        trusted.append(trust_remote_code)
        return []

    monkeypatch.setattr("quip_vllm.evaluation.verification.differences", lambda expected, found: torch.zeros(1))
    monkeypatch.setattr("quip_vllm.vllm_plugin.serving.prompt_log_probabilities", served)
    text = ["--text", str(tiny_text), "--sequence-length", "50", "--windows", "1", "--reference", str(folder)]
    for command in (["evaluate", str(folder), *text], ["inspect", "--check", str(folder)], ["verify", str(folder)]):
        assert "read that code, then give --trust-remote-code" in refusal(main(command))
        assert main([*command, "--trust-remote-code"]) == 0
        capsys.readouterr()
    assert trusted == [True]


def test_inspect_check(refusal, quantized, tmp_path, capsys):
    shutil.copytree(quantized(), tmp_path / "copy")
    check = ["inspect", str(tmp_path / "copy"), "--check"]
    assert main(check) == 0 and "every tensor is there" in capsys.readouterr().out
    shard = tmp_path / "copy" / "model.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[:-1], whole[:8] + b"\xff" * 8 + whole[16:], whole[:4]):
        shard.write_bytes(damaged)
        assert refusal(main(check)).startswith(f"{shard} cannot be read")
    tensors = load(whole)
    shard.write_bytes(save({k: v for k, v in tensors.items() if k != "model.norm.weight"}))
    assert "has no weight model.norm.weight" in refusal(main(check))
    shard.write_bytes(save(tensors | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "holds model.norm.weight as int8" in refusal(main(check))


def test_overflow_leaves_the_finished_layer(quantize, refusal, damaged, tiny_model, tmp_path):
    folder = damaged(lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(1e38))
    assert refusal(quantize("--no-two-sided", model=folder)).startswith("the activations hold a NaN or an infinity")
    left = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.safetensors")}
    assert left == {".quantize/calibration.safetensors", ".quantize/layer-00000.safetensors"}
    shutil.copyfile(tiny_model() / "model.safetensors", folder / "model.safetensors")  # mended
    assert quantize("--no-two-sided", "--resume", model=folder) == 0
    assert refusal(quantize("--resume", model=folder)).endswith("give a new folder to quantize again")


def test_overflow_before_the_first_layer(quantize, refusal, damaged):
    folder = damaged(lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(1e38))
    assert refusal(quantize(model=folder)).startswith("the activations or their gradients hold a NaN or an infinity")


def test_nan_norm(quantize, refusal, damaged):
    name = "model.layers.0.input_layernorm.weight"
    folder = damaged(lambda tensors: tensors[name][0].fill_(torch.nan))
    assert refusal(quantize(model=folder)).startswith(f"{name} holds a NaN or an infinity: mend the model")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_nobody_reads_on(quantized, flags):
    command = [sys.executable, "-c", "import sys; from quip_vllm.cli import main; sys.exit(main())"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "inspect", str(quantized()), *flags], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b"" and done.returncode == 128 + signal.SIGPIPE


def test_truncated_model(quantize, refusal, damaged):
    folder = damaged(lambda tensors: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "it is missing, truncated or damaged; fetch or quantize it again" in refusal(quantize(model=folder))


def test_pickles_are_not_read(quantize, refusal, damaged, tiny_text):
    folder = damaged(lambda tensors: None)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "give a folder with safetensors weights (never pickles)" in refusal(quantize(model=folder))
    assert refusal(main(["evaluate", str(folder), "--text", str(tiny_text), "--sequence-length", "8"]))


def test_no_space(quantize, refusal, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert re.search(
        "/out has 1 bytes free, and about .* kB are needed: make room, then give the same command again$",
        refusal(quantize()),
    )
    monkeypatch.undo()
    assert quantize() == 0


def test_out_is_not_empty(quantize, refusal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").touch()
    assert "is not empty: give a new folder, or --resume" in refusal(quantize())


def test_library_missing(quantize, refusal, monkeypatch):
    monkeypatch.setattr("quip_vllm.ops.extension.cpu_library_problem", lambda: "the compiled library is not there")
    assert refusal(quantize()) == "the compiled library is not there"


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_hostile_checkpoint(refusal, quantized, tiny_text, tmp_path, command):
    shutil.copytree(quantized(), tmp_path / "copy")
    config = read_json(tmp_path / "copy" / "config.json")
    config["quantization_config"]["bits"] = 10**12
    write_json(tmp_path / "copy" / "config.json", config)
    flags = ["--text", str(tiny_text), "--sequence-length", "8"] if command == "evaluate" else []
    assert refusal(main([command, str(tmp_path / "copy"), *flags])).startswith("bits is 1000000000000: ")


def test_a_bug_is_not_bad_input(quantize, monkeypatch):
    def broken(*args):
        raise KeyError("bug")

    monkeypatch.setattr(run, "quantize", broken)
    with pytest.raises(KeyError):
        quantize()


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.strip() == __version__


def test_a_name_of_a_file_does_not_speak_to_the_terminal(quantized, tmp_path, capsys):
    folder = shutil.copytree(quantized(), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"a\x1b[2Jb.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"a\x1b[2Jb" in said
