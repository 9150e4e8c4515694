# SPDX-License-Identifier: Apache-2.0
"""Training of vectors: gradients, one block, all blocks together; codes stay; a state that is no better is dropped."""

import contextlib
import dataclasses

import numerics
import pytest
import torch
from tiny_models import VOCABULARY

from quip_vllm.evaluation.loading import load_model
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import tensor_specs
from quip_vllm.ops import dequantize
from quip_vllm.quantizer import run
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.layer import quantize_group
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.settings import BLOCKS, FULL, REFIT, Settings
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer
from quip_vllm.quantizer.tuning import blocks, full
from quip_vllm.quantizer.tuning.block import Block, Product, Scaled, TokenRows
from quip_vllm.quantizer.tuning.full import Model, divergence, tune_model, tune_together
from quip_vllm.quantizer.tuning.optimizer import Optimizer

TOKENS = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = ["Llama", "Qwen2", "Gemma2"]  # plain; with biases; with norms around 0 and capped logits


@pytest.fixture(scope="module")
def units(tiny_model, tiny_text, tmp_path_factory):
    """units(architecture): (a float32 model, its plan, the tensors of each quantized layer)."""
    made = {}

    def units(architecture="Llama"):
        if architecture not in made:
            folder = tiny_model(architecture, dtype="float32", num_hidden_layers=3)
            out = tmp_path_factory.mktemp("out") / "out"
            usual = {"calibration": str(tiny_text), "sequences": 8, "sequence_length": 40}
            usual |= {"drift_correction": 0.35, "two_sided": False, "tune": "none"}  # at 0.2 training gains 1.4 %
            settings = Settings(str(folder), "e8p", 2, **usual)
            kept = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    run.Record, "merge", lambda self, units, others, reader: kept.extend(map(self.shard, units))
                )
                patch.setattr(run.Record, "remove", lambda self: None)
                started = run.Run(settings, out)
                with run.record.locked(out), torch.no_grad():
                    started.open(False)
                    started.quantize_units()
                    started.finish()
            made[architecture] = (folder, started.plan.specs, [run.shards.read_shard(file) for file in kept])
        return made[architecture]

    return units


def batches(source):
    """(hidden states before layer 0 by batches of three sequences, the calls of each layer)."""
    return source.first_hidden_states(TOKENS, 3)


def originals(source, index):
    """The original's hidden states behind layer ``index``."""
    hidden, calls = batches(source)
    for i in range(index + 1):
        with source.layer(i) as layer:
            hidden = [run_layer(layer, x, calls[i]) for x in hidden]
    return hidden


def test_gradients_of_the_scaled_weight():
    draw = torch.Generator().manual_seed(0)
    matrix, su, sv = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((32, 24), (24,), (32,)))
    weight = Scaled.apply(matrix, su, sv)
    assert numerics.relative(weight, torch.diag(sv) @ matrix @ torch.diag(su)) < 1e-15
    assert torch.autograd.gradcheck(
        lambda u, v: Scaled.apply(matrix, u, v), (su.requires_grad_(), sv.requires_grad_()), rtol=1e-6, atol=1e-8
    )


def test_gradients_of_the_product():
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 5, 24), (32, 24), (24,), (32,)
    x, matrix, su, sv = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    assert numerics.relative(Product.apply(x, matrix, su, sv), x @ Scaled.apply(matrix, su, sv).T) < 1e-15
    wanted = [x.requires_grad_(), su.requires_grad_(), sv.requires_grad_()]
    assert torch.autograd.gradcheck(lambda t, u, v: Product.apply(t, matrix, u, v), wanted, rtol=1e-6, atol=1e-8)
    su.data[3] = sv.data[5] = 0
    Product.apply(x, matrix, su, sv).add_(1).square().sum().backward()  # as Falcon adds to it
    assert su.grad[3] == sv.grad[5] == 0 and all(one.grad.isfinite().all() for one in wanted)


