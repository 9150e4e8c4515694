# SPDX-License-Identifier: Apache-2.0
"""Runs killed with SIGKILL and resumed: every byte as if nothing had happened; and when resuming is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.shards import write_shard
from quip_vllm.checkpoint.store import CheckpointReader, write_json
from quip_vllm.quantizer import run
from quip_vllm.quantizer.run import quantize

HERE = Path(__file__).resolve().parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

OWN, ENDS = ("lock", "settings.json", "shards.json"), ("json", "safetensors")


def contents(folder):
    """File name -> bytes, but the report as an object without seconds."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    report = json.loads(found["quantization_report.json"])
    for layer in report["layers"]:
        assert layer.pop("group_seconds") >= 0
    return {**found, "quantization_report.json": report}


@pytest.fixture
def killed(tiny_model, tiny_text, tmp_path):
    """killed(tune): (folder of the runs, what killed_runs.py tells)."""

    def killed(tune):
        model = tiny_model("Llama", num_hidden_layers=3)
        command = [sys.executable, str(HERE / "killed_runs.py"), str(model), str(tiny_text), str(tmp_path), tune]
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return tmp_path, json.loads(done.stdout)

    return killed


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("tune", "moments", "trained"),
    [("blocks", 2, [f"model.layers.{index}" for index in range(3)]), ("full", 6, ["model.layers"])],
)
def test_killed_trainings_resume_to_the_same_bytes(killed, tune, moments, trained):
    folder, told = killed(tune)
    expected = contents(folder / "whole")
    assert len(told) == moments
    assert [one["name"] for one in expected["quantization_report.json"]["tuning"]] == trained
    for moment, (status, left, resumed) in told.items():
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        assert ".quantize" in left and resumed == 0, moment
        assert contents(folder / moment) == expected, moment
    state = ".quantize/tuned/state.safetensors"
    assert [state in left for _, left, _ in told.values()] == [False] * 2 + [True] * (moments - 2)


def test_killed_runs_resume_to_the_same_bytes(killed):
    folder, told = killed("none")
    expected = contents(folder / "whole")
    assert len(told) == 16 and len([name for name in expected if name.endswith(".safetensors")]) > 2
    for moment, (status, left, resumed) in told.items():
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        assert ".quantize" in left and ("config.json" in left) == (moment == "before the record is removed"), moment
        assert resumed == 0, moment
        assert contents(folder / moment) == expected, moment

    def files(moment, record):
        names = [name for name in told[moment][1] if name.endswith(".safetensors")]
        names = [name for name in names if "calibration" not in name and "sensitivities" not in name]
        return len([name for name in names if name.startswith(".quantize") == record])

    assert [files("in the middle of the first layer", record) for record in (True, False)] == [0, 0]
    assert files("first layer there, its entries not", True) == files("half of the second layer", True) == 1
    assert files("half of the first shard", True) == files("first shard there, its layers too", True) == 4
    assert (files("half of the first shard", False), files("half of the second shard", False)) == (0, 1)
    assert files("half of the second shard", True) == 3  # the first layer's file is gone
    assert files("before the index", True) == 0


