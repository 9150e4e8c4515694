# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny models: every architecture, what is written, what a layer sees, what stays in memory."""

import shutil
import threading
from types import SimpleNamespace

import numerics
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint import shards
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.evaluation.loading import check_complete, dense_state, load_model
from quip_vllm.evaluation.report import evaluate
from quip_vllm.quantizer import run, sensitivities
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.vllm_plugin.ranks import verdict

HEADS = {  # architecture -> its config, the name of its head
    "Mistral": ({"vocab_size": 301}, "lm_head"),
    "Gemma2": ({}, "model.embed_tokens"),
    "GPTNeoX": ({}, "gpt_neox.embed_in"),
}

OTHERS = {  # a bias in place of positions; layers that return tuples; learned positions
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}


def weights(folder):
    reader = CheckpointReader(folder)
    return reader.read(reader.names())


@pytest.mark.parametrize("architecture", [*tiny_models.ARCHITECTURES, "GPTNeoX", *OTHERS])
def test_architectures(architecture, tiny_model, make_settings, tiny_text, tmp_path):
    config, head = HEADS.get(architecture, (OTHERS.get(architecture, {}), None))
    model = tiny_model(architecture, **config)
    format = {"code": "hyb", "lm_head": 4} if head else {}
    report = quantize(make_settings(model, **format), tmp_path)
    original, dense, stored, found = weights(model), dense_state(tmp_path), weights(tmp_path), inspect(tmp_path)
    per_layer = {"Phi3": 4, "GPTNeoX": 4, "Bloom": 4, "GPTJ": 6, "OPT": 6}.get(architecture, 7)
    assert len(found["layers"]) == 2 * per_layer + bool(head) and set(dense) == set(original)
    losses = {entry["name"]: entry["proxy_loss"] for entry in report["layers"]}
    for layer in found["layers"]:
        name = layer["name"] + ".weight"
        assert (layer["bits"], layer["code"]) == (4 if layer["name"] == head else 2, format.get("code", "e8p"))
        assert tuple(layer["shape"]) == original[name].shape and name not in stored
        difference = (dense[name] - original[name].float()).norm() / original[name].float().norm()
        # A weight's own error is larger than its outputs', the more so where it mends drift; any other matrix has 1.4.
        assert 0.0 < difference < (0.2 if layer["name"] == head else 0.9)
        assert 0.0 < layer["proxy_loss"] == losses[layer["name"]] < (0.02 if layer["name"] == head else 0.15)
    for name in set(original) & set(stored):  # biases, norms, embeddings
        assert torch.equal(stored[name], original[name]) and stored[name].dtype == original[name].dtype
    if architecture == "Qwen2":
        assert "model.layers.1.self_attn.q_proj.bias" in stored
    loaded = load_model(str(tmp_path))
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == (architecture != "Mistral")
    (figures,) = evaluate([str(tmp_path)], [str(tiny_text)], str(model), 64, 4)["results"]
    assert 0.0 < figures["kl_divergence"] < 0.3


def test_a_split_model_is_tuned_and_can_be_cut(tiny_model, make_settings, tiny_text, tmp_path):
    model = tiny_model("Qwen3")
    quantize(make_settings(model, split=2, two_sided=True, tune="full", lm_head=4), tmp_path)
    (figures,) = evaluate([str(tmp_path)], [str(tiny_text)], str(model), 64, 4)["results"]
    assert 0.0 < figures["kl_divergence"] < 0.3
    assert verdict(tmp_path, 4)["allowed"] == [1, 2]


def test_a_state_space_is_tuned(tiny_model, make_settings, tiny_text, tmp_path):
    """Its convolution stays, and its in_proj is filled up to outputs that can be rotated."""
    model = tiny_model("FalconH1")
    report = quantize(make_settings(model, two_sided=True, tune="full"), tmp_path)
    original, dense, stored = weights(model), dense_state(tmp_path), weights(tmp_path)
    assert len(report["layers"]) == 2 * 9 and {key: one.shape for key, one in dense.items()} == {
        key: one.shape for key, one in original.items()
    }
    mixer = "model.layers.0.mamba"
    assert len(stored[f"{mixer}.in_proj.sv"]) == 592 and len(original[f"{mixer}.in_proj.weight"]) == 584
    assert torch.equal(stored[f"{mixer}.conv1d.weight"], original[f"{mixer}.conv1d.weight"])
    (figures,) = evaluate([str(tmp_path)], [str(tiny_text)], str(model), 64, 4)["results"]
    assert 0.0 < figures["kl_divergence"] < 0.3


