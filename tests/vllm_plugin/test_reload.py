# SPDX-License-Identifier: Apache-2.0
"""Weights are reloaded whole, or the reload is refused and the layers compute as before."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from served_layers import build, finish, quant_config, random_tensors
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from quip_vllm.vllm_plugin import arrival, reload

N, K = 48, 64
pytestmark = pytest.mark.usefixtures("set_rank")


class Model(nn.Module):
    """A dense parameter that arrives first, and a quantized layer."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(K))
        self.layer = build(ReplicatedLinear, config, K, N, prefix="layer")

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, tensor in weights:
            loader = getattr(params[name], "weight_loader", lambda param, loaded: param.data.copy_(loaded))
            loader(params[name], tensor)

    def forward(self, x):
        return self.layer(x * self.norm)[0]


class Unasked(Model):
    """Has built the layer without the checkpoint's config."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(K, N, bias=False)


for kind in (Model, Unasked):
    arrival.carry_tensors(kind)


def files(seed, **changes):
    """The checkpoint's tensors; a change of None leaves one out."""
    own = {"norm": torch.full((K,), 1.0 + seed)}
    own |= {f"layer.{name}": tensor for name, tensor in random_tensors("1mad", 2, N, K, seed).items()}
    own |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return [(name, tensor) for name, tensor in own.items() if tensor is not None]


def again(model, weights):
    """What vLLM does to reload."""
    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, None)


@pytest.fixture
def model():
    made = Model(quant_config("1mad", 2))
    record_metadata_for_reloading(made)
    made.load_weights(iter(files(0)))
    finish(made.layer)
    return made


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """The part of an engine's config that is read; its folder has a config.json."""
    config = quant_config("1mad", 2)

    def folder(name, text=None, **changes):
        (tmp_path / name).mkdir()
        described = {**config.described(), **changes}
        (tmp_path / name / "config.json").write_text(text or json.dumps({"quantization_config": described}))
        return str(tmp_path / name)

    made = SimpleNamespace(
        model_config=SimpleNamespace(model=folder("first"), model_weights="", revision=None, dtype=torch.float32),
        load_config=SimpleNamespace(load_format="auto"),
        quant_config=config,
        folder=folder,
    )
    for module in (arrival, reload):
        monkeypatch.setattr(module, "get_current_vllm_config_or_none", lambda: made)
    return made


def state(model):
    return {name: (param.data_ptr(), param.clone()) for name, param in model.named_parameters()}


def refused(model, weights, message):
    x = torch.randn(3, K)
    before, wanted = state(model), model(x)
    with pytest.raises(ValueError, match=f"reload of .* is refused.*{message}.*reload a whole checkpoint") as error:
        again(model, weights)
    assert "\n" not in str(error.value)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(after[name][0] == one[0] and torch.equal(after[name][1], one[1]) for name, one in before.items())
    assert torch.equal(model(x), wanted)
    # and the next reload works
    again(model, iter(files(1)))
    assert not torch.equal(model(x), wanted)
    again(model, iter(files(0)))
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": None}, "norm is missing"),
        ({"layer__sv": None}, "layer.sv is missing"),
        ({"layer__packed": None}, "layer.packed is missing"),
        ({"layer__table": torch.zeros(4)}, "layer.table was not in the checkpoint"),
        ({"norm": torch.zeros(K - 1)}, r"norm is torch.float32 \[63\] in place of torch.float32 \[64\]"),
        ({"norm": torch.zeros(K, dtype=torch.int32)}, "norm is torch.int32"),
        ({"layer__sv": torch.zeros(N - 16).half()}, r"layer.sv is torch.float16 \[32\]"),
        ({"layer__sv": torch.zeros(N)}, r"layer.sv is torch.float32 \[48\] in place of torch.float16"),
        ({"layer__packed": random_tensors("1mad", 3, N, K)["packed"]}, r"layer.packed is .* \[3, 192\] in place of"),
    ],
)
def test_other_tensors_are_refused(model, changes, message):
    refused(model, iter(files(1, **changes)), message)


def test_a_dense_tensor_may_have_another_float_type(model):
    again(model, iter(files(1, norm=torch.full((K,), 3.0, dtype=torch.bfloat16))))
    assert torch.equal(model.norm, torch.full((K,), 3.0))


def test_a_file_that_cannot_be_read_is_refused(model):
    def broken():
        yield from files(1)[:2]
        raise OSError("a shard\nis cut")

    refused(model, broken(), r"they cannot be read \(a shard is cut\)")


def test_numbers_do_not_become_a_weight():
    made = Unasked(quant_config("1mad", 2))
    own = {name.replace("layer", "gate"): tensor for name, tensor in files(0) if "layer" in name}
    with pytest.raises(ValueError, match="gate is quantized, but vLLM's code of this model loads it as an ordinary"):
        made.load_weights(iter([*files(0), *own.items()]))


def test_a_model_without_weights_takes_any(model):
    del model.quip_loaded
    again(model, iter(files(1)))
    assert torch.equal(model.norm, torch.full((K,), 2.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"code": "3inst"}, "quantization_config has another code;"),
        ({"hadamard_block": 16, "bits": 3}, "quantization_config has another bits, hadamard_block;"),
        ({"format_version": 2}, "in its config.json, format_version is 2"),
        ({"text": "{}"}, "its config.json has no quantization_config"),
        ({"text": "{"}, r"they cannot be read \(Expecting"),
    ],
)
def test_other_formats_are_refused_and_the_folder_stays(engine, config, message):
    made = Model(engine.quant_config)
    record_metadata_for_reloading(made)
    made.load_weights(iter(files(0)))
    finish(made.layer)
    first = engine.model_config.model
    engine.model_config.model = engine.folder("second", **config)  # vLLM's reload sets it first
    with pytest.raises(ValueError, match=f"second is refused.*{message}"):
        again(made, iter(files(1)))
    assert engine.model_config.model == first and engine.model_config.revision is None
    engine.model_config.model = engine.folder("third")
    again(made, iter(files(1)))
    assert torch.equal(made.norm, torch.full((K,), 2.0))
    assert made.quip_loaded.source["model"] == engine.model_config.model


def test_a_folder_without_config_is_refused_but_weights_from_elsewhere_are_not(engine, tmp_path):
    made = Model(engine.quant_config)
    record_metadata_for_reloading(made)
    made.load_weights(iter(files(0)))
    finish(made.layer)
    (tmp_path / "first" / "config.json").unlink()
    again(made, iter(files(1)))  # a trainer sends them; the folder is gone
    (tmp_path / "second").mkdir()
    engine.model_config.model = str(tmp_path / "second")
    with pytest.raises(ValueError, match="second is refused.*it has no config.json"):
        again(made, iter(files(0)))


@pytest.mark.parametrize("error", [None, OSError("vLLM's own words")])
def test_files_that_vllm_fetches_are_checked_before_a_layer_gets_any(engine, tmp_path, error):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    engine.model_config.model, engine.model_config.revision = "someone/tiny", "c0ffee"
    engine.load_config.download_dir = str(tmp_path)
    model = Model(engine.quant_config)

    def fetching(lost, error=None):
        whole = save(dict(files(0)))
        (snapshot / "model.safetensors").write_bytes(whole[: len(whole) - lost])
        if error is not None:
            raise error
        yield from files(0)

    with pytest.raises(ValueError, match="c0ffee/model.safetensors cannot be read .*truncated or damaged"):
        model.load_weights(fetching(9, error))
    assert not model.norm.any()
    model.load_weights(fetching(0))
    assert torch.equal(model.norm, torch.ones(K))
