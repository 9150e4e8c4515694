# SPDX-License-Identifier: Apache-2.0
"""Token weights and Hessians of outputs: toy figures, autograd of the whole model, what a shared folder belongs to."""

import shutil
import weakref

import numerics
import pytest
import torch
from torch import nn

from quip_vllm.checkpoint.shards import read_shard, write_shard
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.curvature.outputs import LARGEST_WEIGHT, OutputCollector, shrunk, token_weights
from quip_vllm.quantizer.sensitivities import Sensitivities, chosen, spread_weights
from quip_vllm.quantizer.source.backward import sampled_score
from quip_vllm.quantizer.source.model import LayeredModel


def test_two_tokens():
    """x = (1, 0) and (1, 1) with g = (1, 2) and (0, 1): the figures of the two papers."""
    linear = nn.Linear(2, 2)
    collector = OutputCollector({"a": linear}, two_sided=True)
    x, g = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    linear(x.repeat(2, 1, 1)).backward(g.repeat(2, 1, 1))  # halves that agree
    found = collector.close()["a"]
    torch.testing.assert_close(found.outputs * 1.75, torch.tensor([[0.5, 1.0], [1.0, 3.0]]))
    assert found.energy == (5 * 1 + 1 * 2) / 2
    torch.testing.assert_close(found.weights, torch.tensor([2.5, 0.5, 2.5, 0.5]) / 1.5)
    weighted = Collector({"a": linear}, {"a": found.weights})
    linear(x)
    hessian = 1.5 * weighted.close()[0].hessian / 2  # times the mean of g^2, which the weights were divided by
    torch.testing.assert_close(hessian, torch.tensor([[1.5, 0.25], [0.25, 0.25]], dtype=torch.float64))
    linear(x).sum().backward()  # the hooks are gone
    there = weakref.ref(collector)
    del collector
    assert there() is None  # no graph holds it


def test_a_layer_that_only_chooses_has_no_sensitivity():
    """As the indexer of sparse attention: its outputs become places, through which no gradient flows."""
    linears = {"chooser": nn.Linear(4, 4), "other": nn.Linear(4, 2)}
    collector = OutputCollector(linears, two_sided=True)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        order = linears["chooser"](x).argsort(-1)
    linears["other"](x.requires_grad_().gather(-1, order)).sum().backward()
    assert list(collector.close()) == ["other"]


def test_token_weights():
    squares = torch.rand(10_000)
    squares[7] = 1e6
    weights = token_weights(squares)
    assert weights.mean() == pytest.approx(1) and weights[7] == weights.max()
    assert weights[7] / weights[8] == pytest.approx(LARGEST_WEIGHT * float(squares.mean() / squares[8]))
    assert torch.equal(token_weights(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("correlated", [False, True])
def test_a_shrunk_moment_is_near_the_best(correlated):
    """Of mixtures with the identity, for a true moment that is known; the identity itself where that is true."""
    draw = torch.Generator().manual_seed(0)
    n, sequences, columns = 24, 9, 3
    root = torch.linalg.qr(torch.randn(n, n, generator=draw))[0] * torch.linspace(0.2, 2, n)
    root = root / root.square().sum().div(n).sqrt() if correlated else torch.eye(n)
    truth = root @ root.T
    found, best, plain = 0.0, 0.0, 0.0
    for _ in range(40):
        g = root @ torch.randn(sequences, n, columns, generator=draw)
        products = g @ g.mT
        own = shrunk(products[::2].sum(0), products[1::2].sum(0), sequences)
        own = torch.eye(n) if own is None else own
        assert own.diagonal().mean() == pytest.approx(1)
        mean = products.sum(0)
        mean /= mean.diagonal().mean()
        errors = [((1 - s) * mean + s * torch.eye(n) - truth).norm() for s in torch.linspace(0, 1, 101)]
        found, best, plain = found + (own - truth).norm(), best + min(errors), plain + errors[0]
    assert found < (1.1 * best if correlated else 0.3 * plain) and best < 0.8 * plain
    assert shrunk(torch.zeros(3, 3), torch.zeros(3, 3), 4) is None


def pair_of_runs(weights, x0, x):
    """The groups of two readers, of which one is crossed, behind two batches."""
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 3)})
    torch.manual_seed(0)
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    collector = Collector(layers, weights)
    with torch.no_grad():
        for original, own in zip(x0, x, strict=True):
            with collector.original():
                layers["a"](original), layers["b"](2 * original)
            with collector.inputs():
                layers["a"](own), layers["b"](2 * own)
    a, b = collector.close()
    assert a.names == ["a"] and b.names == ["b"]
    return [a.hessian, a.drift.difference, b.hessian, b.drift.crossed["b"]]