def test_files_and_report(quantized, tiny_model, make_settings):
    from transformers import AutoTokenizer

    out, model = quantized(), tiny_model()
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    usual = out / "usual"
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    assert {file.stat().st_mode for file in out.iterdir()} == {mode}
    config = read_json(out / "config.json")
    described = config.pop("quantization_config")
    assert config == read_json(model / "config.json") and config["dtype"] == "bfloat16"
    assert described == {
        "quant_method": "quip_sharp",
        "format_version": 1,
        "code": "e8p",
        "bits": 2,
        "hadamard_block": None,
        "modules_to_not_convert": ["lm_head"],
        "layers": {},
    }
    words = [AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] for folder in (out, model)]
    assert words[0] == words[1]
    report = read_json(out / "quantization_report.json")
    assert set(report) == {
        "quip_vllm", "settings", "compute_dtype", "calibration_tokens", "calibration_sha256", "layers", "tuning",
        "searched",
    }  # fmt: skip
    assert report["settings"] == make_settings(model, split=1).to_dict()  # which it chose
    assert report["calibration_tokens"] == 8 * 48
    keys = {"name", "shape", "code", "bits", "proxy_loss", "damping_added", "dead_columns", "group_seconds"}
    keys |= {"tokens", "borrowed_tokens"}
    assert all(set(layer) == keys | {"expected_divergence"} for layer in report["layers"])
    assert all(layer["expected_divergence"] is None for layer in report["layers"])
    assert [layer["name"] for layer in report["layers"]][:8] == [
        *(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"model.layers.0.mlp.{word}_proj" for word in ("gate", "up", "down")),
        "model.layers.1.self_attn.q_proj",
    ]


def test_bit_rates_and_codes_share_hessians(tiny_model, make_settings, tmp_path, monkeypatch):
    model, hessians = tiny_model("Gemma2"), tmp_path / "hessians"
    usual = {"token_weights": 1.0, "two_sided": True, "hessians": str(hessians), "lm_head": 4}
    quantize(make_settings(model, **usual), tmp_path / "two")
    monkeypatch.setattr(sensitivities, "Forward", None)  # nobody runs it again
    for name, changes in (
        ("again", {}),
        ("more", {"bits": 3}),
        ("other", {"code": "hyb"}),
        ("one", {"two_sided": False}),
    ):
        quantize(make_settings(model, **usual | changes), tmp_path / name)
    reports = {name: read_json(tmp_path / name / "quantization_report.json")["layers"] for name in ("two", "more")}
    for two, more in zip(reports["two"][:-1], reports["more"][:-1], strict=True):
        assert 0 < 2 * more["expected_divergence"] < two["expected_divergence"]
    assert reports["two"][-1]["expected_divergence"] is None  # the head has none
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("two", "again", "one")}
    assert files["two"] == files["again"] != files["one"]
    with pytest.raises(ValueError, match="hessians holds Hessians of other calibration: give the model, calibration"):
        quantize(make_settings(model, **usual, sequences=7), tmp_path / "seven")


def test_a_share_of_the_token_weights(tiny_model, make_settings, tmp_path, monkeypatch):
    """The Hessians before the first quantized layer are a mixture of those without and with them."""
    found = {}
    for share in (0.0, 0.25, 1.0):
        seen = found.setdefault(share, [])
        original = run.quantize_group

        def seeing(group, *args, seen=seen, original=original):
            seen.append(group.hessian.clone())
            return original(group, *args)

        with monkeypatch.context() as patch:
            patch.setattr(run, "quantize_group", seeing)
            quantize(make_settings(tiny_model(), token_weights=share), tmp_path / str(share))
    for plain, mixed, weighted in zip(*(hessians[:4] for hessians in found.values()), strict=True):
        assert numerics.relative(plain, weighted) > 0.02
        assert numerics.relative(mixed, 0.75 * plain + 0.25 * weighted) < numerics.FLOAT32_HESSIAN


def test_shared_su(quantized):
    stored = weights(quantized())
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for readers in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            signs = [stored[f"{prefix}{name}.su"] for name in readers]
            assert all(torch.equal(sign, signs[0]) for sign in signs)
    assert not torch.equal(stored["model.layers.0.self_attn.q_proj.su"], stored["model.layers.1.self_attn.q_proj.su"])