def test_gradient_of_the_divergence():
    draw = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(2, 3, 11, generator=draw, dtype=torch.float64) for _ in range(2))
    total, gradient = divergence(logits, wanted)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (wanted, logits.requires_grad_()))
    ).sum()
    assert total == pytest.approx(float(expected.detach()))
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logits))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_computes_what_is_stored(units, architecture):
    folder, specs, tensors = units(architecture)
    source = LayeredModel(folder)
    hidden, calls = batches(source)
    block = Block(source, 1, specs, tensors[1])
    for vector in block.vectors.values():  # distinct ones: those of q, k and v are one
        vector.data *= 1 + 0.1 * torch.rand(len(vector), generator=torch.Generator().manual_seed(len(vector)))
    stored = tensors[1] | block.stored()
    assert stored.keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor) == (tensor.dim() == 2), name
    with block.layer() as layer:
        ours = run_layer(layer, hidden[0], calls[1])
    dense = dict(stored)
    for name in [name for name in specs if f"{name}.su" in stored]:
        own = {one.name: dense.pop(f"{name}.{one.name}") for one in tensor_specs(specs[name])}
        dense[f"{name}.weight"] = dequantize(specs[name], own)
    with source.layer(1, dense) as layer:
        served = run_layer(layer, hidden[0], calls[1])
        assert all("forward" not in vars(module) for module in layer.modules())
    assert numerics.relative(ours, served) < numerics.FLOAT32_LAYERS
    begin = "model.layers.1.self_attn."
    shared = {id(block.vectors[f"{begin}{one}_proj.su"]) for one in "qkv"}
    assert len(shared) == 1 and id(block.vectors[f"{begin}o_proj.su"]) not in shared


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_block_is_nearer_to_the_original(units, architecture, monkeypatch):
    folder, specs, tensors = units(architecture)
    source = LayeredModel(folder)
    (hidden, calls), targets = batches(source), originals(source, 0)

    def loss(block):
        with block.layer() as layer:
            out = [run_layer(layer, x, calls[0]) for x in hidden[-1:]]
        return float(((out[0] - targets[-1]).square().sum(-1) / targets[-1].square().sum(-1)).mean())

    monkeypatch.setattr(blocks, "EPOCHS", 8)
    monkeypatch.setattr(blocks, "RATE", 1e-2)
    before, block = (Block(source, 0, specs, tensors[0]) for _ in range(2))
    told = blocks.tune_block(block, hidden, targets, calls[0], 0)
    assert told["before"] == pytest.approx(loss(before)) and told["after"] == pytest.approx(loss(block))
    assert told["after"] < 0.99 * told["before"] and told["epochs"] >= 1
    again = Block(source, 0, specs, tensors[0])
    assert blocks.tune_block(again, hidden, targets, calls[0], 0) == told
    assert all(torch.equal(vector, again.vectors[name]) for name, vector in block.vectors.items())


@torch.no_grad()
def test_a_worse_block_is_dropped(units, monkeypatch):
    folder, specs, tensors = units()
    source = LayeredModel(folder)
    (hidden, calls), targets = batches(source), originals(source, 0)
    monkeypatch.setattr(blocks, "RATE", 30.0)
    block = Block(source, 0, specs, tensors[0])
    told = blocks.tune_block(block, hidden, targets, calls[0], 0)
    assert told["after"] == told["before"] and told["epochs"] == 1
    assert all(torch.equal(tensor, tensors[0][name]) for name, tensor in block.stored().items())


