# SPDX-License-Identifier: Apache-2.0
"""EXL3 checkpoints that exl3_files writes from the specification: read, inspected, and refused where damaged."""

import json
import math
import shutil

import exl3_files
import mutated_files
import pytest
import torch
from numerics import FLOAT32_LINEAR, relative
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.convert import convert
from quip_vllm.checkpoint.inspection import format_inspection, inspect
from quip_vllm.checkpoint.layers import read_config, read_layers
from quip_vllm.evaluation.loading import check_complete, load_model
from quip_vllm.ops import dequantize

ARCHITECTURES = ["Llama", "Qwen3", "Gemma3Text", "Qwen2"]


def rate(name):
    return {"q": 2, "k": 5, "v": 8, "down": 1}.get(name.rpartition(".")[2].removesuffix("_proj"), 3)


def half_rate(name):
    """Of mul1."""
    return {"v": 3.5, "o": 2.5, "gate": 1.5, "down": 2.5}.get(name.rpartition(".")[2].removesuffix("_proj"), rate(name))


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    """written(architecture, code): an EXL3 folder and the state dict of the dense model; never write in it."""
    made = {}

    def written(architecture="Llama", code="mul1", rate=rate, **changes):
        key = (architecture, code, rate, *changes.items())
        if key not in made:
            out = tmp_path_factory.mktemp("exl3") / "out"
            state = exl3_files.write(tiny_model(architecture, **changes), out, code, rate, older=("o_proj",))
            made[key] = out, state
        return made[key]

    return written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("code", "rate"), [("3inst", rate), ("mcg", rate), ("mul1", rate), ("mul1", half_rate)])