def test_weights_of_one_are_none_and_two_is_twice():
    x0, x = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    plain = pair_of_runs(None, x0, x)
    ones = torch.ones(20)
    assert all(map(torch.equal, pair_of_runs({"a": ones, "b": ones}, x0, x), plain))
    more = ones.clone()
    more[13] = 2.0  # second batch, first sequence, fourth token
    double = pair_of_runs({"a": more, "b": more}, x0, x)
    again = pair_of_runs(None, x0[1:, :1, 3:4], x[1:, :1, 3:4])
    for weighted, once, token in zip(double, plain, again, strict=True):
        torch.testing.assert_close(weighted, once + token, rtol=numerics.FLOAT32_SUMS, atol=numerics.FLOAT32_SUMS)


def sensitivities(folder, source, two_sided=True, names=None, seed=0, tokens=None):
    tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0)) if tokens is None else tokens
    every = [name for index in range(len(source.layers)) for name in source.linears(index)]
    with torch.no_grad():
        weights = source.reader.digest(source.reader.names())
        return Sensitivities(folder, source, weights, tokens, 3, names or every, two_sided, seed)


@pytest.mark.parametrize("architecture", ["Llama", "Phi3"])
def test_they_are_those_of_the_whole_model(tiny_model, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    source = LayeredModel(tiny_model(architecture, dtype="float32"))
    tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    found = sensitivities(tmp_path, source, tokens=tokens)
    whole = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    linears = {name: module for name, module in whole.named_modules() if ".layers." in name}
    linears = {name: module for name, module in linears.items() if isinstance(module, nn.Linear)}
    seen = {name: [] for name in linears}
    for name, module in linears.items():

        def keep(module, args, out, name=name):
            out.register_hook(lambda g: seen[name].append((args[0].detach(), g)))

        module.register_forward_hook(keep)
    score = sampled_score(0)
    for index, chunk in enumerate(tokens.split(3)):
        logits = whole(chunk, use_cache=False).logits
        logits.backward(score(logits.detach(), index, slice(0, 40), None))
    for index in range(len(source.layers)):
        names = list(source.linears(index))
        layer = found.of(index, names)
        assert list(layer) == names
        for name, one in layer.items():
            x, g = (torch.cat(side).double() for side in zip(*seen[name], strict=True))
            products = torch.einsum("btn,btm,btk->bnm", g, g, x.square())
            outputs = shrunk(products[::2].sum(0), products[1::2].sum(0), 5)
            assert (one.outputs is None) == (outputs is None)
            if outputs is not None:
                assert numerics.relative(one.outputs, outputs) < numerics.FLOAT32_HESSIAN
            energy = (g.square().sum(-1) * x.square().sum(-1)).mean()
            assert one.energy == pytest.approx(float(energy), rel=numerics.FLOAT32_HESSIAN)
            alike = ["q_proj", "k_proj", "v_proj"] if name.endswith("q_proj") else [name.rpartition(".")[2]]
            if alike[0] in ("q_proj", "o_proj", "down_proj", "qkv_proj"):
                readers = [name.replace("q_proj", reader) if len(alike) > 1 else name for reader in alike]
                own = [torch.cat([g for _, g in seen[reader]]).square().mean(-1).flatten() for reader in readers]
                mean = torch.stack([token_weights(squares) for squares in own]).mean(0)
                assert numerics.relative(one.weights, mean) < numerics.FLOAT32_HESSIAN
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "sensitivities.json",
    ]