def whole(units, folder, architecture="Llama"):
    """A Model of all blocks, whose dense weights stay in memory."""
    model, specs, tensors = units(architecture)
    source = LayeredModel(model)
    made = [Block(source, index, specs, one) for index, one in enumerate(tensors)]
    return source, made, Model(source, made, TOKENS.split(3), originals(source, 2), folder)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_a_step_are_those_of_autograd(units, tmp_path, architecture):
    source, made, model = whole(units, tmp_path / "inputs", architecture)
    norm, before = model.outer["model.norm.weight"], source.outer_vectors()["model.norm.weight"].detach().clone()
    norm.data *= 1 + 0.1 * torch.rand(len(norm), generator=torch.Generator().manual_seed(0))
    model.place()
    loss = model.step(1)
    found = [vector.grad for vector in model.vectors()]
    for vector in model.vectors():
        vector.grad = None
    hidden, calls = source.first_hidden_states(TOKENS[3:6], 3)
    wanted = originals(source, 2)[1]
    with contextlib.ExitStack() as stack, torch.enable_grad():
        x = hidden[0]
        for index, block in enumerate(made):
            x = run_layer(stack.enter_context(block.layer()), x, calls[index])
        head = stack.enter_context(source.output_head())
        log_q, own = head(x).log_softmax(-1), source.outer_vectors()["model.norm.weight"]
        own.data, tuned = before, own.data
        log_p = head(wanted).detach().log_softmax(-1)
        own.data = tuned
        expected = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / TOKENS[3:6].numel()
        expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4) == pytest.approx(model.loss([1]), rel=1e-4)
    assert numerics.relative(found[-1], own.grad) < numerics.FLOAT32_GRADIENTS
    for block in made:
        for name, vector in block.vectors.items():
            ours = next(grad for one, grad in zip(model.vectors(), found, strict=True) if one is vector)
            assert numerics.relative(ours, vector.grad) < numerics.FLOAT32_GRADIENTS, name


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_head_and_embedding(units, tmp_path, architecture, tied):
    """Against differences of the loss, of which Gemma's embedding is scaled and its logits are capped."""
    folder, specs, tensors = units(architecture)
    source = LayeredModel(folder)
    weight = source.reader.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    rows = []
    for name in ("head",) if tied else ("head", "embedding"):
        spec = LinearSpec("e8p", 2, weight.shape[1], (len(weight),), None, rotate_output=False)
        group = Inputs([name], torch.eye(weight.shape[1], dtype=torch.float64))
        found = quantize_group(group, {name: weight}, {name: spec}, Settings("", "e8p", 2, tune="none"))[name].tensors
        found = {f"{name}.{key}": tensor.float() if tensor.dim() == 1 else tensor for key, tensor in found.items()}
        spec = dataclasses.replace(spec, vector_dtype=torch.float32)
        rows.append(TokenRows(name, spec, found, source))
    made = [Block(source, index, specs, one) for index, one in enumerate(tensors)]
    targets = originals(source, 2)
    model = Model(source, made, TOKENS.split(3), targets, tmp_path / "inputs", rows[0], rows[-1])
    assert model.step(1) == pytest.approx(model.loss([1]), rel=1e-5)
    for one in rows:
        for name, vector in one.vectors.items():
            assert any(vector is other for other in model.vectors())
            start, gradient = vector.detach().clone(), vector.grad
            step = 1e-2 * start.square().mean().sqrt() * gradient / gradient.square().mean().sqrt()
            losses = []
            for sign in (1, -1):
                vector.data = start + sign * step
                model.place()
                losses.append(model.loss([1]))
            vector.data = start
            assert (losses[0] - losses[1]) / 2 == pytest.approx(float(step @ gradient), rel=0.03), name


def test_every_element_moves_by_a_share_of_its_own_size():
    """Gemma's norms hold 512 beside 1: a step of a share of their root mean square would be the end of the 1."""
    vector = torch.tensor([512.0, 1.0, -20.0, 0.0], requires_grad=True)
    before, size = vector.detach().clone(), vector.detach().square().mean().sqrt()
    vector.grad = torch.tensor([1e-3, 5.0, -1.0, 2.0])
    Optimizer([vector], 0.1, 4).step()
    least = 0.01 * size  # a zero is no end, either
    rate = 0.1 / 4  # it rises
    torch.testing.assert_close(before - vector.detach(), rate * torch.tensor([512.0, least, -20.0, least]))


def test_what_the_text_hardly_meets_hardly_moves():
    """Of a vector that is said to be rare; in another one Adam moves all elements alike."""
    gradient = torch.tensor([1.0, -1.0, 1e-4, 0.0])
    usual, rare = (torch.ones(4, requires_grad=True) for _ in range(2))
    optimizer = Optimizer([usual, rare], 0.1, 4, rare=[rare])
    for step in range(3):
        if step == 1:  # it goes on from a state
            state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
            optimizer = Optimizer([usual, rare], 0.1, 4, rare=[rare])
            optimizer.load(state)
        usual.grad, rare.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    moved, less = (vector.detach() - 1 for vector in (usual, rare))
    assert moved[2] / moved[0] > 0.99 and moved[3] == less[3] == 0
    assert 0 < less[2] / less[0] < 3e-4 and 0.3 < less[0] / moved[0] < 0.7


class Stopped(Exception):
    pass


@torch.no_grad()
def test_trained_together_and_stopped_and_resumed(units, tmp_path, monkeypatch):
    folder, specs, tensors = units()

    def tuned(name):
        source = LayeredModel(folder)
        return tune_together(
            source, specs, tensors.__getitem__, TOKENS.split(3), originals(source, 2), tmp_path / name, 0, 4
        )

    trained, told = tuned("whole")
    assert told["after"] < 0.98 * told["before"] and told["epochs"] == 4
    every = {name: tensor for one in tensors for name, tensor in one.items() if tensor.dim() == 1}
    assert trained.keys() == {*every, "model.norm.weight"}
    step, calls = Model.step, []

    def stopping(self, index):
        calls.append(index)
        if len(calls) == 4:  # in the second epoch of two steps
            raise Stopped
        return step(self, index)

    monkeypatch.setattr(Model, "step", stopping)
    with pytest.raises(Stopped):
        tuned("stopped")
    assert (tmp_path / "stopped" / "state.safetensors").exists()
    again, told_again = tuned("stopped")
    assert told_again == told and len(calls) == 4 + 2 * 3
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