def test_layers_are_those_of_the_specification(written, architecture, code, rate):
    folder, state = written(architecture, code, rate)
    names = set()
    for name, spec, tensors in read_layers(folder):
        wanted = state[f"{name}.weight"]
        bits = 6 if name == "lm_head" else rate(name)
        assert (spec.code, spec.bits) == (code if bits == int(bits) else "mul1_half", math.ceil(bits))
        assert (spec.out_features, spec.in_features) == tuple(wanted.shape)
        assert relative(dequantize(spec, tensors), wanted.double()) < FLOAT32_LINEAR
        names.add(name)
    assert names == {
        name.removesuffix(".weight") for name in state if name.endswith("_proj.weight") or name == "lm_head.weight"
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_evaluated_with_the_dense_weights(written, architecture):
    folder, state = written(architecture)
    found = load_model(str(folder)).state_dict()
    for name, wanted in state.items():
        assert relative(found[name], wanted.double()) < FLOAT32_LINEAR, name


def test_a_head_that_vllm_does_not_ask_for_is_left_out(tiny_model, tmp_path):
    """vLLM's code of Gemma 2 multiplies with the embedding: so does the evaluation, and the converted model."""
    state = exl3_files.write(tiny_model("Gemma2"), tmp_path / "source", "mcg", rate)
    convert(tmp_path / "source", tmp_path / "out")
    for folder in ("source", "out"):
        found = load_model(str(tmp_path / folder)).state_dict()
        assert torch.equal(found["lm_head.weight"], state["model.embed_tokens.weight"])
        assert "lm_head" not in {layer["name"] for layer in inspect(tmp_path / folder)["layers"]}
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.startswith("lm_head")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 320, "hidden_size": 192, "vocab_size": 300}])
def test_converted_layers_are_those_of_the_source(tiny_model, tmp_path, architecture, sizes):
    """Padded or not, with biases, a head of its own, mixed bits and half ones."""
    source = tiny_model(architecture, **sizes)
    state = exl3_files.write(source, tmp_path / "source", "mul1", half_rate, older=("o_proj",))
    convert(tmp_path / "source", tmp_path / "out")
    found = load_model(str(tmp_path / "out")).state_dict()
    for name, wanted in state.items():
        assert relative(found[name], wanted.double()) < FLOAT32_LINEAR, name
    check_complete(tmp_path / "out")
    assert inspect(tmp_path / "out")["totals"]["weights"] == inspect(tmp_path / "source")["totals"]["weights"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["converted_from"]["quantization_config"]["quant_method"] == "exl3"


def swap_slices(folder, first, second):
    """Gives each of two layers of a converted folder the tensors and the description of the other."""
    config = json.loads((folder / "config.json").read_text())
    layers, tensors = config["quantization_config"]["layers"], load_file(folder / "model.safetensors")
    layers[first], layers[second] = layers[second], layers[first]
    swapped = {first: second, second: first}
    named = {name: name.rpartition(".") for name in tensors}
    tensors = {f"{swapped.get(named[n][0], named[n][0])}.{named[n][2]}": tensor for n, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def test_slices_of_an_mlp_are_summed(tiny_model, tmp_path):
    source = tiny_model("Llama", intermediate_size=320)
    state = exl3_files.write(source, tmp_path / "out", "mcg", rate, widths=(128, 128, 64))
    found = load_model(str(tmp_path / "out")).state_dict()
    for name, wanted in state.items():
        assert relative(found[name], wanted.double()) < FLOAT32_LINEAR, name
    check_complete(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "converted")
    found = load_model(str(tmp_path / "converted")).state_dict()
    assert all(relative(found[name], wanted.double()) < FLOAT32_LINEAR for name, wanted in state.items())
    swap_slices(tmp_path / "converted", "model.layers.0.mlp.down_proj.slice.1", "model.layers.0.mlp.up_proj.slice.1")
    with pytest.raises(ValueError, match="down_proj is in slices that do not fit together .*: the files are damaged"):
        load_model(str(tmp_path / "converted"))
    gone = "model.layers.0.mlp.down_proj.slice.1"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    biased = tensors | {f"{gone}.bias": torch.zeros(128, dtype=torch.float16)}
    save_file(biased, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"slice.1 has a bias \(128,\), which a slice has not"):
        read_config(tmp_path / "out")
    kept = {name: one for name, one in tensors.items() if not name.startswith(gone)}
    save_file(kept, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj is stored in slices \[0, 2\] of \[128, 128\] inputs"):
        read_config(tmp_path / "out")


def test_inspection_counts_what_is_stored(written):
    folder, _ = written()
    found = inspect(folder)
    layer = next(one for one in found["layers"] if one["name"] == "model.layers.0.self_attn.q_proj")
    # 128 x 128 weights are stored of 64 x 64: 2 bits each, two vectors of 128, and the mark of the code
    assert layer == {
        "name": "model.layers.0.self_attn.q_proj",
        "code": "mul1",
        "bits": 2,
        "shape": [64, 64],
        "bytes": 128 * 128 // 4 + 2 * 2 * 128 + 4,
        "proxy_loss": None,
    }
    assert found["totals"]["layers"] == 15 and found["quantization_config"]["codebook"] == "mul1"
    assert "lm_head" in format_inspection(found)


def changed(written, tmp_path, tensors=None, config=None):
    """A copy of the Llama's folder after changes to its tensors and its config.json."""
    folder, _ = written()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if tensors:
        state = load_file(copy / "model.safetensors")
        tensors(state)
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    if config:
        model = json.loads((copy / "config.json").read_text())
        config(model)
        (copy / "config.json").write_text(json.dumps(model))
    return copy


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.suh"), f"{Q} has tensors mul1, svh, trellis"),
        (lambda t: t.pop(f"{Q}.trellis"), f"{Q} has tensors mul1, suh, svh"),
        (lambda t: t.pop(f"{Q}.mul1"), f"{Q} has code 3inst, where the checkpoint has mul1"),
        (lambda t: t.update({f"{Q}.mcg": t[f"{Q}.mul1"].clone()}), "at most one of mcg and mul1"),
        (lambda t: t.update({f"{Q}.scale": torch.ones(1)}), "has tensors .*scale"),
        (lambda t: t.update({f"{Q}.trellis": t[f"{Q}.trellis"][:, :, :-1].contiguous()}), "has a trellis torch.int16"),
        (
            lambda t: t.update({f"{Q}.trellis": torch.zeros(8, 8, 72, dtype=torch.int16)}),
            "72.* of mul1 1.5, 2.5 or 3.5",
        ),
        (lambda t: t.update({f"{Q}.mul1": t[f"{Q}.mul1"].repeat(2)}), r"has mul1 \(2,\), where one number is wanted"),
        (lambda t: t.update({f"{Q}.trellis": t[f"{Q}.trellis"][:-1]}), "112 inputs and 128 outputs"),
        (lambda t: t.update({f"{Q}.trellis": t[f"{Q}.trellis"].float()}), "has a trellis torch.float32"),
        (lambda t: t.update({f"{Q}.trellis": t[f"{Q}.trellis"].repeat(2, 1, 1)}), "has suh .*128.* in place of"),
        (lambda t: t.update({f"{Q}.svh": t[f"{Q}.svh"].float()}), "has svh torch.float32"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.3.up_proj.slice.0.trellis": t[f"{Q}.trellis"].clone()}),
            "experts.3.up_proj.slice.0 is a slice of an expert",
        ),
    ],
)
def test_damaged_tensors_are_named(written, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        read_config(changed(written, tmp_path, tensors=change))


def test_another_multiplier_is_refused(written, tmp_path):
    folder = changed(written, tmp_path, tensors=lambda t: t[f"{Q}.mul1"].add_(1))
    with pytest.raises(ValueError, match="multiplier of mul1 is 0x83dcd12e, where EXL3's is 0x83dcd12d"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(hidden_size=10**15), "is stored with 128 inputs .* gives it 1000000000000000"),
        (lambda m: m.update(intermediate_size=512), "down_proj is stored with 128 inputs .* gives it 512 and 64"),
        (lambda m: m.update(num_attention_heads="4"), "num_attention_heads '4'"),
        (lambda m: m.update(vocab_size=-1), "vocab_size -1"),
        (lambda m: m["quantization_config"].update(codebook="5inst"), "codebook is '5inst'"),
        (lambda m: m.update(quantization_config=[]), "no quantization_config"),
    ],
)
def test_a_config_of_another_model_is_refused_before_data_is_read(written, tmp_path, change, words, monkeypatch):
    folder = changed(written, tmp_path, config=change)
    monkeypatch.setattr("quip_vllm.checkpoint.store.CheckpointReader.read", None)
    with pytest.raises(ValueError, match=words):
        read_config(folder)