def test_a_folder_belongs_to_a_model_a_text_and_a_seed(tiny_model, tmp_path):
    source = LayeredModel(tiny_model())
    made = sensitivities(tmp_path, source)
    names = list(source.linears(0))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = sensitivities(tmp_path, source, two_sided=False, names=names[:2])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files
    assert torch.equal(again.of(0, names)[names[0]].weights, made.of(0, names)[names[0]].weights)
    with pytest.raises(ValueError, match="holds Hessians of other seed: give the model, calibration and seed of then"):
        sensitivities(tmp_path, source, seed=1)
    with pytest.raises(ValueError, match="of other calibration"):
        sensitivities(tmp_path, source, tokens=torch.zeros(5, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match="of other weights"):
        sensitivities(tmp_path, LayeredModel(tiny_model(seed=1)))
    sensitivities(tmp_path / "some", source, two_sided=False, names=names[:2])
    with pytest.raises(ValueError, match="of fewer layers, or their token weights alone"):
        sensitivities(tmp_path / "some", source, names=names[:2])
    with pytest.raises(ValueError, match="of fewer layers"):
        sensitivities(tmp_path / "some", source, two_sided=False, names=names)


@pytest.mark.parametrize("change", ["outputs", "weights", "energy", "nan", "below zero", "layers"])
def test_a_damaged_folder_is_refused(tiny_model, tmp_path, change):
    source = LayeredModel(tiny_model())
    sensitivities(tmp_path, source)
    names = list(source.linears(0))
    file, first = tmp_path / "layer-00000.safetensors", names[0]
    tensors = read_shard(file)
    if change == "outputs":
        tensors[f"{first}.outputs"] = torch.eye(3)
    elif change == "weights":
        tensors[f"{first}.weights"] = torch.ones(7)
    elif change == "energy":
        del tensors[f"{first}.energy"]
    elif change == "nan":
        tensors[f"{first}.weights"][3] = float("nan")
    elif change == "below zero":
        tensors[f"{first}.weights"][3] = -1
    else:
        write_json(tmp_path / "sensitivities.json", read_json(tmp_path / "sensitivities.json") | {"layers": [[1]]})
    write_shard(file, tensors)
    with pytest.raises(ValueError, match=r"damaged: give a new folder \(--hessians\)"):
        sensitivities(tmp_path, source).of(0, names)


def test_some_sequences_are_enough():
    assert chosen(100, 4000).tolist() == [0, 5, 11, 17, 23, 29, 35, 41, 47, 52, 58, 64, 70, 76, 82, 88, 94]
    assert chosen(9, 4000).tolist() == list(range(9)) and chosen(9, 80_000).tolist() == [0]


def test_weights_of_some_stand_for_those_of_all():
    weights = torch.rand(17, 4000) + 0.5
    weights /= weights.mean()
    spread = spread_weights(weights.flatten(), 0.25, 100, 4000).view(100, 4000)
    others = torch.ones(100, dtype=torch.bool).index_fill(0, chosen(100, 4000), False)
    assert spread[others].eq(0.75).all() and spread[5].allclose(0.75 + 0.25 * weights[1] * 100 / 17)
    assert spread.mean().item() == pytest.approx(1)


def test_a_disk_that_is_too_small(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match="has 0 bytes free, and about .* kB are needed: make room, then give --resume"):
        sensitivities(tmp_path, LayeredModel(tiny_model()))


def test_a_layer_that_reads_some_tokens_counts_all_the_same(tiny_model, tmp_path, monkeypatch, caplog):
    source = LayeredModel(tiny_model())
    routed = "model.layers.1.mlp.up_proj"

    def close(self):
        found = original(self)
        if routed in found:
            found[routed].weights = found[routed].weights[:-1]
        return found

    original = OutputCollector.close
    monkeypatch.setattr(OutputCollector, "close", close)
    found = sensitivities(tmp_path, source)
    assert f"{routed} does not read one vector per token: its tokens count the same" in caplog.text
    assert set(found.of(1, source.linears(1))) == set(source.linears(1)) - {routed}