@torch.no_grad()
def test_worse_together_is_dropped(units, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "FIRST", 3e3)
    _, made, model = whole(units, tmp_path / "inputs")
    before = {name: vector.detach().clone() for block in made for name, vector in block.vectors.items()}
    told = tune_model(model, 3, 0, 2, tmp_path / "state.safetensors")
    assert told["after"] == told["before"] and told["epochs"] == full.PATIENCE
    assert all(torch.equal(vector, before[name]) for block in made for name, vector in block.vectors.items())


@pytest.mark.parametrize(("tune", "head"), [(BLOCKS, None), (FULL, None), (FULL, 4)])
def test_a_run(tiny_model, tiny_text, tmp_path, tune, head):
    """Training leaves the codes alone, but for those of a layer behind one that was trained by itself."""
    model = tiny_model("Llama", dtype="float32")
    reports = {}
    for kind in (REFIT, tune):
        settings = Settings(
            str(model), "e8p", 2, calibration=str(tiny_text), sequences=8, sequence_length=64, tune=kind, lm_head=head
        )
        reports[kind] = quantize(settings, tmp_path / kind)
    one, other = (run.shards.read_shard(tmp_path / kind / "model.safetensors") for kind in (REFIT, tune))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tensor.dim() == 2 and (tune == FULL or ".layers.0." in name):
            assert torch.equal(tensor, other[name]), name
        if "norm" in name:
            assert torch.equal(tensor, other[name]) == (tune == BLOCKS and name == "model.norm.weight"), name
    told = reports[tune]["tuning"]
    assert [one["name"] for one in told] == (["model.layers"] if tune == FULL else ["model.layers.0", "model.layers.1"])
    assert all(one["after"] < one["before"] for one in told) and reports[REFIT]["tuning"] == []
    assert not (tmp_path / tune / ".quantize").exists()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {}])
def test_head_and_embedding_are_trained(tiny_model, tiny_text, tmp_path, changes):
    """With all layers: the loss that the report tells is that of the finished checkpoint."""
    folder = tiny_model("Llama", dtype="float32", **changes)
    settings = Settings(
        str(folder), "e8p", 2, calibration=str(tiny_text), sequences=8, sequence_length=64, lm_head=2, embedding=2
    )
    told = quantize(settings, tmp_path / "out")["tuning"][-1]
    assert told["after"] < 0.95 * told["before"]
    tokens = calibration_tokens(settings, folder, VOCABULARY)
    wanted, logits = (load_model(str(one))(tokens).logits for one in (folder, tmp_path / "out"))
    assert divergence(logits, wanted)[0] / tokens.numel() == pytest.approx(told["after"], rel=1e-3)


@torch.no_grad()
def test_the_first_step_would_take_a_share_of_the_loss(units, tmp_path, monkeypatch):
    """Were the loss linear: so models near to their original, or that feel a step more, are trained more slowly."""
    _, _, model = whole(units, tmp_path / "inputs", "Gemma2")
    losses, slopes, rates = [], [], []
    step = model.step
    monkeypatch.setattr(model, "step", lambda index: losses.append(step(index)) or losses[-1])

    def stopped(optimizer):
        sizes = [vector.abs().clamp_min(0.01 * vector.square().mean().sqrt()) for vector in optimizer.vectors]
        slopes.append(sum((v.grad.abs() * size).sum() for v, size in zip(optimizer.vectors, sizes, strict=True)))
        rates.append(optimizer.rate)
        raise Stopped

    monkeypatch.setattr(Optimizer, "step", stopped)
    with pytest.raises(Stopped):
        tune_model(model, 3, 0, 2, tmp_path / "state")
    assert rates[0] * float(slopes[0]) == pytest.approx(full.FIRST / 2 * losses[0], rel=1e-5)


def test_a_head_with_a_bias_is_not_trained(tiny_model, tiny_text, tmp_path):
    model = tiny_model("Phi", dtype="float32", tie_word_embeddings=False)
    settings = Settings(str(model), "e8p", 2, calibration=str(tiny_text), sequences=8, sequence_length=64)
    report = quantize(settings, tmp_path / "out")
    one, other = (run.shards.read_shard(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert torch.equal(one["lm_head.bias"], other["lm_head.bias"])
    assert not torch.equal(one["model.final_layernorm.weight"], other["model.final_layernorm.weight"])
    assert report["tuning"][-1]["after"] < report["tuning"][-1]["before"]
