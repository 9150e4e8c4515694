# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in transformers with their weights quantized, against the dequantized model."""

import shutil

import exl3_files
import pytest
import relaxml_files
import torch
from numerics import FLOAT32_LAYERS, FLOAT32_LINEAR, relative
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

from quip_vllm import hf_plugin
from quip_vllm.checkpoint.convert import convert
from quip_vllm.checkpoint.shards import read_shard
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import load_model
from quip_vllm.hf_plugin.modules import Embedding, Linear, Sliced, StoredLayer
from quip_vllm.ops import dequantize

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "exact")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def checkpoint(quantized, tiny_model, tmp_path):
    """checkpoint(kind): a folder of each kind."""

    def checkpoint(kind):
        if kind == "slices":
            source = tiny_model("Llama", hidden_size=128, intermediate_size=320)
            exl3_files.write(source, tmp_path / "exl3", "mul1", widths=(128, 128, 64))
            return tmp_path / "exl3"
        if kind == "padded, with biases":
            exl3_files.write(tiny_model("Qwen2"), tmp_path / "exl3", "mcg", older=("o_proj",))
            return tmp_path / "exl3"
        return {
            "lattice": lambda: quantized(),
            "head and scaled embedding": lambda: quantized("Gemma3Text", code="1mad", lm_head=4),
            "untied embedding": lambda: quantized("Mistral", embedding=3, lm_head=4),
            "experts": lambda: quantized("Qwen2Moe", code="1mad", ignore=("layers.0.mlp.experts",)),
            "experts under other names": lambda: quantized("Mixtral"),
            "experts without a gate": lambda: quantized("NemotronH"),
            "experts that the files stack": lambda: quantized("Llama4Text"),
            "mixed": lambda: quantized("Qwen2", code="hyb", overrides=(("down_proj", 4),), ignore=("[qkv]_proj",)),
        }[kind]()

    return checkpoint


@pytest.mark.parametrize(
    "kind",
    [
        "lattice",
        "head and scaled embedding",
        "untied embedding",
        "experts",
        "experts under other names",
        "experts without a gate",
        "experts that the files stack",
        "mixed",
        "padded, with biases",
        "slices",
    ],
)
def test_logits_are_those_of_the_dequantized_model_and_files_survive(checkpoint, kind, tmp_path):
    folder = checkpoint(kind)
    model, dense = load(folder), load_model(str(folder))
    found, expected = model(IDS).logits, dense(IDS).logits
    torch.testing.assert_close(found, expected, rtol=FLOAT32_LAYERS, atol=FLOAT32_LAYERS)
    kinds = {type(module) for module in model.modules()}
    assert Linear in kinds and (Embedding in kinds) == ("embedding" in kind) and (Sliced in kinds) == (kind == "slices")
    how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **how), dense.generate(IDS, **how))
    model.save_pretrained(tmp_path / "saved")
    one, other = read_shard(folder / "model.safetensors"), read_shard(tmp_path / "saved" / "model.safetensors")
    others = {
        "experts under other names": (".mlp.", ".block_sparse_moe."),
        "experts without a gate": ("model.", "backbone."),
    }
    ours, theirs = others.get(kind, ("", ""))
    modules = {name.replace(ours, theirs): module for name, module in model.named_modules()}
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, StoredLayer)}
    quantized = {f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.state_dict()}
    assert one.keys() == other.keys() and quantized <= one.keys()
    assert all(torch.equal(one[name], other[name]) for name in quantized if not name.endswith("bias"))
    configs = [read_json(path / "config.json")["quantization_config"] for path in (folder, tmp_path / "saved")]
    assert configs[0] == configs[1]
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, found)


def test_gradients_pass_through_a_layer(quantized):
    layer = load(quantized())
    layer = layer.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    gradient = torch.randn(3, layer.out_features)
    layer(x).backward(gradient)
    expected = gradient @ dequantize(layer.spec, layer.tensors())
    assert relative(x.grad, expected) < FLOAT32_LINEAR