def test_numbers_that_are_none_are_refused(written, tmp_path):
    def change(tensors):
        tensors[f"{Q}.suh"][5] = float("nan")

    with pytest.raises(ValueError, match=f"{Q}.*su holds a NaN"):
        load_model(str(changed(written, tmp_path, tensors=change)))


def mutate(draw, header, raw, model):
    """One random change: see mutated_files."""
    names = [name for name in header if name.rpartition(".")[2] in ("trellis", "suh", "svh", "su")]
    name, kind = draw.choice(names), draw.randrange(6)
    one, body = header[name], raw
    if kind == 0:
        body = raw[: draw.randrange(len(raw))]
    elif kind == 1:
        one["dtype"] = draw.choice([d for d in ("F32", "BF16", "I16", "F16", "U8", "XX", "I64") if d != one["dtype"]])
    elif kind == 2:
        axis = draw.randrange(len(one["shape"]))
        one["shape"][axis] = draw.choice([0, 1, 10**12, one["shape"][axis] * 2, -one["shape"][axis]])
    elif kind == 3:
        del header[name]
    elif kind == 4:
        one["data_offsets"] = [draw.randrange(2**40), draw.randrange(2**40)]
    else:
        key = draw.choice(["hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size"])
        model[key] = draw.choice([0, -1, 10**18, 1.5, "64", [], {}, True, 7 * 128])
    return body


@pytest.mark.parametrize("widths", [(), pytest.param((128, 128, 64), marks=pytest.mark.exhaustive)])
def test_mutated_files_end_in_a_sentence(tiny_model, tmp_path, widths):
    def change(draw, header, raw, model):
        model["head_dim"] = 16
        return mutate(draw, header, raw, model)

    source = tiny_model("Llama", intermediate_size=sum(widths) or 128)
    exl3_files.write(source, tmp_path / "whole", "mul1", rate, older=("o_proj",), widths=widths)
    mutated_files.end_in_a_sentence(tmp_path / "whole", tmp_path, 0, change)


def test_a_tensor_in_two_files_is_refused(written, tmp_path):
    folder = changed(written, tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({f"{Q}.suh": state[f"{Q}.suh"] * 2}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=f"{Q}.suh is in a.safetensors and in b.safetensors"):
        read_config(folder)