def test_a_head_changes_no_other_layer_and_small_shards_no_tensor(
    quantized, tiny_model, make_settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    quantize(make_settings(tiny_model(), lm_head=4), tmp_path)
    index = read_json(tmp_path / "model.safetensors.index.json")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 3
    assert all(file.stat().st_size < 10_000 + 8_000 for file in files)  # the header besides
    ours, usual = weights(tmp_path), weights(quantized())
    assert set(usual) - set(ours) == {"model.embed_tokens.weight"}
    assert all(torch.equal(ours[name], usual[name]) for name in set(usual) & set(ours))


def test_a_tied_weight_stored_twice_is_written_once(tiny_model, make_settings, tmp_path):
    """And the head alone is quantized where all other layers are left out."""
    shutil.copytree(tiny_model(), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    report = quantize(make_settings(tmp_path / "model", lm_head=2, ignore=(".",)), tmp_path / "out")
    assert [layer["name"] for layer in report["layers"]] == ["model.embed_tokens"]
    names = CheckpointReader(tmp_path / "out").names()
    assert "model.embed_tokens.codes" in names
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(names)
    load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("bits", [{"embedding": 4}, {"embedding": 3, "lm_head": 4}])
def test_an_untied_embedding(tiny_model, make_settings, tiny_text, tmp_path, bits):
    model = tiny_model("Mistral", vocab_size=301)
    report = quantize(make_settings(model, code="hyb", **bits), tmp_path)
    names = {"embedding": "model.embed_tokens", "lm_head": "lm_head"}
    found = {layer["name"]: layer["bits"] for layer in inspect(tmp_path)["layers"] if layer["shape"][0] == 301}
    assert found == {names[key]: bits[key] for key in bits}
    assert report["layers"][0]["name"] == "model.embed_tokens" and report["layers"][0]["shape"] == [301, 64]
    original, dense = weights(model), dense_state(tmp_path)
    error = dense["model.embed_tokens.weight"] - original["model.embed_tokens.weight"].float()
    share = error.square().sum() / original["model.embed_tokens.weight"].float().square().sum()
    assert share == pytest.approx(report["layers"][0]["proxy_loss"], rel=0.01)  # in the rotated basis, with scales
    loaded = load_model(str(tmp_path))
    assert loaded.get_input_embeddings().weight is not loaded.get_output_embeddings().weight
    check_complete(tmp_path)
    (figures,) = evaluate([str(tmp_path)], [str(tiny_text)], str(model), 64, 4)["results"]
    assert 0.0 < figures["kl_divergence"] < 0.3


@pytest.mark.parametrize("share", [0.0, 0.35])
def test_the_first_layer_sees_the_quantized_embedding_and_its_drift(
    tiny_model, make_settings, tmp_path, monkeypatch, share
):
    model, groups = tiny_model("Mistral", dtype="float32"), []

    def recording(group, *args):
        groups.append(group)
        return original(group, *args)

    original = run.quantize_group
    monkeypatch.setattr(run, "quantize_group", recording)
    settings = make_settings(model, embedding=2, drift_correction=share)
    quantize(settings, tmp_path)
    assert groups[0].names == ["model.embed_tokens"] and groups[1].names[0].endswith("0.self_attn.q_proj")
    tokens = calibration_tokens(settings, model, 272)

    def inputs(folder):
        loaded, seen = load_model(str(folder)), []
        loaded.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            loaded(tokens)
        return torch.cat(seen).flatten(0, 1).double()

    x, x0 = inputs(tmp_path), inputs(model)
    assert (groups[1].hessian - x.T @ x).norm() / (x.T @ x).norm() < numerics.FLOAT32_HESSIAN
    assert bool(groups[1].drift) == bool(share)
    if share:
        difference = (x0 - x).T @ x
        assert (groups[1].drift.difference - difference).norm() / difference.norm() < numerics.FLOAT32_HESSIAN


def test_second_layer_sees_the_quantized_first(tiny_model, make_settings, tmp_path, monkeypatch):
    model = tiny_model(dtype="float32")
    settings = make_settings(model, sequences=50)  # two batches, the second one smaller
    hessians = []

    def recording(group, *args):
        hessians.append((group.names, group.hessian.clone()))
        return original(group, *args)

    original = run.quantize_group
    monkeypatch.setattr(run, "quantize_group", recording)
    quantize(settings, tmp_path)
    assert hessians[4][0] == [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
    tokens = calibration_tokens(settings, model, 272)

    @torch.no_grad()
    def expected(folder):
        loaded, seen = load_model(str(folder)), []
        loaded.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        loaded(tokens)
        rows = torch.cat(seen).flatten(0, 1).double()
        return rows.T @ rows

    scale = hessians[4][1].norm()
    assert (hessians[4][1] - expected(tmp_path)).norm() / scale < numerics.FLOAT32_HESSIAN
    assert (hessians[4][1] - expected(model)).norm() / scale > 10 * numerics.FLOAT32_HESSIAN


def test_one_layer_in_memory(tiny_model, make_settings, tmp_path, monkeypatch):
    sources, ran = [], []

    class Watched(run.LayeredModel):
        def __init__(self, *args):
            super().__init__(*args)
            sources.append(self)

    def watching(layer, *args):
        (source,) = sources
        real = [i for i, other in enumerate(source.layers) if any(p.device.type != "meta" for p in other.parameters())]
        assert [source.layers[i] for i in real] == [layer]
        assert source.model.lm_head.weight.device.type == "meta"
        ran.append(real[0])
        return original(layer, *args)

    original = run.run_layer
    monkeypatch.setattr(run, "LayeredModel", Watched)
    monkeypatch.setattr(run, "run_layer", watching)
    quantize(make_settings(tiny_model("Llama", num_hidden_layers=3)), tmp_path)
    # Original, Hessians (of the first the same), and of all but the last, outputs: each has one batch.
    assert ran == [0, 0, 1, 1, 1, 2, 2]


def test_several_devices_give_the_same_bytes(quantized, tiny_model, make_settings, tmp_path, monkeypatch):
    """Two threads of this CPU, which round two groups at the same time."""
    expected = (quantized() / "model.safetensors").read_bytes()
    meeting, together = threading.Barrier(2, timeout=60), []

    def both(group, *args):
        if "q_proj" in group.names[0] or "o_proj" in group.names[0]:
            together.append(meeting.wait())
        return original(group, *args)

    original = run.quantize_group
    monkeypatch.setattr(run, "quantize_group", both)
    quantize(make_settings(tiny_model(), device="cpu,cpu"), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    assert sorted(together) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("device", "searchers", "said"),
    [
        ("cpu,meta", None, "--device is cpu,meta: devices of different kinds"),
        ("cpu,cpu", SimpleNamespace(count=2), "--device is cpu,cpu, which search at the same time"),
        ("cpu,", None, "--device is , which torch cannot use"),
    ],
)
def test_devices_that_cannot_round_together_are_refused(tiny_model, make_settings, tmp_path, device, searchers, said):
    with pytest.raises(ValueError, match=said):
        quantize(make_settings(tiny_model(), device=device), tmp_path, searchers=searchers)


def test_bytes_follow_the_settings(quantized, tiny_model, make_settings, tmp_path):
    quantize(make_settings(tiny_model()), tmp_path / "again")
    quantize(make_settings(tiny_model(), seed=1), tmp_path / "other")
    name = "model.safetensors"
    first = (quantized() / name).read_bytes()
    assert (tmp_path / "again" / name).read_bytes() == first
    assert (tmp_path / "other" / name).read_bytes() != first


def test_refused_settings_do_not_block_the_folder(tiny_model, make_settings, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="no linear layer of .* is left to quantize: give a narrower --ignore"):
        quantize(make_settings(model, ignore=(".",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "short").write_text(tiny_models.text(300))
    with pytest.raises(ValueError, match="give a text that makes at least 4096 tokens"):
        quantize(make_settings(model, calibration=str(tmp_path / "short")), tmp_path / "out")
    quantize(make_settings(model), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_files_beside_the_weights_travel(tiny_model, make_settings, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model(), model)
    extra = [
        "additional_chat_templates/rag.jinja",
        "cl100k.tiktoken",
        "vocab.bpe",
        "NOTICE.txt",
        "LICENCE",
    ]
    for name in extra:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    (model / "pytorch_model.bin").touch()
    (model / ".cache").mkdir()
    (model / ".cache" / "secret.json").touch()
    (model / "earlier" / "run").mkdir(parents=True)
    for name in ("config.json", "run/tokenizer.json"):  # another model, which is no part of this one
        (model / "earlier" / name).touch()
    quantize(make_settings(model), out)
    assert [(out / name).read_text() for name in extra] == extra
    assert not (out / "pytorch_model.bin").exists() and not (out / ".cache").exists()
    assert not (out / "earlier").exists()