def test_command_line_killed_from_outside(tiny_model, tiny_text, tmp_path):
    model = tiny_model("Llama", num_hidden_layers=3)
    flags = ["--method", "qtip", "--bits", "2", "--sequences", "8", "--sequence-length", "48", "--tune", "none"]
    flags += ["--calibration"]

    def start(out, *more):
        command = [sys.executable, "-m", "quip_vllm.cli", "quantize", str(model), str(out), *flags, str(tiny_text)]
        return subprocess.Popen([*command, *more], env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    process = start(tmp_path / "killed")
    first = tmp_path / "killed" / ".quantize" / "layer-00000.safetensors"
    while process.poll() is None and not first.exists():
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and first.exists()
    assert not (tmp_path / "killed" / "config.json").exists()
    whole = start(tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    resumed = start(tmp_path / "killed", "--resume")
    assert resumed.communicate() and resumed.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.fixture
def stopped(make_settings, tmp_path, monkeypatch):
    """stopped(model, group, ...): a folder whose run stopped before a group of layers, and its settings."""

    def stopped(model, group, **changes):
        calls = []

        def failing(*args):
            calls.append(args)
            if len(calls) == group:
                raise OSError("stopped")
            return original(*args)

        original = run.quantize_group
        settings = make_settings(model, **changes)
        monkeypatch.setattr(run, "quantize_group", failing)
        with pytest.raises(OSError, match="stopped"):
            quantize(settings, tmp_path / "out")
        monkeypatch.setattr(run, "quantize_group", original)
        return tmp_path / "out", settings

    return stopped


@pytest.mark.parametrize(
    ("limit", "left", "again"),
    [
        (100, None, 8),  # not even the settings
        (2500, ["lock", "settings.json"], 8),
        (10_000, ["calibration.safetensors", "lock", "settings.json"], 8),
        (40_000, ["calibration.safetensors", *(f"layer-0000{i}.{end}" for i in "01" for end in ENDS), *OWN], 0),
    ],
)
def test_a_full_disk(tiny_model, make_settings, tmp_path, monkeypatch, limit, left, again):
    """The system's limit for the size of a file stands for the disk."""
    out, settings, usual = tmp_path / "out", make_settings(tiny_model()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        remedy = "try again" if left is None else "give --resume; what is finished stays"
        with pytest.raises(ValueError, match=f"/out cannot be written .File too large.: make room .*, then {remedy}$"):
            quantize(settings, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert sorted(file.name for file in out.rglob("*") if file.is_file()) == (left or [])
    done, original = [], run.quantize_group
    monkeypatch.setattr(run, "quantize_group", lambda *args: done.append(args) or original(*args))
    quantize(settings, out, resume=left is not None)
    assert len(done) == again
    quantize(settings, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def work(*args):
    raise OSError("work")


@pytest.fixture
def read(monkeypatch):
    """How often each tensor has been read."""
    read, before = Counter(), CheckpointReader.read

    def counting(self, names):
        read.update(names)
        return before(self, names)

    monkeypatch.setattr(CheckpointReader, "read", counting)
    return read


def test_each_weight_is_read_once_before_the_work(tiny_model, stopped, read, monkeypatch):
    out, settings = stopped(tiny_model("Llama", num_hidden_layers=4), 9)
    monkeypatch.setattr(run.checks, "check_memory", work)  # the last thing before the work
    for folder, resume in ((out, True), (out.with_name("new"), False)):
        read.clear()
        with pytest.raises(OSError, match="work"):
            quantize(settings, folder, resume)
        # The first layer is also compared with the model's own run, which needs the embedding.
        late = {name: count for name, count in read.items() if ".layers." in name and ".layers.0." not in name}
        assert len(late) == 3 * 9 and set(late.values()) == {1}


def test_what_hessians_belong_to_is_known_without_reading_again(tiny_model, make_settings, tmp_path, read, monkeypatch):
    monkeypatch.setattr(run, "Sensitivities", work)
    read.clear()
    with pytest.raises(OSError, match="work"):
        quantize(make_settings(tiny_model(), two_sided=True), tmp_path / "out")
    assert {count for name, count in read.items() if ".layers.1." in name} == {1}


@pytest.fixture
def unfinished(stopped, tiny_model):
    """A folder whose run stopped in its second layer, and its settings."""
    return stopped(tiny_model(), 5)


def test_finished_layers_are_not_done_again(unfinished, monkeypatch):
    out, settings = unfinished
    done, original = [], run.quantize_group

    def recording(group, weights, *args):
        done.extend(weights)
        return original(group, weights, *args)

    monkeypatch.setattr(run, "quantize_group", recording)
    quantize(settings, out, resume=True)
    assert len(done) == 7 and all(name.startswith("model.layers.1.") for name in done)
    with pytest.raises(ValueError, match="is finished: there is nothing to resume"):
        quantize(settings, out, resume=True)
    with pytest.raises(ValueError, match="is not empty: give a new folder, or --resume"):
        quantize(settings, out)


@pytest.mark.parametrize(("tune", "passes"), [("none", 0), ("full", 2)])  # of the original's two layers, for the logits
def test_finished_layers_run_only_for_who_reads_what_is_behind(
    tiny_model, make_settings, tmp_path, monkeypatch, tune, passes
):
    monkeypatch.setattr(run.Record, "merge", work)
    monkeypatch.setattr(run, "tune_together", work)
    settings, done, original = make_settings(tiny_model(), tune=tune), [], run.run_layer
    with pytest.raises(OSError, match="work"):
        quantize(settings, tmp_path / "out")
    monkeypatch.setattr(run, "run_layer", lambda *args: done.append(args) or original(*args))
    with pytest.raises(OSError, match="work"):
        quantize(settings, tmp_path / "out", resume=True)
    assert len(done) == passes


@pytest.mark.parametrize("group", [2, 6])  # the embedding is done; the first decoder layer, too
def test_a_quantized_embedding_is_read_back(stopped, tiny_model, tmp_path, group):
    out, settings = stopped(tiny_model("Mistral"), group, embedding=2, lm_head=3)
    quantize(settings, out, resume=True)
    quantize(settings, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "seed was 0 and is now 7"),
        ({"ignore": ("o_proj",)}, r"ignore was \[\] and is now \['o_proj'\]"),
        (
            {"overrides": (("o_proj", 4),), "lm_head": 4},
            r"overrides was \[\] and is now \[\['o_proj', 4\]\]; lm_head was None and is now 4",
        ),
    ],
)
def test_other_settings(unfinished, make_settings, changes, named):
    out, settings = unfinished
    with pytest.raises(ValueError, match=f"was begun with other settings: {named}; give the same or a new folder"):
        quantize(make_settings(settings.model, **changes), out, resume=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shards.json", {"shards": [{"a": "../../precious"}]}),
        ("shards.json", {}),
        ("layer-00000.json", {}),
        ("layer-00000.json", {"layers": 5, "digest": "", "tuning": []}),
    ],
)
def test_a_damaged_record_is_refused_and_nothing_elsewhere_is_touched(unfinished, name, content):
    out, settings = unfinished
    precious = out.parent / "precious.safetensors"
    write_shard(precious, {"a": torch.ones(2)})
    write_json(out / ".quantize" / name, content)
    with pytest.raises(ValueError, match="damaged: begin again, in a new folder|was begun with other weights"):
        quantize(settings, out, resume=True)
    assert precious.exists()


@pytest.mark.parametrize("tokens", [{}, {"tokens": torch.ones(3)}, {"tokens": torch.full((4, 40), 10**6)}])
def test_damaged_tokens_are_refused(unfinished, tokens):
    out, settings = unfinished
    write_shard(out / ".quantize" / "calibration.safetensors", tokens or {"other": torch.ones(1)})
    with pytest.raises(ValueError, match="damaged: begin again|makes token 1000000, but the model knows"):
        quantize(settings, out, resume=True)


def test_nothing_to_resume(tiny_model, make_settings, tmp_path, unfinished):
    with pytest.raises(ValueError, match="holds no unfinished run: leave --resume away"):
        quantize(make_settings(tiny_model()), tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="is not empty"):
        quantize(unfinished[1], unfinished[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            "with other weights .model.layers.0 has changed.: give the model of then",
        ),
        ("model.layers.0.input_layernorm.weight", "with other weights .model.layers.0 has changed"),
        ("model.embed_tokens.weight", "weights outside the decoder layers was '.*' and is now '.*'"),
        ("model.layers.1.mlp.up_proj.weight", None),  # of a layer that is not finished: read when it is its turn
    ],
)
def test_other_weights(tiny_model, stopped, tmp_path, name, message):
    shutil.copytree(tiny_model(), tmp_path / "model")
    _, settings = stopped(tmp_path / "model", 6)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    if message is None:
        quantize(settings, tmp_path / "out", resume=True)
        quantize(settings, tmp_path / "whole")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    else:
        with pytest.raises(ValueError, match=message):
            quantize(settings, tmp_path / "out", resume=True)


def test_another_config(unfinished, tiny_model, make_settings, tmp_path):
    out, settings = unfinished
    shutil.copytree(settings.model, tmp_path / "model")
    state = json.loads((out / ".quantize" / "settings.json").read_text())
    (out / ".quantize" / "settings.json").write_text(json.dumps({**state, "model": str(tmp_path / "model")}))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match="config.json was '.*' and is now '.*'; give the same or a new folder"):
        quantize(make_settings(tmp_path / "model"), out, resume=True)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
        ("Bloom", {"n_layer": 2}),
    ],
)
def test_layers_that_return_tuples(stopped, tiny_model, tmp_path, architecture, config):
    out, settings = stopped(tiny_model(architecture, **config), 5)
    quantize(settings, out, resume=True)
    quantize(settings, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