def losses(model, parameters, steps=6):
    """Of training on one text."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_an_adapter_is_trained_saved_and_loaded(quantized, tmp_path):
    peft = pytest.importorskip("peft")
    folder = quantized("Mistral", lm_head=4)
    model = peft.get_peft_model(load(folder), peft.LoraConfig(r=4, target_modules="all-linear"))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 7 * 2  # of two decoder layers
    found = losses(model, learning)
    assert found[-1] < 0.9 * found[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
        expected = load(folder)(IDS).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, expected)


def test_vectors_and_norms_are_trained_saved_and_served(quantized, tmp_path):
    model = load(quantized("Qwen2", code="hyb", lm_head=4))
    before = model(IDS).logits
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    vectors = hf_plugin.train_vectors(model)
    assert len(vectors) == 2 * 7 * 2 and hf_plugin.train_vectors(model)[0] is vectors[0]
    torch.testing.assert_close(model(IDS).logits, before, rtol=FLOAT32_LAYERS, atol=FLOAT32_LAYERS)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    started = [one.detach().clone() for one in (*vectors, *norms)]
    found = losses(model, [*vectors, *norms])
    assert found[-1] < 0.9 * found[0]
    assert not any(torch.equal(one, was) for one, was in zip((*vectors, *norms), started, strict=True))
    model.save_pretrained(tmp_path / "out")
    for again in (load(tmp_path / "out"), load_model(str(tmp_path / "out"))):
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=FLOAT32_LAYERS, atol=FLOAT32_LAYERS)


def test_the_gradient_of_vectors_is_that_of_the_dequantized_layer(quantized):
    layer = load(quantized()).model.layers[0].mlp.down_proj
    weight = dequantize(layer.spec, layer.tensors())
    su, sv = layer.train_vectors()
    x, gradient = torch.randn(3, layer.in_features), torch.randn(3, layer.out_features)
    layer(x).backward(gradient)
    plain = weight / sv.detach()[:, None] / su.detach()
    own_su, own_sv = (one.detach().clone().requires_grad_() for one in (su, sv))
    ((x * own_su) @ plain.T * own_sv).backward(gradient)
    assert relative(su.grad, own_su.grad) < FLOAT32_LINEAR and relative(sv.grad, own_sv.grad) < FLOAT32_LINEAR


def test_models_without_vectors_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="no quantized linear layer: load a checkpoint"):
        hf_plugin.train_vectors(load(tiny_model()))
    exl3_files.write(tiny_model("Llama", hidden_size=128), tmp_path / "exl3", "mul1")
    with pytest.raises(ValueError, match="no vectors that can be trained: convert the checkpoint"):
        hf_plugin.train_vectors(load(tmp_path / "exl3"))


def test_pipeline_and_device_map(quantized):
    folder = quantized("Mistral", embedding=3, lm_head=4)
    said = pipeline("text-generation", model=str(folder), model_kwargs={"device_map": "cpu"}, dtype=torch.float32)
    text = said("hello", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    dense = load_model(str(folder))
    ids = said.tokenizer("hello", return_tensors="pt")
    answer = dense.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert text == said.tokenizer.decode(answer, skip_special_tokens=True)


def test_a_model_is_cast_moved_and_compiled(quantized):
    model = load(quantized())
    expected = model(IDS).logits
    with torch.no_grad():
        compiled = torch.compile(model)(IDS).logits
    torch.testing.assert_close(compiled, expected, rtol=FLOAT32_LAYERS, atol=FLOAT32_LAYERS)
    layer = model.model.layers[1].self_attn.o_proj
    before = layer.tensors()
    model.to(torch.bfloat16)
    assert all(torch.equal(tensor, layer.tensors()[name]) for name, tensor in before.items())
    assert model(IDS).logits.dtype == torch.bfloat16
    prepared = layer.prepare()
    assert layer.prepare() is prepared
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.tensors().values()) and layer._prepared is None


def test_layers_in_one_and_unknown_ones_are_refused(tiny_model, tmp_path, quantized):
    relaxml_files.write_quip_sharp(tiny_model(), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", str(tiny_model()))
    with pytest.raises(ValueError, match="several layers of the model in one: serve it with vLLM"):
        load(tmp_path / "out")
    config = read_json(quantized() / "config.json")
    with pytest.raises(ValueError, match="no such module"):
        LlamaForCausalLM.from_pretrained(quantized(), config=LlamaConfig(**{**config, "num_hidden_layers": 1}))


def test_a_second_registration_changes_nothing():
    hf_plugin.register()


def test_a_head_that_is_no_embedding_is_refused(quantized, tmp_path):
    shutil.copytree(quantized("Mistral", embedding=3, lm_head=4), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    config["quantization_config"]["head"]["tied"] = True
    del config["quantization_config"]["embedding"]
    write_json(tmp_path / "out" / "config.json", config)
    with pytest.raises(ValueError, match="head.module is 'lm_head', which is no embedding|model.embed_tokens"):
        load(tmp_path / "out")


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "sub/model.safetensors"])
def test_weights_of_another_folder_are_refused(quantized, tmp_path, shard):
    folder = shutil.copytree(quantized(), tmp_path / "copy")
    (folder / shard).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / shard)
    shutil.copy(folder / "config.json", (folder / shard).parent / "config.json")
    index = {"metadata": {}, "weight_map": dict.fromkeys(read_shard(folder / shard), shard)}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="a shard must be a plain file name"):
        load(folder)


def test_pickles_are_refused(quantized, tmp_path):
    folder = shutil.copytree(quantized(), tmp_path / "copy")
    torch.save(read_shard(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match="pytorch_model.bin is no safetensors file, and nothing else is read"):
        load(folder)


@pytest.mark.parametrize("layer", ["foo.bar.down_proj", "model.layers.0.self_attn"])
def test_slices_of_what_is_no_layer_are_refused(checkpoint, layer):
    folder = checkpoint("slices")
    tensors = read_shard(folder / "model.safetensors")
    first = next(name for name in tensors if ".down_proj.slice." in name).partition(".down_proj.slice.")[0]
    begin = f"{first}.down_proj.slice."
    cut = {name: one.clone() for name, one in tensors.items() if name.startswith(begin)}
    copied = {name.replace(begin, f"{layer}.slice."): one for name, one in cut.items()}
    save_file(tensors | copied, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="which is no layer of the model|do not make up"):
        load(folder)
