# SPDX-License-Identifier: Apache-2.0
"""What ends a run in one sentence before its calibration text is written and before its weights are read."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch

from quip_vllm.quantizer import record, run
from quip_vllm.quantizer.record import locked
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.source.model import LayeredModel


@pytest.fixture
def refused(make_settings, tmp_path, monkeypatch):
    """refused(model, message, settings...): the sentence, after which there is no text and no folder."""

    def never(*args):
        raise AssertionError("the calibration text is written")

    def refused(model, message, **changes):
        monkeypatch.setattr(run, "calibration_tokens", never)
        with pytest.raises(ValueError, match=message) as raised:
            quantize(make_settings(model, **changes), tmp_path / "out")
        assert len(str(raised.value)) < 360 and "\n" not in str(raised.value)
        assert not (tmp_path / "out" / ".quantize" / "calibration.safetensors").exists()

    return refused


def changed(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "Llama",
            {"sequence_length": 257},
            "sequence_length is 257, but .* has 256 positions: give --sequence-length 256",
        ),
        ("GPTNeoX", {"sequence_length": 10**5}, "has 256 positions"),
        (
            "Llama",
            {"calibration": "self", "sequences": 10**9},
            "memory, and .* GB are free: give a text .--calibration., f",
        ),
        ("Llama", {"code": "hyb", "overrides": (("nothing", 4),)}, "--override nothing matches no linear layer"),
    ],
)
def test_settings(tiny_model, refused, architecture, changes, message):
    refused(tiny_model(architecture), message, **changes)


def test_a_model_without_a_limit_of_positions(tmp_path, make_settings):
    folder = tiny_models.save_model(tmp_path / "model", "Bloom")
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]  # it has a bias in their place
    (folder / "config.json").write_text(json.dumps(config))
    quantize(make_settings(folder, sequences=2, sequence_length=300), tmp_path / "out")


def test_layers_that_cannot_run_alone(tiny_model, refused):
    layers = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 0}
    size = {"head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 272}
    refused(tiny_model("Gemma4Text", **layers, **size), "cannot be run one at a time", calibration="self")


@pytest.mark.parametrize(("calibration", "value"), [("text", -torch.inf), ("text", torch.nan), ("self", torch.inf)])
def test_values_that_the_text_never_meets(damaged, refused, tiny_text, calibration, value):
    folder = damaged(lambda tensors: tensors["model.embed_tokens.weight"][7, 3].fill_(value))
    where = str(tiny_text) if calibration == "text" else calibration
    refused(folder, "model.embed_tokens.weight holds a NaN or an infinity: mend the model", calibration=where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[5, 9].fill_(torch.nan), "holds a NaN or an infinity: mend the model"),
        (lambda w: w.mul_(1e-9), "has a scale of 0.0: it does not fit fp16; leave it out"),
        (lambda w: w.mul_(1e8), "has a scale of inf: it does not fit fp16; leave it out"),
    ],
)
def test_values_of_a_late_layer(damaged, refused, change, message):
    name = "model.layers.1.mlp.down_proj.weight"
    refused(damaged(lambda tensors: change(tensors[name])), f"{name} {message}", calibration="self")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"is_encoder_decoder": True},
            "describes an encoder-decoder .llama.: only causal language models, which write",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "describes LlamaForSequenceClassification: only causal",
        ),
        (
            {"model_type": "clip_vision_model", "architectures": None},
            "has model_type clip_vision_model, which is no causal LM",
        ),
        (
            {"model_type": "of_another_year"},
            "config.json cannot be used: The checkpoint you are trying to load has model",
        ),
    ],
)
def test_models_of_another_kind(tiny_model, refused, tmp_path, changes, message):
    refused(changed(tiny_model(), tmp_path, **changes), message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "is a LoRA adapter: merge it into its base model"),
        ("README.md", "has no config.json: give a folder"),
    ],
)
def test_folders_without_a_model(refused, tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    refused(tmp_path, message)


def test_a_text_is_read_before_all_weights(damaged, make_settings, tmp_path):
    folder = damaged(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="calibration file nowhere.txt cannot be read"):
        quantize(make_settings(folder, calibration="nowhere.txt"), tmp_path / "out")


def test_no_tokenizer(tiny_model, refused, tmp_path):
    folder = changed(tiny_model(), tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "the tokenizer in .*changed cannot be used: .*; put the model's own tokenizer files there")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_among_the_files_runs_only_if_the_user_says_so(tiny_model, refused, make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = changed(tiny_model(), tmp_path, model_type="own", auto_map=names, architectures=["OwnModel"])
    (folder / "own.py").write_text(CODE)
    refused(folder, "asks for Python code from the model's own files: read that code, then give --trust-remote-code")
    monkeypatch.undo()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = make_settings(folder, calibration="self", sequences=2, trust_remote_code=True)
    assert len(quantize(settings, tmp_path / "trusted")["layers"]) == 14
    assert (tmp_path / "trusted" / "own.py").read_text() == CODE


def test_out_that_cannot_be_written(tiny_model, make_settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ValueError, match="file.* cannot be written .*: give a new folder on a disk that can be writ"
        ):
            quantize(make_settings(tiny_model()), out)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ValueError, match="cannot be written .Read-only file system.: give a new folder"):
        quantize(make_settings(tiny_model()), tmp_path / "out")


def test_a_disk_without_locks(tiny_model, make_settings, tmp_path, monkeypatch):
    def no_lock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(record.fcntl, "flock", no_lock)
    with pytest.raises(ValueError, match="out cannot be locked .No locks available.: give a new folder on anoth"):
        quantize(make_settings(tiny_model()), tmp_path / "out")


def test_a_folder_that_another_run_writes(tiny_model, make_settings, tmp_path):
    out, settings = tmp_path / "out", make_settings(tiny_model())
    with locked(out):
        for resume in (False, True):
            with pytest.raises(
                ValueError, match=rf"is being written by process {os.getpid()} on .* since 2\d\d\d-.*: wait"
            ):
                quantize(settings, out, resume)
        with locked(tmp_path / "other"):
            pass
    assert not out.exists() and not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="holds no unfinished run: leave --resume away"):
        quantize(settings, out, resume=True)
    assert not out.exists()
    (out / ".quantize").mkdir(parents=True)
    (out / ".quantize" / "lock").write_text("process 1 that was killed")
    quantize(settings, out)
    assert not (out / ".quantize").exists() and (out / "config.json").exists()


def test_memory_that_ends_in_between(tiny_model, make_settings, tmp_path, monkeypatch):
    def allocate(*args):
        return torch.empty(1 << 60)

    def allocate_on_a_gpu(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for allocating, size in ((allocate, ".* GB"), (allocate_on_a_gpu, "on cpu")):
        monkeypatch.setattr(run, "quantize_group", allocating)
        said = rf"memory is too small \({size}\): give fewer --sequences, .* stays for --resume"
        with pytest.raises(ValueError, match=said):
            quantize(make_settings(tiny_model()), tmp_path / size)


def test_further_layers_and_towers_are_kept(damaged, make_settings, tmp_path, caplog):
    """Tensors that transformers does not load: they are copied, and their matrices are not to be converted."""

    def further(tensors):
        for name in ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight", "mtp.fc.weight"):
            tensors[name] = torch.randn(64, 128)
        tensors["mtp.norm.weight"] = torch.randn(64)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.randn(8)

    source = LayeredModel(damaged(further))
    assert source.other_linears == ["lm_head"] and source.beyond == ["model.layers.2", "mtp.fc"]
    quantize(make_settings(source.folder), tmp_path / "out")
    assert "no modules model.layers.2, mtp.fc, which its files hold: they are copied as they are" in caplog.text
    written = LayeredModel(source.folder).reader
    out = run.shards.read_shard(tmp_path / "out" / "model.safetensors")
    for name in written.names():
        if name.startswith(("mtp", "model.layers.2")) or "inv_freq" in name:
            assert torch.equal(out[name], written.read([name])[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", "model.layers.2", "mtp.fc"]
